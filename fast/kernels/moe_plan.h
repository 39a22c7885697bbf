// The plan of moe.hip: its sizes, the experts of a launch, and the list of its tasks.

#pragma once

#include "common.h"

// The sizes of the model's slice, which the build gives with -D. The defaults are those of one of 8 ranks of
// the 397B.
#ifndef HIDDEN_SIZE
#define HIDDEN_SIZE 4096
#define INTERMEDIATE_SIZE 128
#define EXPERTS 512
#define TOP_K 10
#define SHARED_SIZE 128
#endif

namespace {

constexpr int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }
constexpr int half_until(int n, int limit) { return n <= limit ? n : half_until(n / 2, limit); }

constexpr int D = HIDDEN_SIZE, I = INTERMEDIATE_SIZE, E = EXPERTS;
constexpr int SHARED = SHARED_SIZE;  // intermediate size of the shared expert, 0 if there is none
constexpr int MAX_PAIRS = 2 * LANES;  // pairs of a row and a slot

// A step is one load of 16 bytes a lane: 16 rows of a weight by 128 columns, in 4 groups of 32 that have a
// scale each. Lane l holds group l / 16 of row l % 16. A step takes four products of the matrix unit:
// product j multiplies elements 8 j to 8 j + 7 of all four groups. The rows of x are loaded in the same
// order, so the order of the columns within a sum does not matter.
constexpr int STEP = 128;
// In gate-up each streamer has its own columns, and in down its own rows of the weight. So it keeps its own
// columns of the rows x in registers, for all gate-up tasks.
constexpr int D_STEPS = (D / STEP + STREAMERS - 1) / STREAMERS, I_STEPS = I / STEP;
// Long rows of down are cut in two, for two streamers: a task is then four loads of each, and the registers
// hold the next two tasks besides.
constexpr int HALVES = I_STEPS > 4 && I_STEPS % 2 == 0 ? 2 : 1, I_PART = I_STEPS / HALVES;
constexpr int TEAM = STREAMERS / HALVES;
constexpr int ROOM = most(4, most(D_STEPS, I_PART));
// Tiles of 16 rows that a streamer has of one task.
constexpr int GATE_TILES = half_until(16, ROOM / D_STEPS);
constexpr int DOWN_TILES = gcd(half_until(16, ROOM / I_PART), D / STEP);
constexpr int LOADS = most(GATE_TILES * D_STEPS, DOWN_TILES * I_PART);
// Tasks whose weights are on their way while one is computed. A task has 32 KiB of weights or more.
constexpr int AHEAD = LOADS > 4 ? 1 : 2;
// Words of four scales that a lane gets with one load.
constexpr int WORDS = gcd(gcd(D_STEPS, D / STEP), gcd(DOWN_TILES * I_PART, 4));

constexpr int GATE_ROWS = TILE * GATE_TILES;       // of gate-up in a task; half of them are gates
constexpr int COLUMNS = TEAM * TILE * DOWN_TILES;  // of the output in a down task
constexpr int SUMMED = 32;                         // columns of a sum task
constexpr int GATE_BLOCKS = 2 * I / GATE_ROWS, DOWN_BLOCKS = D / COLUMNS;

static_assert(D % STEP == 0 && I % STEP == 0 && GATE_BLOCKS * GATE_ROWS == 2 * I, "unsupported sizes");
static_assert(HALVES == 1 || DOWN_TILES == 1, "unsupported sizes");
static_assert(D_STEPS == 1 || D_STEPS * STREAMERS * STEP == D, "unsupported hidden size");

// The shared expert's down product is a part of the sum tasks: each streamer has one tile of the output and
// a part of the product's columns, in steps of one product of the matrix unit.
constexpr int SUM_TILES = SUMMED / TILE, PARTS = STREAMERS / SUM_TILES;
constexpr int SHARED_STEPS = (SHARED / DEPTH + PARTS - 1) / PARTS;
static_assert(SHARED % DEPTH == 0, "unsupported size of the shared expert");

constexpr int HIDDEN_STRIDE = I + 8;  // The 8 make rows begin in different banks of the LDS.

// ---- which experts there are

// The ids of the experts of this launch, in the LDS.
struct List {
  int experts[MAX_PAIRS], count;
};

// What the messenger knows of the routing. A pair is a row and a slot; each lane has the pairs `lane` and
// LANES + lane. The list names experts in the order in which the pairs name them first.
struct Routing {
  int id[2];       // the pair's expert; E stands for all ids that are no expert's
  u64 present[2];  // lanes that have a pair
  int count;       // the number of different ids
};

// The number of lanes below this one that are in a mask.
INLINE int below(u64 mask) {
  return __builtin_amdgcn_mbcnt_hi((unsigned)(mask >> 32), __builtin_amdgcn_mbcnt_lo((unsigned)mask, 0));
}

// The lanes of `present` whose `other` is equal to this lane's `id`. The ids are compared bit by bit, with
// one ballot for each bit.
INLINE u64 alike(int id, int other, u64 present) {
  u64 same = present;
#pragma unroll
  for (int bit = 1; bit <= E; bit *= 2) {
    u64 set = ballot(other & bit);
    same &= id & bit ? set : ~set;
  }
  return same;
}

// Reads the routing, and writes the list to the LDS for all waves.
INLINE Routing routing(List& list, const int* experts, int pairs, int lane) {
  Routing r;
#pragma unroll
  for (int part = 0; part < 2; part++) {
    int pair = part * LANES + lane;
    r.present[part] = ballot(pair < pairs);
    int id = pair < pairs ? experts[pair] : E;
    r.id[part] = id < 0 || id > E ? E : id;
  }
  u64 lower = (1ull << lane) - 1;
  u64 low = alike(r.id[0], r.id[0], r.present[0]);
  u64 high = alike(r.id[1], r.id[1], r.present[1]), before = alike(r.id[1], r.id[0], r.present[0]);
  bool first[] = {(low & lower) == 0 && pairs > lane,
                  (before | (high & lower)) == 0 && pairs > LANES + lane};
  u64 named[] = {ballot(first[0]), ballot(first[1])};
  int lows = __builtin_popcountll(named[0]);
  r.count = lows + __builtin_popcountll(named[1]);
  if (first[0]) list.experts[below(named[0])] = r.id[0];
  if (first[1]) list.experts[lows + below(named[1])] = r.id[1];
  if (lane == 0) list.count = r.count;
  return r;
}

// The id of the list's number u.
INLINE int expert_at(const List& list, int u) { return __builtin_amdgcn_readfirstlane(list.experts[u]); }

// An expert whose weights may be read in place of one that is not there.
INLINE int bounded(int expert) { return least(expert, E - 1); }

// ---- tasks

struct Task {
  bool down;
  int u, block;  // the expert's number in the list, and the block of its gate-up rows or output columns
};

// The list of tasks: all gate-ups, expert by expert, then all downs.
INLINE Task task_at(int number, int count) {
  int gates = count * GATE_BLOCKS;
  if (number < gates) return {false, number / GATE_BLOCKS, number % GATE_BLOCKS};
  return {true, (number - gates) / DOWN_BLOCKS, (number - gates) % DOWN_BLOCKS};
}

// The number of a workgroup's own tasks among the first `end` of the list.
INLINE int own(int end, int workgroup, int workgroups) {
  return end > workgroup ? (end - workgroup + workgroups - 1) / workgroups : 0;
}

// A workgroup's own tasks are numbered 0, 1, ...: its gate-ups end at `gates`, its downs at `downs`, its sums
// at `sums`. The streamers' loop does AHEAD + 1 of them in a round and has one exit, after a whole round: with
// more exits the compiler could not count the loads on their way, and would wait for all of them. So the
// loop ends at `padded`, and its entries from `downs` on do nothing.
struct Shares {
  int gates, downs, sums, padded;
};

INLINE Shares shares(int count, int workgroup, int workgroups) {
  int products = count * (GATE_BLOCKS + DOWN_BLOCKS), downs = own(products, workgroup, workgroups);
  return {own(count * GATE_BLOCKS, workgroup, workgroups), downs,
          own(products + D / SUMMED, workgroup, workgroups), (downs + AHEAD) / (AHEAD + 1) * (AHEAD + 1)};
}

}  // namespace
