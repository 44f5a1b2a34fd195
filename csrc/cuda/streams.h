// 128-bit accesses to the streams of a tensor, whatever its types.
#pragma once

#include <cuda_runtime.h>

#include "../half.h"
#include "table.h"

namespace nexus::cuda {

template <class T, class Stored>
__device__ inline T as(Stored x) {
  return static_cast<T>(x);
}
template <class T>
__device__ inline T as(BFloat16 x) {
  return static_cast<T>(to_float(x));
}
template <class T>
__device__ inline T as(Float16 x) {
  return static_cast<T>(to_float(x));
}

__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(double& to, double x) { to = x; }
__device__ inline void assign(BFloat16& to, float x) { from_float(x, to); }
__device__ inline void assign(Float16& to, float x) { from_float(x, to); }

// p, which points to global memory: what comes from a table would else be accessed by slower, generic ones.
template <class T>
__device__ inline T* global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

__device__ inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// kElements of a stream from p on, which is aligned to 16 bytes, and back.
template <int kElements, class Stored>
__device__ inline void load(const Stored* p, Stored* to) {
  constexpr int kEach = 16 / sizeof(Stored);
  static_assert(kElements % kEach == 0, "whole accesses");
#pragma unroll
  for (int i = 0; i < kElements; i += kEach) {
    const uint4 bits = *reinterpret_cast<const uint4*>(p + i);
    memcpy(&to[i], &bits, sizeof bits);
  }
}

template <int kElements, class Stored>
__device__ inline void store(Stored* p, const Stored* from) {
  constexpr int kEach = 16 / sizeof(Stored);
  static_assert(kElements % kEach == 0, "whole accesses");
#pragma unroll
  for (int i = 0; i < kElements; i += kEach) {
    uint4 bits;
    memcpy(&bits, &from[i], sizeof bits);
    *reinterpret_cast<uint4*>(p + i) = bits;
  }
}

}  // namespace nexus::cuda
