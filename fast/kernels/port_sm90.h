// What moe.hip and router.hip need to be built for an NVIDIA card (sm_90), by nvcc or NVRTC: for a check of how
// their workgroups wait for each other, which the compilers and the memory model of another vendor execute.
//
// A wave has 32 lanes here, and a product of the matrix unit 8 rows of weights, 8 rows of x and 32 columns.
// The barrier, the counters and the fences are those of the source, one for one; loads are ordinary ones, whose
// registers the hardware waits for when they are read; FP4 is decoded by moving bits.
//
// A wait that lasts longer than PATIENCE is given up: `port_stuck` tells which, and the launch ends.

#pragma once
#define PORT
#define PORT_INLINE static __device__ __forceinline__

#ifndef PATIENCE
#define PATIENCE 1000000000  // ns
#endif

// ---- numbers

struct port_bf16 {
  unsigned short bits;
  port_bf16() = default;
  __device__ __forceinline__ port_bf16(float x) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  }
  __device__ __forceinline__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
#define __bf16 port_bf16

template <typename T, int N>
struct alignas(sizeof(T) * N) port_vector {
  T at[N];
  __device__ __forceinline__ T& operator[](int i) { return at[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return at[i]; }
  __device__ __forceinline__ port_vector& operator+=(const port_vector& other) {
#pragma unroll
    for (int i = 0; i < N; i++) at[i] += other.at[i];
    return *this;
  }
};
typedef port_vector<float, 2> f32x2;
typedef port_vector<float, 4> f32x4;
typedef port_vector<unsigned, 2> u32x2;
typedef port_vector<unsigned, 4> u32x4;

struct bf16x2 {
  unsigned word;
  __device__ __forceinline__ port_bf16 operator[](int i) const {
    port_bf16 one;
    one.bits = (unsigned short)(word >> 16 * i);
    return one;
  }
};

struct alignas(16) bf16x8 {
  unsigned word[4];
  bf16x8() = default;
  __device__ __forceinline__ bf16x8(
      port_bf16 a, port_bf16 b, port_bf16 c, port_bf16 d, port_bf16 e, port_bf16 f, port_bf16 g, port_bf16 h)
      : word{pair(a, b), pair(c, d), pair(e, f), pair(g, h)} {}
  __device__ __forceinline__ static unsigned pair(port_bf16 low, port_bf16 high) {
    return low.bits | (unsigned)high.bits << 16;
  }
};

template <typename To, typename From>
PORT_INLINE To port_bits(From from) {
  static_assert(sizeof(To) == sizeof(From) && sizeof(To) == 4, "a word");
  union {
    From from;
    To to;
  } word = {from};
  return word.to;
}

#define __builtin_bit_cast(type, value) port_bits<type>(value)
#define __builtin_elementwise_exp(x) expf(x)
#define __builtin_fmaxf(x, y) fmaxf(x, y)
#define __builtin_inff() __uint_as_float(0x7f800000)
#define __builtin_sqrtf(x) sqrtf(x)
#define __builtin_nanf(text) __uint_as_float(0x7fc00000)
#define __builtin_popcountll(x) __popcll(x)
#define __builtin_ctzll(x) (__ffsll((long long)(x)) - 1)

// ---- a wave and its matrix unit

typedef f32x2 Sums;
constexpr int LANES = 32, STREAMERS = 16, TILE = 8, SUMS = 2;
#define PLACE(lane) (lane / 4)
#define GROUP(lane) (lane % 4)
#define WORKGROUP(threads) __launch_bounds__(threads, 1)

#define __builtin_amdgcn_workitem_id_x() ((int)threadIdx.x)
#define __builtin_amdgcn_workgroup_id_x() ((int)blockIdx.x)
#define __builtin_amdgcn_workgroup_id_y() ((int)blockIdx.y)
#define __builtin_amdgcn_readfirstlane(value) (value)  // all lanes have the same
#define __builtin_amdgcn_ballot_w64(value) ((unsigned long long)__ballot_sync(~0u, value))
#define __builtin_amdgcn_mbcnt_lo(mask, before) (before + __popc(mask & port_lanes_below()))
#define __builtin_amdgcn_mbcnt_hi(mask, before) (before)
#define __builtin_amdgcn_ds_bpermute(address, value) __shfl_sync(~0u, value, (address) / 4)
#define __builtin_amdgcn_readlane(value, lane) __shfl_sync(~0u, value, lane)
#define __builtin_amdgcn_sched_barrier(mask)

PORT_INLINE unsigned port_lanes_below() {
  unsigned mask;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
  return mask;
}

// What a lane reads of another one by a data-parallel primitive of gfx950: of the lane so many places before it in
// its row of 16 (control 0x110 + places), or of the last lane of the row before its own (0x142). It gets `old` if
// there is no such lane, or if `rows` lacks the bit of its row. Rows 2 and 3, which read lane 31 (0x143), are not
// there in a wave of 32 lanes.
PORT_INLINE int port_dpp(int old, int value, int control, int rows) {
  int lane = threadIdx.x % LANES, row = lane / 16;
  int from = control == 0x142 || control == 0x143 ? row * 16 - 1 : lane - control % 16;
  int first = control == 0x142 || control == 0x143 ? 0 : row * 16;
  bool read = rows >> row & 1 && from >= first;
  int other = __shfl_sync(~0u, value, read ? from : lane);
  return read ? other : old;
}
#define __builtin_amdgcn_update_dpp(old, value, control, rows, banks, bound) port_dpp(old, value, control, rows)

// Two codes of 4 bits times a power of two, exactly. The 3 bits of a code's size are the lowest two of bf16's exponent and
// the highest of its mantissa: then they count in units of 2^-126, and so does 0.5, which has no leading one.
PORT_INLINE bf16x2 port_fp4(unsigned codes, float scale, int byte) {
  unsigned two = codes >> 8 * byte;
  unsigned sizes = (two & 7) << 6 | (two & 0x70) << 18, signs = (two & 8) << 12 | (two & 0x80) << 24;
  unsigned unit = 0x7e807e80, times = __float_as_uint(scale) >> 16, out;  // 2^126, 2^126
  times |= times << 16;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(sizes | signs), "r"(unit));
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(out), "r"(times));
  return {out};
}
#define __builtin_amdgcn_cvt_scalef32_pk_bf16_fp4(codes, scale, byte) port_fp4(codes, scale, byte)

// Lane l has 8 columns of row l / 4 of the weights w and of the rows x; the order of the columns is the same in
// both, so it does not matter. x is the unit's first operand, whose rows 8 to 15 are zeros. Lane l gets
// the sums of rows 2 (l % 4) and the next one of w, for row l / 4 of x.
PORT_INLINE f32x2 port_product(bf16x8 w, bf16x8 x, f32x2 acc) {
#pragma unroll
  for (int half = 0; half < 4; half += 2) {
    f32x4 sums;  // the last two are of rows 8 to 15
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %6, %5, %6}, {%7, %8}, "
        "{%9, %10, %11, %11};"
        : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
        : "r"(x.word[half]), "r"(x.word[half + 1]), "r"(0), "r"(w.word[half]), "r"(w.word[half + 1]),
          "f"(acc[0]), "f"(acc[1]), "f"(0.f));
    acc = {sums[0], sums[1]};
  }
  return acc;
}
#define __builtin_amdgcn_mfma_f32_16x16x32_bf16(w, x, acc, a, b, c) port_product(w, x, acc)

// ---- weights

struct __amdgpu_buffer_rsrc_t {
  const unsigned char* at;
  int bytes;
};

PORT_INLINE __amdgpu_buffer_rsrc_t port_buffer(const void* at, int bytes) {
  return {(const unsigned char*)at, bytes};
}
#define __builtin_amdgcn_make_buffer_rsrc(at, stride, bytes, flags) port_buffer(at, bytes)

// Zeros past the buffer's end, and memory is not asked. Volatile, so that no request slips behind a barrier.
PORT_INLINE u32x4 port_load_b128(__amdgpu_buffer_rsrc_t from, int offset) {
  u32x4 out;
  asm volatile(
      "{.reg .pred in; setp.ne.s32 in, %4, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@in ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%5];}"
      : "=&r"(out[0]), "=&r"(out[1]), "=&r"(out[2]), "=&r"(out[3])
      : "r"((int)(offset + 16 <= from.bytes)), "l"(from.at + offset));
  return out;
}

PORT_INLINE u32x2 port_load_b64(__amdgpu_buffer_rsrc_t from, int offset) {
  u32x2 out;
  asm volatile(
      "{.reg .pred in; setp.ne.s32 in, %2, 0; mov.b32 %0, 0; mov.b32 %1, 0;\n"
      "@in ld.global.nc.v2.u32 {%0, %1}, [%3];}"
      : "=&r"(out[0]), "=&r"(out[1])
      : "r"((int)(offset + 8 <= from.bytes)), "l"(from.at + offset));
  return out;
}

PORT_INLINE unsigned port_load_b32(__amdgpu_buffer_rsrc_t from, int offset) {
  unsigned out;
  asm volatile("{.reg .pred in; setp.ne.s32 in, %1, 0; mov.b32 %0, 0;\n@in ld.global.nc.u32 %0, [%2];}"
               : "=&r"(out)
               : "r"((int)(offset + 4 <= from.bytes)), "l"(from.at + offset));
  return out;
}
#define __builtin_amdgcn_raw_buffer_load_b128(from, lane, all, flags) port_load_b128(from, (lane) + (all))
#define __builtin_amdgcn_raw_buffer_load_b64(from, lane, all, flags) port_load_b64(from, (lane) + (all))
#define __builtin_amdgcn_raw_buffer_load_b32(from, lane, all, flags) port_load_b32(from, (lane) + (all))

// ---- waiting

// How many lanes have given up, and of one of them: the counter's address, what it held, the workgroup.
extern "C" __device__ unsigned long long port_stuck[4];
__device__ unsigned long long port_stuck[4];

PORT_INLINE unsigned long long port_now() {
  unsigned long long ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// The memory that the lanes of a workgroup share is as large as the launch says (`moe_lds`, `router_lds`). It begins
// with the time when the workgroup started, and whether it has given up, which it does at once after a launch that
// did.
extern __shared__ u32x4 port_lds[];
#define PORT_LDS 16
#define IN_LDS(type, name)                                              \
  if (threadIdx.x == 0) {                                               \
    ((unsigned long long*)port_lds)[0] = port_now();                    \
    ((unsigned long long*)port_lds)[1] = port_stuck[0] != 0;            \
  }                                                                     \
  type& name = *(type*)((char*)port_lds + PORT_LDS)

// Ends a wait that has been given up by a number that no counter reaches.
PORT_INLINE unsigned long long port_load(const unsigned long long* counter) {
  unsigned long long number;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(number) : "l"(counter) : "memory");
  if (!((volatile unsigned long long*)port_lds)[1]) return number;
  if (atomicAdd(port_stuck, 1ull) == 0) {
    port_stuck[1] = (unsigned long long)counter;
    port_stuck[2] = number;
    port_stuck[3] = blockIdx.x;
  }
  return ~0ull;
}

PORT_INLINE unsigned long long port_add(unsigned long long* counter, unsigned long long number) {
  unsigned long long before;
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(counter), "l"(number)
               : "memory");
  return before;
}

PORT_INLINE void port_pause() {
  volatile unsigned long long* own = (volatile unsigned long long*)port_lds;
  if (port_now() - own[0] > PATIENCE) own[1] = 1;
  __nanosleep(32);
}

// One of a whole wave: the barrier of its lanes makes their accesses those of the lane that goes on. A fence of the LDS
// alone stands at the barrier of the workgroup, which orders that too: no instruction then waits for loads of weights.
PORT_INLINE void port_fence(const char* scope, const char* memory = "") {
  __syncwarp();
  if (memory[0] == 'l')
    asm volatile("" ::: "memory");
  else if (scope[0] == 'a')
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  else
    asm volatile("fence.acq_rel.cta;" ::: "memory");
  __syncwarp();
}

#ifndef __ATOMIC_RELAXED
#define __ATOMIC_RELAXED 0
#define __ATOMIC_ACQUIRE 2
#define __ATOMIC_RELEASE 3
#endif
#define __HIP_MEMORY_SCOPE_AGENT 4
#define __hip_atomic_load(counter, order, scope) port_load(counter)
#define __hip_atomic_fetch_add(counter, number, order, scope) port_add(counter, number)
#define __builtin_amdgcn_s_sleep(time) port_pause()
#define __builtin_amdgcn_fence(order, ...) port_fence(__VA_ARGS__)
#define __builtin_amdgcn_s_barrier() \
  do {                               \
    __syncwarp();                    \
    asm volatile("barrier.sync 0;" ::: "memory"); \
  } while (0)
