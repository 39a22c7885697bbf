// The router of 1 to 8 rows in one launch, for gfx950: its logits, the shared expert's gate and gate-up
// product beside them, softmax, and the choice of experts.
//
// A workgroup has one tile of 16 rows of the weight and one part of their columns (a split). Its streamers
// share these columns, and request all of their weights at once, before anything else. The messenger adds
// their sums, writes them to memory and counts the workgroup.
//
// No workgroup waits for another one. The last to be counted chooses the experts: one wave for each row.
// The counter only grows: one launch raises it by the number of workgroups, so the last one finds a
// multiple of it.
//
// Every sum has one order that depends neither on the other rows, which are other columns of the matrix
// unit, nor on who is last.

#include "common.h"

// The sizes of the model's slice, which the build gives with -D. These are one of 8 ranks of the 397B's.
#ifndef HIDDEN_SIZE
#define HIDDEN_SIZE 4096
#define COLUMNS 769
#define EXPERTS 512
#define TOP_K 10
#define NORMALISED 1
#endif

namespace {

constexpr int D = HIDDEN_SIZE, N = COLUMNS, E = EXPERTS;
constexpr int STEPS = D / DEPTH;  // products of the matrix unit along a row
constexpr int MOST = 32 / STREAMERS;  // of them that a streamer has, with a load of 16 bytes a lane each
constexpr int SPLITS = (STEPS + MOST * STREAMERS - 1) / (MOST * STREAMERS);
constexpr int OWN = (STEPS + SPLITS * STREAMERS - 1) / (SPLITS * STREAMERS);
constexpr bool EVEN = SPLITS * STREAMERS * OWN == STEPS;
constexpr int TILES = (N + TILE - 1) / TILE;
constexpr int EACH = (E + LANES - 1) / LANES;  // experts of a lane, when a wave chooses for a row

static_assert(TILE == 2 * LANES / MAX_ROWS, "a lane adds two columns");
static_assert(D % DEPTH == 0 && E <= N && TOP_K <= E && TOP_K <= LANES, "unsupported sizes");

struct alignas(16) Shared {  // as lanes write several sums at once
  float sums[STREAMERS][MAX_ROWS][TILE];
  int last;  // whether this workgroup is
};

struct Arguments {
  const __bf16* x;       // [rows, D]
  const float* squares;  // [parts, 16]: sums of the rows' squares, if x is to be normalised
  const __bf16* weight;  // [N, D]: E rows for the logits, then the shared expert's
  float* sums;           // [SPLITS, rows, N]
  u64* counter;          // 0 before the first launch
  int* experts;          // [rows, TOP_K]
  float* weights;        // [rows, TOP_K]
  int rows, parts;
  float eps;
};

// ---- the product

INLINE void stream(Shared& lds, const Arguments& a, int tile, int split, int wave, int lane) {
  int column = PLACE(lane), group = GROUP(lane), first = (split * STREAMERS + wave) * OWN;
  // Rows of a last tile that is not full are the last row again, whose results nobody writes.
  const __bf16* line = a.weight + (long)least(tile * TILE + column, N - 1) * D + first * DEPTH + group * 8;
  const __bf16* row = a.x + (long)column * D + first * DEPTH + group * 8;
  bf16x8 w[OWN] = {}, x[OWN] = {};
#pragma unroll
  for (int s = 0; s < OWN; s++)
    if (EVEN || first + s < STEPS) w[s] = *(const bf16x8*)(line + s * DEPTH);
  __builtin_amdgcn_sched_barrier(0);  // so that no weight waits for a row
  if (column < a.rows) {  // zeros in columns of the matrix unit beyond the rows
#pragma unroll
    for (int s = 0; s < OWN; s++)
      if (EVEN || first + s < STEPS) x[s] = *(const bf16x8*)(row + s * DEPTH);
  }
  Sums acc = {};
#pragma unroll
  for (int s = 0; s < OWN; s++) acc = __builtin_amdgcn_mfma_f32_16x16x32_bf16(w[s], x[s], acc, 0, 0, 0);
  if (column < MAX_ROWS) *(Sums*)&lds.sums[wave][column][SUMS * group] = acc;
}

// Lane l has row l % 8 and two columns of the tile.
INLINE void publish(const Shared& lds, const Arguments& a, float inverse, int tile, int split, int lane) {
  int row = lane % MAX_ROWS, pair = lane / MAX_ROWS * 2;
  f32x2 sum = {};
#pragma unroll
  for (int wave = 0; wave < STREAMERS; wave++) sum += *(const f32x2*)&lds.sums[wave][row][pair];
  if (row >= a.rows) return;
  float* to = a.sums + ((long)split * a.rows + row) * N;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    int column = tile * TILE + pair + c;
    if (column < N) to[column] = sum[c] * inverse;
  }
}

// Whether all workgroups but this one have been counted before.
INLINE bool is_last(u64* counter, int lane) {
  // The fence waits until this wave's stores, all of this workgroup's, are where other XCDs see them.
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");
  u64 before = 0;
  if (lane == 0) before = __hip_atomic_fetch_add(counter, 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  return lane == 0 && (before + 1) % (TILES * SPLITS) == 0;
}

// ---- the choice

// Data-parallel primitives: a lane reads the one so many places before it in its row of 16; rows 1 and 3
// read the last lane of the row before; rows 2 and 3 lane 31. Then masks of rows and of banks.
constexpr int ROW_SHR = 0x110, ROW_BCAST_15 = 0x142, ROW_BCAST_31 = 0x143, ALL = 15;

// All lanes' values as one, in one order: neighbours first. combine(v, nothing) is v.
template <class T, class Combine>
INLINE T folded(T value, T nothing, Combine combine) {
  int none = __builtin_bit_cast(int, nothing);
  auto with = [&](int moved) { value = combine(value, __builtin_bit_cast(T, moved)); };
  auto bits = [&] { return __builtin_bit_cast(int, value); };
  // Within each row of 16 lanes, then from row to row: the last lane has all.
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_SHR + 1, ALL, ALL, false));
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_SHR + 2, ALL, ALL, false));
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_SHR + 4, ALL, ALL, false));
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_SHR + 8, ALL, ALL, false));
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_BCAST_15, 0b1010, ALL, false));
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_BCAST_31, 0b1100, ALL, false));
  return __builtin_bit_cast(T, __builtin_amdgcn_readlane(bits(), LANES - 1));
}

// A row's logits of a lane's experts, rounded as the reference's are, so that the same ones tie.
INLINE void logits(float (&of)[EACH], const Arguments& a, int row, int lane) {
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int expert = lane * EACH + i;
    float sum = 0;
#pragma unroll
    for (int split = 0; split < SPLITS; split++)
      sum += a.sums[((long)split * a.rows + row) * N + least(expert, E - 1)];
    of[i] = expert < E ? (float)(__bf16)sum : -__builtin_inff();
  }
}

// Softmax, then the TOP_K largest; ties go to the lower index.
INLINE void choose(const Arguments& a, int row, int lane) {
  float p[EACH];
  logits(p, a, row, lane);
  float largest = p[0], sum = 0;
#pragma unroll
  for (int i = 1; i < EACH; i++) largest = __builtin_fmaxf(largest, p[i]);
  largest = folded(largest, -__builtin_inff(), [](float x, float y) { return __builtin_fmaxf(x, y); });
#pragma unroll
  for (int i = 0; i < EACH; i++) sum += p[i] = __builtin_elementwise_exp(p[i] - largest);
  sum = folded(sum, 0.0f, [](float x, float y) { return x + y; });
  // Numbers that are not negative are ordered as their bits are; a chosen expert gets 0, which is below
  // them. Experts that are not there have the lowest probability and the highest numbers. One NaN makes
  // every probability of its row NaN, of either sign: all get the same key and tie, so the experts are
  // distinct and in range, and their weights NaN.
  unsigned keys[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    p[i] /= sum;
    keys[i] = 1 + (p[i] == p[i] ? __builtin_bit_cast(unsigned, p[i]) : 0x7fc00000);
  }
  int expert = 0;
  float share = 0, total = 0;
#pragma unroll 1
  for (int slot = 0; slot < TOP_K; slot++) {
    unsigned best = keys[0];
#pragma unroll
    for (int i = 1; i < EACH; i++) best = best < keys[i] ? keys[i] : best;
    best = folded(best, 0u, [](unsigned x, unsigned y) { return x < y ? y : x; });
    int own = EACH;  // the first of this lane's experts that has it
#pragma unroll
    for (int i = EACH - 1; i >= 0; i--) own = keys[i] == best ? i : own;
    int holder = __builtin_ctzll(ballot(own < EACH));
    int found = holder * EACH + __builtin_amdgcn_readlane(own, holder);
#pragma unroll
    for (int i = 0; i < EACH; i++) keys[i] = lane * EACH + i == found ? 0 : keys[i];
    float value = __builtin_bit_cast(float, best - 1);
    total += value;
    expert = lane == slot ? found : expert;
    share = lane == slot ? value : share;
  }
  if (lane < TOP_K) {
    a.experts[row * TOP_K + lane] = expert;
    a.weights[row * TOP_K + lane] = NORMALISED ? share / total : share;
  }
}

}  // namespace

extern "C" __global__ WORKGROUP(LANES * (STREAMERS + 1)) void router(
    const __bf16* __restrict__ x, const float* __restrict__ squares, const __bf16* __restrict__ weight,
    float* sums, u64* counter, int* experts, float* weights, int rows, int parts, float eps) {
  IN_LDS(Shared, lds);
  Arguments a = {x, squares, weight, sums, counter, experts, weights, rows, parts, eps};
  int thread = __builtin_amdgcn_workitem_id_x();
  int tile = __builtin_amdgcn_workgroup_id_x(), split = __builtin_amdgcn_workgroup_id_y();
  int lane = thread % LANES, wave = __builtin_amdgcn_readfirstlane(thread / LANES);
  if (wave == MESSENGER) {
    float inverse = inverse_rms(a.squares, a.parts, D, a.eps, lane);  // while the weights are on their way
    meet();  // the streamers' sums are there
    publish(lds, a, inverse, tile, split, lane);
    bool last = is_last(a.counter, lane);
    if (lane == 0) lds.last = last;
  } else {
    stream(lds, a, tile, split, wave, lane);
    meet();
  }
  meet();  // the messenger knows whether this workgroup is the last
  if (wave >= rows || !__builtin_amdgcn_readfirstlane(lds.last)) return;
  // Drops what this CU and this XCD have cached, so that the other workgroups' sums are read.
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");
  choose(a, wave, lane);
}

#ifdef PORT
extern "C" __device__ int router_lds = PORT_LDS + sizeof(Shared);
#endif
