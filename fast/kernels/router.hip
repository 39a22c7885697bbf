// The router of 1 to 8 rows in one launch, for gfx950: its logits and, beside them, the shared expert's gate
// and gate-up product; then softmax and the choice of experts.
//
// A workgroup multiplies one tile of rows of the weight, over one part of their columns (a split). Its
// streamers share these columns, and each requests all of its weights at once, before anything else. The
// messenger adds their sums, writes them to memory and counts the workgroup.
//
// No workgroup waits for another one, so they need not run at the same time. The one that is counted last
// knows that all sums are in memory, and chooses the experts: one wave for each row. The counter is never
// set back: each launch raises it by the number of workgroups, so the last one of a launch makes it a
// multiple of that number.
//
// Every sum has one order, which depends neither on the other rows, which are other columns of the matrix
// unit, nor on who is last.

#include "common.h"

// The sizes of the model's slice, which the build gives with -D. The defaults are those of one of 8 ranks of
// the 397B.
#ifndef HIDDEN_SIZE
#define HIDDEN_SIZE 4096
#define COLUMNS 769
#define EXPERTS 512
#define TOP_K 10
#define NORMALISED 1
#endif

namespace {

constexpr int D = HIDDEN_SIZE, N = COLUMNS, E = EXPERTS;
constexpr int STEPS = D / DEPTH;      // products of the matrix unit along a row
constexpr int MOST = 32 / STREAMERS;  // the most products of a streamer; each takes a load of 16 bytes a lane
constexpr int SPLITS = (STEPS + MOST * STREAMERS - 1) / (MOST * STREAMERS);
constexpr int OWN = (STEPS + SPLITS * STREAMERS - 1) / (SPLITS * STREAMERS);
constexpr bool EVEN = SPLITS * STREAMERS * OWN == STEPS;
constexpr int TILES = (N + TILE - 1) / TILE;
constexpr int EACH = (E + LANES - 1) / LANES;  // experts of a lane, when a wave chooses for a row

static_assert(TILE == 2 * LANES / MAX_ROWS, "a lane adds two columns");
static_assert(D % DEPTH == 0 && E <= N && TOP_K <= E && TOP_K <= LANES, "unsupported sizes");

struct alignas(16) Shared {               // because lanes write several sums at once
  float sums[STREAMERS][MAX_ROWS][TILE];  // over a streamer's columns
  int last;                               // whether this workgroup was counted last
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

// A streamer's part of the product: the sums over its own columns, to the LDS.
INLINE void stream(Shared& lds, const Arguments& a, int tile, int split, int wave, int lane) {
  int column = PLACE(lane), group = GROUP(lane), first = (split * STREAMERS + wave) * OWN;
  // A last tile that is not full repeats the last row. Nobody writes those results.
  const __bf16* line = a.weight + (long)least(tile * TILE + column, N - 1) * D + first * DEPTH + group * 8;
  const __bf16* row = a.x + (long)column * D + first * DEPTH + group * 8;
  bf16x8 w[OWN] = {}, x[OWN] = {};
#pragma unroll
  for (int s = 0; s < OWN; s++)
    if (EVEN || first + s < STEPS) w[s] = *(const bf16x8*)(line + s * DEPTH);
  __builtin_amdgcn_sched_barrier(0);  // All weights are requested before the first row of x.
  if (column < a.rows) {              // Rows of x beyond the last one stay zeros.
#pragma unroll
    for (int s = 0; s < OWN; s++)
      if (EVEN || first + s < STEPS) x[s] = *(const bf16x8*)(row + s * DEPTH);
  }
  Sums acc = {};
#pragma unroll
  for (int s = 0; s < OWN; s++) acc = __builtin_amdgcn_mfma_f32_16x16x32_bf16(w[s], x[s], acc, 0, 0, 0);
  if (column < MAX_ROWS) *(Sums*)&lds.sums[wave][column][SUMS * group] = acc;
}

// Adds the streamers' sums in their order, and writes them. Lane l has row l % 8 and two columns of the tile.
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

// Counts this workgroup. Lane 0 returns whether it is the last one of this launch.
INLINE bool is_last(u64* counter, int lane) {
  // This wave has written all of this workgroup's sums. The fence writes this XCD's L2 back and waits for
  // that (buffer_wbl2 sc1, vmcnt(0)): whoever sees this workgroup counted finds them in memory.
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");
  u64 before = 0;
  if (lane == 0) before = __hip_atomic_fetch_add(counter, 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  return lane == 0 && (before + 1) % (TILES * SPLITS) == 0;
}

// ---- the choice

// Controls of data-parallel primitives (DPP), by which a lane reads a register of another lane. A row is 16 lanes.
constexpr int ROW_SHR = 0x110;       // plus n: the lane n places before it in its row
constexpr int ROW_BCAST_15 = 0x142;  // the last lane of the row before
constexpr int ROW_BCAST_31 = 0x143;  // lane 31
constexpr int ALL = 15;              // a mask of four rows, or of four banks in each row

// Combines all lanes' values in one order, neighbours first, and returns the result in every lane. A lane that
// reads from nowhere, or is not in the mask, gets `nothing`, and combine(v, nothing) is v.
template <class T, class Combine>
INLINE T folded(T value, T nothing, Combine combine) {
  int none = __builtin_bit_cast(int, nothing);
  auto with = [&](int moved) { value = combine(value, __builtin_bit_cast(T, moved)); };
  auto bits = [&] { return __builtin_bit_cast(int, value); };
  // First within each row, whose last lane then has all of it; then from row to row: the last lane has all.
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_SHR + 1, ALL, ALL, false));
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_SHR + 2, ALL, ALL, false));
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_SHR + 4, ALL, ALL, false));
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_SHR + 8, ALL, ALL, false));
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_BCAST_15, 0b1010, ALL, false));
  with(__builtin_amdgcn_update_dpp(none, bits(), ROW_BCAST_31, 0b1100, ALL, false));
  return __builtin_bit_cast(T, __builtin_amdgcn_readlane(bits(), LANES - 1));
}

// A row's logits of a lane's experts. They are rounded as the reference's are, so that the same ones tie.
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

// Softmax over a row's logits, then its TOP_K largest, largest first. Ties go to the lower index. A wave has the
// row, and lane l the experts EACH * l on.
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
  // Probabilities are not negative, and such floats are ordered as their bits are. So a key is the bits plus
  // 1, and a chosen expert's key becomes 0, which is below all others. Lanes beyond the last expert have
  // probability 0 and the highest numbers, so they are never chosen. One NaN makes every probability of its
  // row a NaN, of either sign. All NaNs have the same key: by their bits those beyond the last expert could
  // come first, which are inf - inf. So a row of NaN gets the first experts, and weights of NaN.
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
    int own = EACH;  // the first of this lane's experts with this key, or EACH
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
    // The messenger sums the squares while the streamers' weights are on their way.
    float inverse = inverse_rms(a.squares, a.parts, D, a.eps, lane);
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
  // The messenger's count had returned before the last barrier, so all workgroups' sums are in memory. This CU and
  // this XCD may have cached older ones: each wave that chooses drops these (buffer_inv sc1) before it loads.
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");
  choose(a, wave, lane);
}

#ifdef PORT
extern "C" __device__ int router_lds = PORT_LDS + sizeof(Shared);
#endif
