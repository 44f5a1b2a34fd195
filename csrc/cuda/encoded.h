// Adjacent elements of a tensor whose state is stored in fewer bits than the arithmetic has (codec.h). How
// each stream is stored is said by a class `How`: to the compiler, or at run time.
#pragma once

#include <type_traits>

#include "../chance.h"
#include "turns.h"

namespace nexus::cuda {

__device__ inline int bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kInt8:
    case DType::kUInt8:
      return 1;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16:
      return 2;
    case DType::kFloat64:
      return 8;
    default:
      return 4;
  }
}

// kCount adjacent elements of a stream as they are stored, in at most 4 bytes each.
template <int kCount>
struct Words {
  uint32_t words[kCount];

  template <class Codec>
  __device__ Codec get(int k) const {
    constexpr int kPerWord = sizeof(uint32_t) / sizeof(Codec);
    const uint32_t bits = words[k / kPerWord] >> (k % kPerWord * 8 * static_cast<int>(sizeof(Codec)));
    Codec element;
    memcpy(&element, &bits, sizeof element);
    return element;
  }

  // To be called for one element after the other.
  template <class Codec>
  __device__ void set(int k, const Codec& element) {
    constexpr int kPerWord = sizeof(uint32_t) / sizeof(Codec);
    uint32_t bits = 0;
    memcpy(&bits, &element, sizeof element);
    if (k % kPerWord != 0) {
      bits = words[k / kPerWord] | bits << (k % kPerWord * 8 * static_cast<int>(sizeof(Codec)));
    }
    words[k / kPerWord] = bits;
  }
};

// The result of f for an unsigned number of as many bytes.
template <class F>
__device__ void with_unit(int bytes, const F& f) {
  if (bytes == 4) {
    f(uint32_t());
  } else if (bytes == 2) {
    f(uint16_t());
  } else {
    f(uint8_t());
  }
}

// Elements [i, i + n) of a stream, and zeros behind them. kCount of them come in whole accesses if they are
// `aligned`.
template <int kCount>
__device__ Words<kCount> fetch_words(const char* stream, DType dtype, int32_t i, int n, bool aligned) {
  Words<kCount> out = {};
  with_unit(bytes_of(dtype), [&](auto unit) {
    using Unit = decltype(unit);
    const Unit* from = reinterpret_cast<const Unit*>(stream) + i;
    if (aligned && n >= kCount) {
      constexpr int kWords = kCount * sizeof(Unit) / sizeof(uint32_t);
      const auto pack = fetch<kWords>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        out.words[k] = pack.elements[k];
      }
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        out.set(k, k < n ? from[k] : Unit(0));
      }
    }
  });
  return out;
}

template <int kCount>
__device__ void put_words(const Words<kCount>& words, char* stream, DType dtype, int32_t i, int n,
                          bool aligned) {
  with_unit(bytes_of(dtype), [&](auto unit) {
    using Unit = decltype(unit);
    Unit* to = reinterpret_cast<Unit*>(stream) + i;
    if (aligned && n >= kCount) {
      constexpr int kWords = kCount * sizeof(Unit) / sizeof(uint32_t);
      Pack<uint32_t, kWords> pack;
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        pack.elements[k] = words.words[k];
      }
      put(pack, reinterpret_cast<uint32_t*>(to));
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (k < n) {
          to[k] = words.template get<Unit>(k);
        }
      }
    }
  });
}

// The random numbers of kCount adjacent elements, two a word.
template <int kCount>
struct Numbers {
  uint32_t words[kDrawn];  // of two draws

  // `kInTurn`: elements begin where a turn of the whole tensor does, so that one draw serves them all.
  template <bool kInTurn>
  __device__ static Numbers of(const Chance& chance, uint64_t element) {
    const uint64_t eighth = element / kDrawn;
    const auto skipped = static_cast<int>(element % kDrawn);
    Numbers out = {};
    const Draw first = draw(chance, eighth);
#pragma unroll
    for (int k = 0; k < kDrawn / 2; ++k) {
      out.words[k] = first.words[k];
    }
    if (!kInTurn && skipped + kCount > kDrawn) {
      const Draw second = draw(chance, eighth + 1);
#pragma unroll
      for (int k = 0; k < kDrawn / 2; ++k) {
        out.words[kDrawn / 2 + k] = second.words[k];
      }
    }
    if (kCount < kDrawn) {
      out.skip(skipped & 4, 4);
    }
    if (!kInTurn) {
      out.skip(skipped & 2, 2);
      if (skipped % 2 != 0) {
#pragma unroll
        for (int k = 0; k < kDrawn - 1; ++k) {
          out.words[k] = out.words[k] >> 16 | out.words[k + 1] << 16;
        }
      }
    }
    return out;
  }

  __device__ uint32_t operator[](int k) const { return words[k / 2] >> (k % 2 * 16) & 0xffffu; }

 private:
  __device__ void skip(bool condition, int numbers) {
#pragma unroll
    for (int k = 0; k + numbers / 2 < kDrawn; ++k) {
      words[k] = condition ? words[k + numbers / 2] : words[k];
    }
  }
};

// The scale of a block of which each thread has n elements, of kCount.
template <class Codec, int kCount>
__device__ float scale_of_block(const float* values, int n) {
  uint32_t largest = Codec::kSmallestScale;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const uint32_t magnitude = magnitude_bits(values[k]);
    largest = k < n && magnitude > largest ? magnitude : largest;
  }
#pragma unroll
  for (int lanes = static_cast<int>(kScaleBlock) / kCount / 2; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, largest, lanes);
    largest = other > largest ? other : largest;
  }
  return scale_of(largest);
}

// Call f for the codec of a parameter or a gradient whose arithmetic is in float32, of the low bits of a
// master weight, and of a moment.
template <class F>
__device__ void with_float(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) {
    f(BFloat16());
  } else if (dtype == DType::kFloat16) {
    f(Float16());
  } else {
    f(float());
  }
}

template <class F>
__device__ void with_low(DType dtype, const F& f) {
  if (dtype == DType::kInt16) {
    f(Low16());
  } else {
    f(Low8());
  }
}

template <class F>
__device__ void with_moment(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kInt8:
      return f(Squared8());
    case DType::kUInt8:
      return f(Fourth8());
    default:
      return f(float());
  }
}

template <class Codec>
constexpr bool kHasScale = sizeof(Codec) == 1;

struct MomentStream {
  char* codes;
  float* scales;
};

// A moment of kCount adjacent elements. A warp has whole blocks of a scale, and all its lanes call update().
template <int kCount>
struct Moment {
  Words<kCount> codes;
  float scale;

  __device__ void fetch(const MomentStream& s, DType dtype, int32_t i, int n, bool aligned) {
    codes = fetch_words<kCount>(s.codes, dtype, i, n, aligned);
    if (bytes_of(dtype) == 1) {
      scale = n > 0 ? s.scales[i / kScaleBlock] : 0.0f;
    }
  }

  __device__ void decode(DType dtype, float* to) const {
    with_moment(dtype, [&](auto codec) {
      using Codec = decltype(codec);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if constexpr (kHasScale<Codec>) {
          to[k] = decoded(codes.template get<Codec>(k), scale);
        } else {
          to[k] = decoded(codes.template get<Codec>(k));
        }
      }
    });
  }

  // Of a moment that is stored as Fourth8, `from` has the roots.
  __device__ void encode(DType dtype, const float* from, int n, bool by_chance,
                         const Numbers<kCount>& drawn) {
    with_moment(dtype, [&](auto codec) {
      using Codec = decltype(codec);
      [[maybe_unused]] float squared = 0.0f;
      if constexpr (kHasScale<Codec>) {
        scale = scale_of_block<Codec, kCount>(from, n);
        squared = squared_steps<Codec>(scale);
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        Codec out;
        if constexpr (kHasScale<Codec>) {
          nexus::encode(from[k], squared, drawn[k], out);
        } else if constexpr (std::is_same_v<Codec, BFloat16>) {
          by_chance ? nexus::encode(from[k], drawn[k], out) : nexus::encode(from[k], out);
        } else {
          nexus::encode(from[k], out);
        }
        codes.set(k, out);
      }
    });
  }

  __device__ void put(const MomentStream& s, DType dtype, int32_t i, int n, bool aligned) const {
    put_words(codes, s.codes, dtype, i, n, aligned);
    if (bytes_of(dtype) == 1 && n > 0 && i % kScaleBlock == 0) {
      s.scales[i / kScaleBlock] = scale;
    }
  }
};

}  // namespace nexus::cuda
