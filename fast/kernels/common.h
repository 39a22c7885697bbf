// What the HIP kernels share: types, and how waves and workgroups wait for each other.
//
// A workgroup has nine waves. Eight, the streamers, load weights and multiply. The ninth, the messenger,
// reads and writes what workgroups tell each other. Waves of one workgroup meet at barriers and pass
// numbers through the LDS; workgroups wait for each other at counters in memory.
//
// A wave's loads and its stores count on the same hardware counter (vmcnt), in the order in which it issued them. A
// wave that waits for a store would therefore wait for all weights that it requested before, which is why
// streamers leave stores and counters to the messenger.
//
// An L1 cache belongs to a compute unit (CU), and an L2 cache to an accelerator die (XCD) of 32 CUs. Neither
// can be relied on to see what another XCD writes. So data for other workgroups need a release (store, write
// back, raise a counter) and an acquire (wait for the counter, drop what is cached, load).

#pragma once

#if defined(__CUDACC__)
#include "port_sm90.h"  // the same source on an NVIDIA card, to check how its workgroups wait for each other
#elif __has_include(<hip/hip_runtime.h>)
#include <hip/hip_runtime.h>
#else  // a compiler without ROCm
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#endif

#define INLINE static __device__ inline __attribute__((always_inline))

namespace {

typedef unsigned char u8;
typedef unsigned long long u64;
#ifndef PORT  // which has its own
typedef __bf16 bf16x2 __attribute__((ext_vector_type(2)));
typedef __bf16 bf16x8 __attribute__((ext_vector_type(8)));
typedef float f32x2 __attribute__((ext_vector_type(2)));
typedef float f32x4 __attribute__((ext_vector_type(4)));
typedef unsigned u32x2 __attribute__((ext_vector_type(2)));
typedef unsigned u32x4 __attribute__((ext_vector_type(4)));

// A wave and its matrix unit. A product is of TILE rows of a weight and 16 rows of x. Lane l holds a part of
// row l % 16 of both, the columns of group l / 16. It gets SUMS sums: those of the weight's rows from
// SUMS * (l / 16) on, for row l % 16 of x.
typedef f32x4 Sums;
constexpr int LANES = 64, STREAMERS = 8, TILE = 16, SUMS = 4;
#define PLACE(lane) (lane % TILE)
#define GROUP(lane) (lane / TILE)
#define WORKGROUP(threads) __attribute__((amdgpu_flat_work_group_size(threads, threads)))
#define IN_LDS(type, name) __shared__ type name
#endif

constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a < b ? b : a; }

constexpr int MESSENGER = STREAMERS;
constexpr int MAX_ROWS = 8;
constexpr int DEPTH = 32;    // columns in one product of the matrix unit
constexpr int SQUARES = 16;  // rows that a norm's squares have room for
constexpr int LINE = 16;     // u64 in a cache line

INLINE u64 ballot(bool value) { return __builtin_amdgcn_ballot_w64(value); }

// Waits until a counter has reached a number. Each look goes past the caches (sc1). One fence after the last
// look drops what this CU and this XCD have cached (buffer_inv sc1), so that loads after it read what the
// counter announced. The wave sleeps for some 64 cycles between two looks, so that it does not take the
// streamers' turns.
INLINE void wait_for(const u64* counter, u64 number) {
  while (__hip_atomic_load(counter, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT) < number)
    __builtin_amdgcn_s_sleep(1);
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");
}

INLINE void add(u64* counter, u64 number) {
  __hip_atomic_fetch_add(counter, number, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

// Announces all stores of this wave. The fence writes this XCD's L2 back and waits for that and for the
// stores (buffer_wbl2 sc1, vmcnt(0)): whoever sees the counter raised finds them in memory.
INLINE void arrive(u64* counter, int lane) {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");
  if (lane == 0) add(counter, 1);
}

// All nine waves meet. They pass numbers through the LDS alone, so the fences are of the LDS alone: a wave
// waits for its LDS accesses (lgkmcnt) and not for its loads of weights, which stay on their way.
INLINE void meet() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup", "local");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup", "local");
}

// Returns 1 / rms of row lane % 8 of D columns, or 1 if the rows are to be taken as they are (no parts).
// squares [parts, SQUARES]: sums of the rows' squares. Lanes of one row share its parts. Sixteen loads of
// a lane are on their way at once, because they take hardly longer than one.
INLINE float inverse_rms(const float* squares, int parts, int D, float eps, int lane) {
  if (parts == 0) return 1;
  constexpr int AT_ONCE = 16, STRIDE = LANES / MAX_ROWS;
  float sum = 0;
  for (int first = lane / MAX_ROWS; first < parts; first += AT_ONCE * STRIDE) {
    float some[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      some[i] = squares[least(first + i * STRIDE, parts - 1) * SQUARES + lane % MAX_ROWS];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) sum += first + i * STRIDE < parts ? some[i] : 0;
  }
#pragma unroll
  for (int d = MAX_ROWS; d < LANES; d *= 2)
    sum += __builtin_bit_cast(
        float, __builtin_amdgcn_ds_bpermute((lane ^ d) * 4, __builtin_bit_cast(int, sum)));
  return 1 / __builtin_sqrtf(sum / D + eps);
}

}  // namespace
