// What there is to do in moe.hip: the sizes, the experts of a launch, and the list of its tasks.

#pragma once

#include "common.h"

// The sizes of the model's slice, which the build gives with -D. These are one of 8 ranks of the 397B's.
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

// One load of 16 bytes a lane is a step: 16 rows of a weight by 128 columns, which are 4 groups of 32 with
// a scale each. A step is four products of the matrix unit, in which element 8 j + e of all four groups takes
// the place of column 8 (l / 16) + e of product j.
constexpr int STEP = 128;
// The streamers share the columns of gate-up among them, and the rows of down. So each keeps its own
// columns of the rows x in registers, for all tasks.
constexpr int D_STEPS = (D / STEP + STREAMERS - 1) / STREAMERS, I_STEPS = I / STEP;
// Long rows of down are cut in two, for two streamers: four loads a task leave room to request two more.
constexpr int HALVES = I_STEPS > 4 && I_STEPS % 2 == 0 ? 2 : 1, I_PART = I_STEPS / HALVES;
constexpr int TEAM = STREAMERS / HALVES;
constexpr int ROOM = most(4, most(D_STEPS, I_PART));
// Tiles of 16 rows that a streamer has of one task.
constexpr int GATE_TILES = half_until(16, ROOM / D_STEPS);
constexpr int DOWN_TILES = gcd(half_until(16, ROOM / I_PART), D / STEP);
constexpr int LOADS = most(GATE_TILES * D_STEPS, DOWN_TILES * I_PART);
constexpr int AHEAD = LOADS > 4 ? 1 : 2;  // tasks whose weights are on their way, of 32 KiB each or more
// Scales that a lane gets with one load, four to a word.
constexpr int WORDS = gcd(gcd(D_STEPS, D / STEP), gcd(DOWN_TILES * I_PART, 4));

constexpr int GATE_ROWS = TILE * GATE_TILES;       // of gate-up in a task; half of them are gates
constexpr int COLUMNS = TEAM * TILE * DOWN_TILES;  // of the output in a down task
constexpr int SUMMED = 32;                         // columns of a sum task
constexpr int GATE_BLOCKS = 2 * I / GATE_ROWS, DOWN_BLOCKS = D / COLUMNS;

static_assert(D % STEP == 0 && I % STEP == 0 && GATE_BLOCKS * GATE_ROWS == 2 * I, "unsupported sizes");
static_assert(HALVES == 1 || DOWN_TILES == 1, "unsupported sizes");
static_assert(D_STEPS == 1 || D_STEPS * STREAMERS * STEP == D, "unsupported hidden size");

// The shared expert's product for a sum task: each streamer has a tile and a part of the columns, in steps of
// one product of the matrix unit.
constexpr int SUM_TILES = SUMMED / TILE, PARTS = STREAMERS / SUM_TILES;
constexpr int SHARED_STEPS = (SHARED / DEPTH + PARTS - 1) / PARTS;
static_assert(SHARED % DEPTH == 0, "unsupported size of the shared expert");

constexpr int HIDDEN_STRIDE = I + 8;  // so that rows begin in different banks

// ---- which experts there are

// The experts of this launch, in the LDS.
struct List {
  int experts[MAX_PAIRS], count;
};

// The experts in the order in which the pairs name them first. Each lane has the pairs `lane` and
// LANES + lane.
struct Routing {
  int id[2];       // E stands for all ids that are no expert's
  u64 present[2];  // lanes that have a pair
  int count;       // of different ids
};

// How many lanes below this one are in a mask.
INLINE int below(u64 mask) {
  return __builtin_amdgcn_mbcnt_hi((unsigned)(mask >> 32), __builtin_amdgcn_mbcnt_lo((unsigned)mask, 0));
}

// The lanes of `present` whose `other` is this lane's `id`, bit by bit.
INLINE u64 alike(int id, int other, u64 present) {
  u64 same = present;
#pragma unroll
  for (int bit = 1; bit <= E; bit *= 2) {
    u64 set = ballot(other & bit);
    same &= id & bit ? set : ~set;
  }
  return same;
}

// Also writes the list to the LDS, for all waves.
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

// Number u of the list.
INLINE int expert_at(const List& list, int u) { return __builtin_amdgcn_readfirstlane(list.experts[u]); }

INLINE int bounded(int expert) { return least(expert, E - 1); }

// ---- tasks

struct Task {
  bool down;
  int u, block;  // the expert's number in the list, and the block of its gate-up rows or output columns
};

INLINE Task task_at(int number, int count) {
  int gates = count * GATE_BLOCKS;
  if (number < gates) return {false, number / GATE_BLOCKS, number % GATE_BLOCKS};
  return {true, (number - gates) / DOWN_BLOCKS, (number - gates) % DOWN_BLOCKS};
}

// How many of the first `end` tasks are a workgroup's own.
INLINE int own(int end, int workgroup, int workgroups) {
  return end > workgroup ? (end - workgroup + workgroups - 1) / workgroups : 0;
}

// How many of a workgroup's tasks are gate-ups, these or downs, and all. The streamers' loop does some
// tasks in each round and has one exit, for the compiler's count of loads: `padded` is where it ends.
struct Shares {
  int gates, downs, sums, padded;
};

INLINE Shares shares(int count, int workgroup, int workgroups) {
  int products = count * (GATE_BLOCKS + DOWN_BLOCKS), downs = own(products, workgroup, workgroups);
  return {own(count * GATE_BLOCKS, workgroup, workgroups), downs,
          own(products + D / SUMMED, workgroup, workgroups), (downs + AHEAD) / (AHEAD + 1) * (AHEAD + 1)};
}

}  // namespace
