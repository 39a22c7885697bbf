// The experts of 1 to 8 rows in one launch, for gfx950: gate-up, SiLU, down, and the weighted sum. A shared
// expert, whose gate and gate-up product the router's launch has computed, may be added.
//
// The grid is persistent: it has no more workgroups than the card runs at once, because they wait for each
// other, and a workgroup that has no place yet cannot be waited for. All work is a list of tasks in one
// order, and workgroup w does tasks w, w + workgroups, and so on:
//
//   gate-up  some rows of one expert's gate and up -> hidden. It waits for nothing.
//   down     some columns of one expert's output -> partial. It waits for all gate-ups of its expert.
//   sum      some columns of the output -> out. It waits for the downs of these columns, of all experts. The
//            shared expert's down product needs none of them, so it comes before the wait.
//
// A task waits only for kinds of task that come before its own in the list, and every workgroup does its tasks
// in order. So the first task of the list that is not done has nothing left to wait for: there is no deadlock.
//
// To wait is to read a counter in memory until it has reached a number. No counter is ever set back: each
// launch, called an epoch, raises each counter by the same amount, whatever the rows chose. That amount
// times the number of launches is what a task waits for. Each counter has a cache line of its own, so that
// raising one does not disturb those who read another.
//
// At entry i of a workgroup's own tasks the streamers compute task i, while the messenger publishes task i - 1
// and fetches what task i + 1 needs; then all nine waves meet at a barrier. So whatever they pass each other
// in the LDS has two buffers, and entry i uses buffer i % 2. Between two kinds of task there is one more entry,
// in which the streamers have no task: in it the messenger publishes the last task of one kind, and only then
// waits for what the next kind needs. Otherwise a workgroup could wait for a task of its own that it has not
// published.
//
// Streamers request a task's weights two tasks (or one) ahead, and no wait or barrier on the way makes them wait
// for these: they store nothing to memory before the sums, and the barriers wait for the LDS alone (common.h).
//
// Every sum has one order, which depends neither on the other rows, which are other columns of the matrix
// unit, nor on the grid or on who is first. A row's shares are added in the order of its slots.

#include "moe_plan.h"

namespace {

// What the waves of a workgroup pass each other. Arrays begin at multiples of 16 bytes, since lanes read and
// write 16 bytes at once.
struct alignas(16) Shared {
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

// ---- counters, by what raises them: gate-ups of the list's expert u, downs of a block of columns, and launches

INLINE u64* arrived(const Arguments& a, int u) { return a.counters + u * LINE; }
INLINE u64* stored(const Arguments& a, int block) { return a.counters + (MAX_PAIRS + block) * LINE; }
INLINE u64* epoch(const Arguments& a, int workgroup) {
  return a.counters + (MAX_PAIRS + DOWN_BLOCKS + workgroup) * LINE;
}

// ---- streamers

typedef __amdgpu_buffer_rsrc_t Buffer;

struct Weights {
  u32x4 codes[LOADS];
  unsigned scales[LOADS];  // those of all four groups of a lane's row, a byte each
};

// A buffer descriptor of a task's weights. Past the last task its size is 0: loads then return zeros and ask
// memory for nothing.
INLINE Buffer buffer(const u8* at, int bytes) {
  return __builtin_amdgcn_make_buffer_rsrc((void*)at, 0, bytes, 0x27000);
}

// Requests a task's weights. Every call issues the same number of loads, whatever the task is. So the compiler
// knows how many loads are on their way behind those that a task needs, and waits for the older ones alone
// (vmcnt(n), not vmcnt(0)).
INLINE void request(
    Weights& w, const Shared& lds, const Arguments& a, int number, int count, int wave, int lane) {
  bool real = number < count * (GATE_BLOCKS + DOWN_BLOCKS);
  Task task = task_at(real ? number : 0, count);
  int row = PLACE(lane), group = GROUP(lane), half = wave / TEAM;
  // A streamer without columns of its own reads the first ones, and multiplies them by zeros.
  int step = D_STEPS * wave < D / STEP ? D_STEPS * wave : 0;
  // In down, the tile t of a lane has row DOWN_TILES * row + t: so the scales of its tiles lie side by side.
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
  __builtin_amdgcn_sched_barrier(0);  // The compiler may not move a request behind the work that follows.
}

// The two elements in byte B of a word of codes, with their group's scale.
template <int B>
INLINE bf16x2 decoded(unsigned codes, float scale) {
  return __builtin_amdgcn_cvt_scalef32_pk_bf16_fp4(codes, scale, B);
}

// Returns acc + the product of 16 rows of weights and 16 rows of x, over 32 columns of a step.
INLINE Sums product(unsigned codes, float scale, bf16x8 x, Sums acc) {
  bf16x2 a = decoded<0>(codes, scale), b = decoded<1>(codes, scale);
  bf16x2 c = decoded<2>(codes, scale), d = decoded<3>(codes, scale);
  bf16x8 w = {a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]};
  return __builtin_amdgcn_mfma_f32_16x16x32_bf16(w, x, acc, 0, 0, 0);
}

// The scale of a lane's group in load l: 2^(code - 127), which is the float whose exponent field is the code.
INLINE float scale_of(const Weights& w, int l, int group) {
  return __builtin_bit_cast(float, (w.scales[l] >> 8 * group & 255) << 23);
}

// A streamer's part of a gate-up task: the sums over its own columns, for all tiles, to the LDS.
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

// A streamer's part of a down task: its own rows of the weight, or half of their columns, to the LDS. The
// messenger has fetched the hidden rows.
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

// The sum over all splits of one column of the router's product.
INLINE float routed(const Arguments& a, int row, int column) {
  float sum = 0;
  for (int split = 0; split < a.splits; split++)
    sum += a.routed[((long)split * a.rows + row) * a.routed_width + column];
  return sum;
}

// A streamer's part of the shared expert's down product, for the columns of one sum task, to the LDS.
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

// The sum of a row's shares, for one column a lane and two rows a wave: in the order of the slots, then the
// shared expert, then the residual.
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
    for (int b = 0; b <= AHEAD; b++) {  // This is unrolled: only so are all w[b] registers that stay in place.
      int i = first + b;
      if (i == own.gates) meet();  // the entry without a task, between gate-ups and downs
      request(w[(b + AHEAD) % (AHEAD + 1)], lds, a, number(i + AHEAD), count, wave, lane);
      if (i < own.gates)
        gate_task(lds, i % 2, w[b], x, wave, lane);
      else if (i < own.downs)
        down_task(lds, i % 2, w[b], a.rows, wave, lane);
      meet();
    }
  }
  if (own.gates == own.padded) meet();  // the same one, where the loop has ended before it
}

INLINE void stream(Shared& lds, const Arguments& a, int workgroup, int wave, int lane) {
  int column = PLACE(lane), group = GROUP(lane);
  // Rows of x beyond the last one are zeros, and so is all of x for a streamer without columns.
  bf16x8 x[D_STEPS][4] = {};
  if (column < a.rows && D_STEPS * wave < D / STEP) {
    const __bf16* from = a.x + (long)column * D + wave * D_STEPS * STEP + group * 32;
#pragma unroll
    for (int s = 0; s < D_STEPS; s++)
#pragma unroll
      for (int j = 0; j < 4; j++) x[s][j] = *(const bf16x8*)(from + s * STEP + 8 * j);
  }
  meet();  // the messenger has written the list
  int count = __builtin_amdgcn_readfirstlane(lds.list.count);
  Shares own = shares(count, workgroup, a.workgroups);
  stream_products(lds, a, x, count, own, workgroup, wave, lane);
  auto block = [&](int i) { return workgroup + i * a.workgroups - count * (GATE_BLOCKS + DOWN_BLOCKS); };
  if (SHARED && own.downs < own.sums) shared_task(lds, own.downs % 2, a, block(own.downs), wave, lane);
  meet();  // the entry without a task, between downs and sums
  for (int i = own.downs; i < own.sums; i++) {
    // The messenger has waited for these columns and dropped what this CU had cached. This fence keeps the
    // loads of the sum behind the barrier, so that they come after that.
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
    sum_task(lds, i % 2, a, block(i), wave, lane);
    if (SHARED && i + 1 < own.sums) shared_task(lds, (i + 1) % 2, a, block(i + 1), wave, lane);
    meet();
  }
}

// ---- the messenger

// Writes hidden = silu(gate) * up of a gate-up task, and announces it. Lane l has row l % 8 and, of each tile,
// the pair l / 8 of gate and up, whose sums it adds in the order of the streamers.
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

// Waits for the hidden rows of a down task's expert, and brings them to the LDS.
INLINE void fetch(Shared& lds, int buffer, const Arguments& a, Task task, u64 epochs, int lane) {
  wait_for(arrived(a, task.u), epochs * GATE_BLOCKS);
  const __bf16* from = a.hidden + (long)task.u * MAX_ROWS * I;
  for (int i = lane * 8; i < a.rows * I; i += LANES * 8)
    *(u32x4*)&lds.hidden[buffer][i / I][i % I] = *(const u32x4*)(from + i);
}

// Writes a down task's columns for each pair that chose its expert, and announces them.
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

// Computes the shared expert's silu(gate) * up, in each workgroup that has a sum task.
INLINE void activate(Shared& lds, const Arguments& a, int lane) {
  for (int i = lane; i < a.rows * SHARED; i += LANES) {
    int row = i / most(SHARED, 1), column = i % most(SHARED, 1);
    float gate = routed(a, row, E + 1 + column), up = routed(a, row, E + 1 + SHARED + column);
    lds.activated[row][column] = (__bf16)(gate / (1 + __builtin_elementwise_exp(-gate)) * up);
  }
}

// All that the messenger does. It meets the streamers as often as `stream` does.
INLINE void carry(Shared& lds, const Arguments& a, int workgroup, int lane) {
  Routing r = routing(lds.list, a.experts, a.rows * TOP_K, lane);
  meet();  // The streamers may read the list from here on.
  auto [gates, downs, sums, padded] = shares(r.count, workgroup, a.workgroups);
  // Nobody else touches this counter, which counts this workgroup's launches: an ordinary load will do.
  u64 epochs = *epoch(a, workgroup) + 1;
  float inverse = inverse_rms(a.squares, a.parts, D, a.eps, lane);
  auto task = [&](int i) { return task_at(workgroup + i * a.workgroups, r.count); };
  auto wait_for_columns = [&](int i) {
    int block = workgroup + i * a.workgroups - r.count * (GATE_BLOCKS + DOWN_BLOCKS);
    wait_for(stored(a, block * SUMMED / COLUMNS), epochs * MAX_PAIRS);
  };
  // Every counter has to grow by the same amount in each launch, as if the list had MAX_PAIRS experts.
  // Workgroup 0 raises them for those that it lacks. There is nothing to release: no data belong to these.
  if (workgroup == 0) {
    for (int u = r.count + lane; u < MAX_PAIRS; u += LANES) add(arrived(a, u), GATE_BLOCKS);
    for (int b = lane; b < DOWN_BLOCKS; b += LANES) add(stored(a, b), MAX_PAIRS - r.count);
  }
  if (SHARED && downs < sums) activate(lds, a, lane);  // while the streamers' first weights are on their way
  // Gate-ups. They wait for nothing, so there is nothing to fetch.
  for (int i = 0; i < gates; i++) {
    if (i > 0) publish_gate(lds, (i - 1) % 2, a, task(i - 1), inverse, lane);
    meet();
  }
  if (gates > 0) publish_gate(lds, (gates - 1) % 2, a, task(gates - 1), inverse, lane);
  // The entry without a task: all own gate-ups are published before the first wait.
  if (gates < downs) fetch(lds, gates % 2, a, task(gates), epochs, lane);
  meet();
  // Downs. To wait for task i + 1 before task i - 1 is published is safe: only sums wait for downs.
  for (int i = gates; i < padded; i++) {
    if (i + 1 < downs) fetch(lds, (i + 1) % 2, a, task(i + 1), epochs, lane);
    if (gates < i && i <= downs) publish_down(lds, (i - 1) % 2, a, r, task(i - 1), lane);
    meet();
  }
  if (gates < downs && downs == padded) publish_down(lds, (downs - 1) % 2, a, r, task(downs - 1), lane);
  // The entry without a task: all own downs are published before the first wait for columns.
  if (downs < sums) wait_for_columns(downs);
  meet();
  // Sums, which the streamers write themselves.
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
