// What the HIP kernels share: types, and how waves and workgroups wait for each other.
//
// A workgroup has nine waves. Eight, the streamers, load weights. The ninth, the messenger, speaks to
// memory for all of them. They meet at barriers; workgroups meet at counters in memory.

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

// A wave and its matrix unit. A product is of TILE rows of a weight; lane l has row l % 16 of them and group
// l / 16 of the columns, and it gets the sums of rows SUMS * (l / 16) on, for row l % 16 of x.
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

// The fence lets what the counter announced be read: it drops what this CU and this XCD have cached.
INLINE void wait_for(const u64* counter, u64 number) {
  while (__hip_atomic_load(counter, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT) < number)
    __builtin_amdgcn_s_sleep(1);
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");
}

INLINE void add(u64* counter, u64 number) {
  __hip_atomic_fetch_add(counter, number, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

// The fence waits until all stores of this wave are where other XCDs see them; then the counter tells.
INLINE void arrive(u64* counter, int lane) {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");
  if (lane == 0) add(counter, 1);
}

// All nine waves meet. Only the LDS passes between them here: loads of weights stay on their way.
INLINE void meet() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup", "local");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup", "local");
}

// 1 / rms of row lane % 8 of D columns, or 1 if the rows are to be taken as they are (no parts). squares
// [parts, SQUARES]: sums of the rows' squares. Many loads are on their way at once, since each takes long.
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
