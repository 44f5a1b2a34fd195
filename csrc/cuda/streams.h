// Accesses to a tensor's streams in global memory, each as wide as 16 bytes.
#pragma once

#include <cuda_runtime.h>

#include "../codec.h"

namespace nexus::cuda {

// kCount adjacent elements as they are stored, aligned so that few accesses take them.
template <class Codec, int kCount>
struct alignas(sizeof(Codec) * kCount < 16 ? sizeof(Codec) * kCount : 16) Pack {
  Codec elements[kCount];
};

template <int kCount, class Codec>
__device__ inline bool is_aligned(const Codec* stream) {
  return reinterpret_cast<uintptr_t>(stream) % alignof(Pack<Codec, kCount>) == 0;
}

template <int kCount, class Codec>
__device__ inline Pack<Codec, kCount> fetch(const Codec* stream) {
  return *reinterpret_cast<const Pack<Codec, kCount>*>(stream);
}

template <int kCount, class Codec>
__device__ inline void put(const Pack<Codec, kCount>& pack, Codec* stream) {
  *reinterpret_cast<Pack<Codec, kCount>*>(stream) = pack;
}

// p, which points to global memory: what comes from a table would else be accessed by slower, generic ones.
template <class T>
__device__ inline T* global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

}  // namespace nexus::cuda
