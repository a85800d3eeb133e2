// The 16-bit storage types on the host, and how registers are read from and written to memory. Torch-free.
#pragma once

#include "common/simd.h"

namespace rewardfuse::REWARDFUSE_TARGET {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Bool {
  uint8_t bits;
};

// What a storage type is in memory, and a register's worth of it for `lanes` lanes.
template <class S>
struct Raw {
  using type = S;
};
template <>
struct Raw<Half> {
  using type = uint16_t;
};
template <>
struct Raw<BFloat16> {
  using type = uint16_t;
};
template <>
struct Raw<Bool> {
  using type = uint8_t;
};
template <class T, int lanes>
struct Packed {
  typedef T type __attribute__((vector_size(sizeof(T) * lanes)));
};

template <class S, int lanes>
RF_HD typename Packed<float, lanes>::type widen_16_bit(typename Packed<uint16_t, lanes>::type raw) {
  using Float = typename Packed<float, lanes>::type;
  using Bits = typename Packed<uint32_t, lanes>::type;
#ifdef __AVX512F__
  if constexpr (std::is_same_v<S, Half> && lanes == 16) return (Float)_mm512_cvtph_ps((__m256i)raw);
#endif
  const Bits bits = __builtin_convertvector(raw, Bits);
  if constexpr (std::is_same_v<S, BFloat16>) {
    return (Float)(bits << 16);
  } else {
    // The product with 2^112 rebases the exponent and normalizes subnormals; inf and NaN get float's exponent.
    const Bits rebased = (Bits)((Float)((bits & 0x7fffu) << 13) * 0x1p112f);
    const Bits special = (bits & 0x7c00u) == 0x7c00u ? Bits{} + 0x7f800000u : Bits{};
    return (Float)(rebased | special | ((bits & 0x8000u) << 16));
  }
}

// Round to nearest, ties to even; NaN stays NaN.
template <class S, int lanes>
RF_HD typename Packed<uint16_t, lanes>::type narrow_16_bit(typename Packed<float, lanes>::type x) {
  using Float = typename Packed<float, lanes>::type;
  using Bits = typename Packed<uint32_t, lanes>::type;
#ifdef __AVX512F__
  if constexpr (std::is_same_v<S, Half> && lanes == 16) {
    return (typename Packed<uint16_t, lanes>::type)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  }
#endif
  const Bits bits = (Bits)x, size = bits & 0x7fffffffu;
  Bits out;
  if constexpr (std::is_same_v<S, BFloat16>) {
    out = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out = size > 0x7f800000u ? Bits{} + 0x7fc0u : out;
  } else {
    const Bits normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    // Adding 0.5 puts a subnormal half's bits at the bottom of the mantissa, rounded by the addition itself.
    const Bits subnormal = (Bits)((Float)size + 0.5f) - 0x3f000000u;
    out = size < 0x38800000u ? subnormal : normal;
    out = size >= 0x477ff000u ? Bits{} + 0x7c00u : out;
    out = size > 0x7f800000u ? Bits{} + 0x7e00u : out;
    out |= (bits >> 16) & 0x8000u;
  }
  return __builtin_convertvector(out, typename Packed<uint16_t, lanes>::type);
}

// The first `count` of a register's items to and from memory; the rest of the memory is not touched, the rest of the
// register 0. One masked instruction where the processor has it: item by item it would cost more than what follows.
template <class R, int lanes>
RF_HD typename Packed<R, lanes>::type load_first(const R* from, int64_t count) {
  using P = typename Packed<R, lanes>::type;
#ifdef __AVX512F__
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(P) == 64 && sizeof(R) == 4) return (P)_mm512_maskz_loadu_epi32(mask, from);
  if constexpr (sizeof(P) == 64 && sizeof(R) == 8) return (P)_mm512_maskz_loadu_epi64(mask, from);
  if constexpr (sizeof(P) == 32 && sizeof(R) == 2) return (P)_mm256_maskz_loadu_epi16(mask, from);
#endif
  P raw{};
  for (int j = 0; j < count; ++j) raw[j] = from[j];
  return raw;
}

template <class R, int lanes>
RF_HD void store_first(R* to, typename Packed<R, lanes>::type raw, int64_t count) {
#ifdef __AVX512F__
  using P = typename Packed<R, lanes>::type;
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(P) == 64 && sizeof(R) == 4) return _mm512_mask_storeu_epi32(to, mask, (__m512i)raw);
  if constexpr (sizeof(P) == 64 && sizeof(R) == 8) return _mm512_mask_storeu_epi64(to, mask, (__m512i)raw);
  if constexpr (sizeof(P) == 32 && sizeof(R) == 2) return _mm256_mask_storeu_epi16(to, mask, (__m256i)raw);
#endif
  for (int j = 0; j < count; ++j) to[j] = raw[j];
}

// `count` items from `p` on, `stride` apart; lanes beyond `count` are 0 and their memory is not
// touched. Stride 0 fills every lane.
template <class V, class S>
RF_HD V load_as(const S* p, int64_t stride, int64_t count) {
  using T = lane_t<V>;
  constexpr int lanes = Lanes<T>::count;
  using R = typename Raw<S>::type;
  typename Packed<R, lanes>::type raw{};
  const R* from = reinterpret_cast<const R*>(p);
  if (count >= lanes && stride == 1) {
    __builtin_memcpy(&raw, from, sizeof(raw));
  } else if (stride == 1) {
    raw = load_first<R, lanes>(from, count);
  } else {
    for (int j = 0; j < lanes; ++j) {
      if (j < count || stride == 0) raw[j] = from[j * stride];
    }
  }
  if constexpr (std::is_same_v<S, Half> || std::is_same_v<S, BFloat16>) {
    return __builtin_convertvector((widen_16_bit<S, lanes>(raw)), V);
  } else if constexpr (std::is_same_v<S, Bool>) {
    return __builtin_convertvector((raw != 0) & 1, V);
  } else {
    return __builtin_convertvector(raw, V);
  }
}

template <class S, class V>
RF_HD void store_as(S* p, V x, int64_t count) {
  using T = lane_t<V>;
  constexpr int lanes = Lanes<T>::count;
  using R = typename Raw<S>::type;
  typename Packed<R, lanes>::type raw;
  if constexpr (std::is_same_v<S, Half> || std::is_same_v<S, BFloat16>) {
    raw = narrow_16_bit<S, lanes>(__builtin_convertvector(x, typename Packed<float, lanes>::type));
  } else {
    raw = __builtin_convertvector(x, typename Packed<R, lanes>::type);
  }
  R* to = reinterpret_cast<R*>(p);
  if (count >= lanes) {
    __builtin_memcpy(to, &raw, sizeof(raw));
  } else {
    store_first<R, lanes>(to, raw, count);
  }
}

// Calls f with a value of the storage type that `dtype` names.
template <class F>
RF_HD auto with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kFloat16: return f(Half{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kBool: return f(Bool{});
    case DType::kUInt8: return f(uint8_t{});
    case DType::kInt8: return f(int8_t{});
    case DType::kInt16: return f(int16_t{});
    case DType::kInt32: return f(int32_t{});
    case DType::kInt64: break;
  }
  return f(int64_t{});
}

// Calls f(accumulation type, storage type) for the dtype of the rewards.
template <class F>
RF_HD void with_rewards(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{}, double{});
    case DType::kFloat16: return f(float{}, Half{});
    case DType::kBFloat16: return f(float{}, BFloat16{});
    default: return f(float{}, float{});
  }
}

template <class V>
V load(const Operand& operand, int64_t row, int64_t column, int64_t count) {
  if (operand.data == nullptr) return broadcast(static_cast<lane_t<V>>(operand.value));
  const int64_t offset = row * operand.outer_stride + column * operand.inner_stride;
  return with_storage(operand.dtype, [&](auto storage) {
    return load_as<V>(static_cast<const decltype(storage)*>(operand.data) + offset, operand.inner_stride, count);
  });
}

}  // namespace rewardfuse::REWARDFUSE_TARGET
