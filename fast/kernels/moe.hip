// The experts of 1 to 8 rows in one launch, for gfx950: gate-up, SiLU, down, and the weighted sum. A shared
// expert, whose gate and up the router's launch has computed, may be added.
//
// The grid is what fits on the card at once. Its workgroups wait for each other, so every one of them must
// be running. All work is a list of tasks in one order, and workgroup w does tasks w, w + workgroups, ...:
//
//   gate-up  some rows of one expert's gate and up -> hidden. Waits for nothing.
//   down     some columns of one expert's output -> partial. Waits for the whole hidden row of its expert.
//   sum      some columns of the output -> out. Waits for these columns of all experts. The shared
//            expert's down product comes before the wait.
//
// A task waits only for kinds of task that come before its own, and every workgroup does its tasks in
// order, so there is always one that can go on. Waiting is for a counter in memory to reach a number.
// Counters only grow: one launch, called an epoch, raises each by the same amount, whatever the rows chose.
// Each has a cache line of its own.
//
// A workgroup has nine waves. Eight stream weights, and speak to memory for nothing else: their queue of
// loads is always full, and nothing that they wait for is behind a store. The ninth, the messenger, writes
// their results to memory, raises and watches counters, and brings hidden rows. At entry i of a
// workgroup's list the streamers compute task i, the messenger publishes task i - 1 and fetches what
// task i + 1 needs; then all meet at a barrier. Between two kinds of task is an entry without a
// task, in which the messenger publishes the last task of one kind before it waits for the other.
//
// Every sum has one order that depends neither on the other rows, which are other columns of the matrix
// unit, nor on the grid or on who is first. A row's shares are added in the order of its slots.

#include "moe_plan.h"

namespace {

struct alignas(16) Shared {  // with arrays at multiples of 16 bytes, which is what lanes read and write at once
  float gate[2][STREAMERS][GATE_TILES][MAX_ROWS][TILE];  // sums over a streamer's columns
  float down[2][HALVES][MAX_ROWS][COLUMNS];
  __bf16 hidden[2][MAX_ROWS][HIDDEN_STRIDE];
  __bf16 activated[MAX_ROWS][SHARED + 8];  // the shared expert's silu(gate) * up
  float shared[2][PARTS][MAX_ROWS][SUMMED];
  List list;
};

struct Arguments {
  const __bf16* x;          // [rows, D]
  const float* squares;     // [parts, 16]: sums of the rows' squares, if x is to be normalised
  const int* experts;       // [rows, TOP_K]; an id that is no expert's makes its row NaN
  const float* weights;     // [rows, TOP_K]
  const u8* gate_up;        // [E, 2 I, D / 2]: gate row 0, up row 0, gate row 1, ...
  const u8* gate_up_scale;  // [E, 2 I, D / 32]
  const u8* down;           // [E, D, I / 2]
  const u8* down_scale;     // [E, D, I / 32]
  const __bf16* residual;   // [rows, D], or null
  const __bf16* next_norm;  // [D], or null if no norm follows
  __bf16* hidden;           // [rows * TOP_K, 8, I], scratch
  float* partial;           // [rows * TOP_K, D], scratch
  u64* counters;            // [MAX_PAIRS + DOWN_BLOCKS + workgroups, 16], zeros before the first launch
  __bf16* out;              // [rows, D]
  __bf16* scaled;           // [rows, D]: out * (1 + next_norm)
  float* out_squares;       // [D / 32, 16]: sums of out's squares
  // The shared expert: columns E (its gate), E + 1 on (gates), E + 1 + SHARED on (ups) of the router's
  // product, a sum over `splits`.
  const float* routed;        // [splits, rows, routed_width]
  const __bf16* shared_down;  // [D, SHARED]
  int rows, parts, workgroups, splits, routed_width;
  float eps;
};

// ---- counters

INLINE u64* arrived(const Arguments& a, int u) { return a.counters + u * LINE; }
INLINE u64* stored(const Arguments& a, int block) { return a.counters + (MAX_PAIRS + block) * LINE; }
INLINE u64* epoch(const Arguments& a, int workgroup) {
  return a.counters + (MAX_PAIRS + DOWN_BLOCKS + workgroup) * LINE;
}

// ---- streamers

typedef __amdgpu_buffer_rsrc_t Buffer;

struct Weights {
  u32x4 codes[LOADS];
  unsigned scales[LOADS];  // of a lane's row: those of all four groups
};

// A task's weights as buffers, whose size is 0 past the last task: their loads then ask memory for nothing.
INLINE Buffer buffer(const u8* at, int bytes) {
  return __builtin_amdgcn_make_buffer_rsrc((void*)at, 0, bytes, 0x27000);
}

// Request a task's weights. Every call is the same loads whatever the task, so that the compiler can count
// how many are on their way behind those that it waits for.
INLINE void request(
    Weights& w, const Shared& lds, const Arguments& a, int number, int count, int wave, int lane) {
  bool real = number < count * (GATE_BLOCKS + DOWN_BLOCKS);
  Task task = task_at(real ? number : 0, count);
  int row = PLACE(lane), group = GROUP(lane), half = wave / TEAM;
  int step = D_STEPS * wave < D / STEP ? D_STEPS * wave : 0;  // one without columns reads some
  // Row t of a lane's tiles of down is row DOWN_TILES * row + t: then its scales lie in one piece.
  long first = task.down ? task.block * COLUMNS + wave % TEAM * TILE * DOWN_TILES : task.block * GATE_ROWS;
  first += (long)bounded(expert_at(lds.list, task.u)) * (task.down ? D : 2 * I);
  const u8* codes = task.down
      ? a.down + first * (I / 2) + half * I_PART * (STEP / 2)
      : a.gate_up + first * (D / 2) + step * (STEP / 2);
  const u8* scales = task.down
      ? a.down_scale + first * (I / 32) + half * I_PART * 4
      : a.gate_up_scale + first * (D / 32) + step * 4;
  int bytes = task.down
      ? DOWN_TILES * TILE * (I / 2) - half * I_PART * (STEP / 2)
      : GATE_ROWS * (D / 2) - step * (STEP / 2);
  Buffer code_buffer = buffer(codes, real ? bytes : 0), scale_buffer = buffer(scales, real ? bytes / 16 : 0);
  int line = task.down ? DOWN_TILES * row * (I / 2) : row * (D / 2);
#pragma unroll
  for (int l = 0; l < LOADS; l++) {
    int gate = least(l / D_STEPS, GATE_TILES - 1) * TILE * (D / 2) + l % D_STEPS * (STEP / 2);
    int down = least(l / I_PART, DOWN_TILES - 1) * (I / 2) + l % I_PART * (STEP / 2);
    w.codes[l] = __builtin_amdgcn_raw_buffer_load_b128(
        code_buffer, line + group * 16, task.down ? down : gate, 0);
  }
#pragma unroll
  for (int l = 0; l < LOADS; l += WORDS) {
    int gate = least(l / D_STEPS, GATE_TILES - 1) * TILE * (D / 32) + l % D_STEPS * 4;
    int down = least(l, DOWN_TILES * I_PART - WORDS) * 4;
    int offset = task.down ? down : gate;
    if constexpr (WORDS == 4) {
      u32x4 some = __builtin_amdgcn_raw_buffer_load_b128(scale_buffer, line / 16, offset, 0);
      for (int i = 0; i < 4; i++) w.scales[l + i] = some[i];
    } else if constexpr (WORDS == 2) {
      u32x2 some = __builtin_amdgcn_raw_buffer_load_b64(scale_buffer, line / 16, offset, 0);
      for (int i = 0; i < 2; i++) w.scales[l + i] = some[i];
    } else {
      w.scales[l] = __builtin_amdgcn_raw_buffer_load_b32(scale_buffer, line / 16, offset, 0);
    }
  }
  __builtin_amdgcn_sched_barrier(0);  // so that no request slips behind the work that follows
}

// Byte B of a word of codes: two elements of a group.
template <int B>
INLINE bf16x2 decoded(unsigned codes, float scale) {
  return __builtin_amdgcn_cvt_scalef32_pk_bf16_fp4(codes, scale, B);
}

// acc + 16 rows of weights by 32 columns, times 32 by 16 columns of activations.
INLINE Sums product(unsigned codes, float scale, bf16x8 x, Sums acc) {
  bf16x2 a = decoded<0>(codes, scale), b = decoded<1>(codes, scale);
  bf16x2 c = decoded<2>(codes, scale), d = decoded<3>(codes, scale);
  bf16x8 w = {a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]};
  return __builtin_amdgcn_mfma_f32_16x16x32_bf16(w, x, acc, 0, 0, 0);
}

// The scale of a lane's group in load l: 2^(code - 127), a float that has the code for its exponent.
INLINE float scale_of(const Weights& w, int l, int group) {
  return __builtin_bit_cast(float, (w.scales[l] >> 8 * group & 255) << 23);
}

INLINE void gate_task(Shared& lds, int buffer, const Weights& w, const bf16x8 (&x)[D_STEPS][4], int wave, int lane) {
  int column = PLACE(lane), group = GROUP(lane);
#pragma unroll
  for (int t = 0; t < GATE_TILES; t++) {
    Sums acc = {};
#pragma unroll
    for (int s = 0; s < D_STEPS; s++) {
      int l = t * D_STEPS + s;
      float scale = scale_of(w, l, group);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        unsigned codes = w.codes[l][j];
        acc = product(codes, scale, x[s][j], acc);
      }
    }
    if (column < MAX_ROWS) *(Sums*)&lds.gate[buffer][wave][t][column][SUMS * group] = acc;
  }
}

INLINE void down_task(Shared& lds, int buffer, const Weights& w, int rows, int wave, int lane) {
  int column = PLACE(lane), group = GROUP(lane), half = wave / TEAM;
  const __bf16* hidden = lds.hidden[buffer][least(column, rows - 1)] + half * I_PART * STEP + group * 32;
  Sums acc[DOWN_TILES] = {};
#pragma unroll
  for (int s = 0; s < I_PART; s++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      bf16x8 x = *(const bf16x8*)(hidden + s * STEP + 8 * j);
#pragma unroll
      for (int t = 0; t < DOWN_TILES; t++) {
        unsigned codes = w.codes[t * I_PART + s][j];
        acc[t] = product(codes, scale_of(w, t * I_PART + s, group), x, acc[t]);
      }
    }
  }
  if (column < MAX_ROWS) {
    float* to = &lds.down[buffer][half][column][(wave % TEAM * TILE + SUMS * group) * DOWN_TILES];
#pragma unroll
    for (int r = 0; r < SUMS; r++)
#pragma unroll
      for (int t = 0; t < DOWN_TILES; t++) to[r * DOWN_TILES + t] = acc[t][r];
  }
}

// The sum over splits of one column of the router's product.
INLINE float routed(const Arguments& a, int row, int column) {
  float sum = 0;
  for (int split = 0; split < a.splits; split++)
    sum += a.routed[((long)split * a.rows + row) * a.routed_width + column];
  return sum;
}

// The shared expert's down product for some columns of the output.
INLINE void shared_task(Shared& lds, int buffer, const Arguments& a, int block, int wave, int lane) {
  int column = PLACE(lane), group = GROUP(lane), tile = wave % SUM_TILES, part = wave / SUM_TILES;
  long line = block * SUMMED + tile * TILE + column;
  const __bf16* x = lds.activated[least(column, a.rows - 1)] + group * 8;
  bf16x8 w[most(SHARED_STEPS, 1)];
#pragma unroll
  for (int s = 0; s < SHARED_STEPS; s++) {
    int k = (part * SHARED_STEPS + s) * DEPTH;
    if (k < SHARED) w[s] = *(const bf16x8*)(a.shared_down + line * SHARED + k + group * 8);
  }
  Sums acc = {};
#pragma unroll
  for (int s = 0; s < SHARED_STEPS; s++) {
    int k = (part * SHARED_STEPS + s) * DEPTH;
    if (k < SHARED) acc = __builtin_amdgcn_mfma_f32_16x16x32_bf16(w[s], *(const bf16x8*)(x + k), acc, 0, 0, 0);
  }
  if (column < MAX_ROWS) *(Sums*)&lds.shared[buffer][part][column][tile * TILE + SUMS * group] = acc;
}

// A row's shares of some columns, one column a lane and two rows a wave. They are added in the order of the
// slots.
INLINE void sum_task(const Shared& lds, int buffer, const Arguments& a, int block, int wave, int lane) {
  int row = wave * (LANES / SUMMED) + lane / SUMMED, inside = lane % SUMMED, column = block * SUMMED + inside;
  if (row >= a.rows) return;
  float total = 0;
#pragma unroll
  for (int slot = 0; slot < TOP_K; slot++) {
    int pair = row * TOP_K + slot;
    total += a.weights[pair] * a.partial[(long)pair * D + column];
  }
  if (SHARED) {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) sum += lds.shared[buffer][part][row][inside];
    total += sum / (1 + __builtin_elementwise_exp(-routed(a, row, E)));
  }
  long place = (long)row * D + column;
  if (a.residual) total += (float)a.residual[place];
  __bf16 rounded = (__bf16)total;
  a.out[place] = rounded;
  if (a.next_norm) {
    float kept = (float)rounded, square = kept * kept;
    a.scaled[place] = (__bf16)(kept * (1 + (float)a.next_norm[column]));
#pragma unroll
    for (int d = SUMMED / 2; d; d /= 2)
      square += __builtin_bit_cast(
          float, __builtin_amdgcn_ds_bpermute((lane ^ d) * 4, __builtin_bit_cast(int, square)));
    if (inside == 0) a.out_squares[block * SQUARES + row] = square;
  }
}

// All gate-up and down tasks of a workgroup, `count` experts in the list.
INLINE void stream_products(
    Shared& lds, const Arguments& a, const bf16x8 (&x)[D_STEPS][4], int count, Shares own, int workgroup,
    int wave, int lane) {
  auto number = [&](int i) { return workgroup + i * a.workgroups; };
  Weights w[AHEAD + 1];
#pragma unroll
  for (int i = 0; i < AHEAD; i++) request(w[i], lds, a, number(i), count, wave, lane);
  for (int first = 0; first < own.padded; first += AHEAD + 1) {
#pragma unroll
    for (int b = 0; b <= AHEAD; b++) {  // unrolled, so that w[b] are registers
      int i = first + b;
      if (i == own.gates) meet();
      request(w[(b + AHEAD) % (AHEAD + 1)], lds, a, number(i + AHEAD), count, wave, lane);
      if (i < own.gates)
        gate_task(lds, i % 2, w[b], x, wave, lane);
      else if (i < own.downs)
        down_task(lds, i % 2, w[b], a.rows, wave, lane);
      meet();
    }
  }
  if (own.gates == own.padded) meet();
}

INLINE void stream(Shared& lds, const Arguments& a, int workgroup, int wave, int lane) {
  int column = PLACE(lane), group = GROUP(lane);
  // Zeros in columns of the matrix unit beyond the rows, and for a streamer without columns of x.
  bf16x8 x[D_STEPS][4] = {};
  if (column < a.rows && D_STEPS * wave < D / STEP) {
    const __bf16* from = a.x + (long)column * D + wave * D_STEPS * STEP + group * 32;
#pragma unroll
    for (int s = 0; s < D_STEPS; s++)
#pragma unroll
      for (int j = 0; j < 4; j++) x[s][j] = *(const bf16x8*)(from + s * STEP + 8 * j);
  }
  meet();  // the list is there
  int count = __builtin_amdgcn_readfirstlane(lds.list.count);
  Shares own = shares(count, workgroup, a.workgroups);
  stream_products(lds, a, x, count, own, workgroup, wave, lane);
  auto block = [&](int i) { return workgroup + i * a.workgroups - count * (GATE_BLOCKS + DOWN_BLOCKS); };
  if (SHARED && own.downs < own.sums) shared_task(lds, own.downs % 2, a, block(own.downs), wave, lane);
  meet();
  for (int i = own.downs; i < own.sums; i++) {
    // The messenger has waited for these columns; this makes its view that of the whole workgroup.
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
    sum_task(lds, i % 2, a, block(i), wave, lane);
    if (SHARED && i + 1 < own.sums) shared_task(lds, (i + 1) % 2, a, block(i + 1), wave, lane);
    meet();
  }
}

// ---- the messenger

// hidden = silu(gate) * up. Lane l has row l % 8 and the (l / 8)-th pair of gate and up of each tile.
INLINE void publish_gate(
    Shared& lds, int buffer, const Arguments& a, Task task, float inverse, int lane) {
  int row = lane % MAX_ROWS, pair = lane / MAX_ROWS;
  bool known = expert_at(lds.list, task.u) < E;
#pragma unroll
  for (int t = 0; t < GATE_TILES; t++) {
    f32x2 sum = {};
#pragma unroll
    for (int wave = 0; wave < STREAMERS; wave++) sum += *(f32x2*)&lds.gate[buffer][wave][t][row][2 * pair];
    float gate = sum[0] * inverse, up = sum[1] * inverse;
    float activated = gate / (1 + __builtin_elementwise_exp(-gate)) * up;
    int i = (task.block * GATE_TILES + t) * TILE / 2 + pair;
    if (row < a.rows)
      a.hidden[((long)task.u * MAX_ROWS + row) * I + i] = (__bf16)(known ? activated : __builtin_nanf(""));
  }
  arrive(arrived(a, task.u), lane);
}

// Bring the hidden rows of a down task's expert to the LDS.
INLINE void fetch(Shared& lds, int buffer, const Arguments& a, Task task, u64 epochs, int lane) {
  wait_for(arrived(a, task.u), epochs * GATE_BLOCKS);
  const __bf16* from = a.hidden + (long)task.u * MAX_ROWS * I;
  for (int i = lane * 8; i < a.rows * I; i += LANES * 8)
    *(u32x4*)&lds.hidden[buffer][i / I][i % I] = *(const u32x4*)(from + i);
}

// Write a down task's columns for each pair that chose its expert.
INLINE void publish_down(Shared& lds, int buffer, const Arguments& a, const Routing& r, Task task, int lane) {
  int expert = expert_at(lds.list, task.u);
#pragma unroll
  for (int part = 0; part < 2; part++)
    for (u64 pairs = ballot(r.id[part] == expert) & r.present[part]; pairs; pairs &= pairs - 1) {
      int pair = part * LANES + __builtin_ctzll(pairs), row = pair / TOP_K;
      float* to = a.partial + (long)pair * D + task.block * COLUMNS;
      for (int c = lane * 4; c < COLUMNS; c += LANES * 4) {
        f32x4 sum = *(f32x4*)&lds.down[buffer][0][row][c];
        if (HALVES == 2) sum += *(f32x4*)&lds.down[buffer][HALVES - 1][row][c];
        *(f32x4*)(to + c) = sum;
      }
    }
  arrive(stored(a, task.block), lane);
}

// The shared expert's silu(gate) * up, for workgroups that have a sum task.
INLINE void activate(Shared& lds, const Arguments& a, int lane) {
  for (int i = lane; i < a.rows * SHARED; i += LANES) {
    int row = i / most(SHARED, 1), column = i % most(SHARED, 1);
    float gate = routed(a, row, E + 1 + column), up = routed(a, row, E + 1 + SHARED + column);
    lds.activated[row][column] = (__bf16)(gate / (1 + __builtin_elementwise_exp(-gate)) * up);
  }
}

INLINE void carry(Shared& lds, const Arguments& a, int workgroup, int lane) {
  Routing r = routing(lds.list, a.experts, a.rows * TOP_K, lane);
  meet();
  auto [gates, downs, sums, padded] = shares(r.count, workgroup, a.workgroups);
  // Nobody else touches this counter: it counts this workgroup's launches.
  u64 epochs = *epoch(a, workgroup) + 1;
  float inverse = inverse_rms(a.squares, a.parts, D, a.eps, lane);
  auto task = [&](int i) { return task_at(workgroup + i * a.workgroups, r.count); };
  auto wait_for_columns = [&](int i) {
    int block = workgroup + i * a.workgroups - r.count * (GATE_BLOCKS + DOWN_BLOCKS);
    wait_for(stored(a, block * SUMMED / COLUMNS), epochs * MAX_PAIRS);
  };
  if (workgroup == 0) {  // arrives for the experts that this list lacks
    for (int u = r.count + lane; u < MAX_PAIRS; u += LANES) add(arrived(a, u), GATE_BLOCKS);
    for (int b = lane; b < DOWN_BLOCKS; b += LANES) add(stored(a, b), MAX_PAIRS - r.count);
  }
  if (SHARED && downs < sums) activate(lds, a, lane);  // the streamers' first weights are on their way
  for (int i = 0; i < gates; i++) {
    if (i > 0) publish_gate(lds, (i - 1) % 2, a, task(i - 1), inverse, lane);
    meet();
  }
  if (gates > 0) publish_gate(lds, (gates - 1) % 2, a, task(gates - 1), inverse, lane);
  if (gates < downs) fetch(lds, gates % 2, a, task(gates), epochs, lane);
  meet();
  for (int i = gates; i < padded; i++) {
    if (i + 1 < downs) fetch(lds, (i + 1) % 2, a, task(i + 1), epochs, lane);
    if (gates < i && i <= downs) publish_down(lds, (i - 1) % 2, a, r, task(i - 1), lane);
    meet();
  }
  if (gates < downs && downs == padded) publish_down(lds, (downs - 1) % 2, a, r, task(downs - 1), lane);
  if (downs < sums) wait_for_columns(downs);
  meet();
  for (int i = downs; i < sums; i++) {
    if (i + 1 < sums) wait_for_columns(i + 1);
    meet();
  }
  if (lane == 0) *epoch(a, workgroup) = epochs;
}

}  // namespace

extern "C" __global__ WORKGROUP(LANES * (STREAMERS + 1)) void moe(
    const __bf16* __restrict__ x, const float* __restrict__ squares, const int* __restrict__ experts,
    const float* __restrict__ weights, const u8* __restrict__ gate_up, const u8* __restrict__ gate_up_scale,
    const u8* __restrict__ down, const u8* __restrict__ down_scale, const __bf16* __restrict__ residual,
    const __bf16* __restrict__ next_norm, __bf16* hidden, float* partial, u64* counters, __bf16* out,
    __bf16* scaled, float* out_squares, const float* __restrict__ routed,
    const __bf16* __restrict__ shared_down, int rows, int parts, int workgroups, int splits,
    int routed_width, float eps) {
  IN_LDS(Shared, lds);
  Arguments a = {x, squares, experts, weights, gate_up, gate_up_scale, down, down_scale, residual, next_norm,
                 hidden, partial, counters, out, scaled, out_squares, routed, shared_down,
                 rows, parts, workgroups, splits, routed_width, eps};
  int thread = __builtin_amdgcn_workitem_id_x(), workgroup = __builtin_amdgcn_workgroup_id_x();
  int lane = thread % LANES, wave = __builtin_amdgcn_readfirstlane(thread / LANES);
  if (wave == MESSENGER)
    carry(lds, a, workgroup, lane);
  else
    stream(lds, a, workgroup, wave, lane);
}

#ifdef PORT
extern "C" __device__ int moe_lds = PORT_LDS + sizeof(Shared);
#endif
