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
  uint8_t byte;
};

RF_HD float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

template <class T, class S>
RF_HD T widen(S x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return from_bits(uint32_t(x.bits) << 16);
  } else if constexpr (std::is_same_v<S, Half>) {
    // The product with 2^112 rebases the exponent and normalizes subnormals; inf and NaN get float's exponent.
    const float rebased = from_bits(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
    const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    return from_bits(__builtin_bit_cast(uint32_t, rebased) | special | uint32_t(x.bits & 0x8000) << 16);
  } else if constexpr (std::is_same_v<S, Bool>) {
    return T(x.byte != 0);
  } else {
    return T(x);
  }
}

// Round to nearest, ties to even; NaN stays NaN.
template <class S, class T>
RF_HD S narrow(T x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, float(x));
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
  } else if constexpr (std::is_same_v<S, Half>) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, float(x));
    const uint32_t magnitude_bits = bits & 0x7fffffff;
    const uint32_t normal = (magnitude_bits - 0x38000000 + 0xfff + (magnitude_bits >> 13 & 1)) >> 13;
    // Adding 0.5 puts a subnormal half's bits at the bottom of the mantissa, rounded by the addition itself.
    const uint32_t subnormal = __builtin_bit_cast(uint32_t, from_bits(magnitude_bits) + 0.5f) - 0x3f000000;
    uint32_t half = magnitude_bits < 0x38800000 ? subnormal : normal;
    half = magnitude_bits >= 0x477ff000 ? 0x7c00 : half;
    half = magnitude_bits > 0x7f800000 ? 0x7e00 : half;
    return {uint16_t(half | (bits >> 16 & 0x8000))};
  } else {
    return S(x);
  }
}

// `count` items from `p` on, `stride` apart; lanes beyond `count` are 0 and their memory is not touched.
template <class V, class S>
RF_HD V load_as(const S* p, int64_t stride, int64_t count) {
  using T = lane_t<V>;
  constexpr int lanes = Lanes<T>::count;
  V out{};
  if (stride == 0) return broadcast<T>(widen<T>(*p));
  if (count >= lanes && stride == 1) {
    if constexpr (std::is_same_v<S, T>) {
      __builtin_memcpy(&out, p, sizeof(out));
    } else {
      for (int j = 0; j < lanes; ++j) out[j] = widen<T>(p[j]);
    }
  } else if (count >= lanes) {
    for (int j = 0; j < lanes; ++j) out[j] = widen<T>(p[j * stride]);
  } else {
    for (int j = 0; j < count; ++j) out[j] = widen<T>(p[j * stride]);
  }
  return out;
}

template <class S, class V>
RF_HD void store_as(S* p, V x, int64_t count) {
  using T = lane_t<V>;
  constexpr int lanes = Lanes<T>::count;
  if (count >= lanes) {
    if constexpr (std::is_same_v<S, T>) {
      __builtin_memcpy(p, &x, sizeof(x));
    } else {
      for (int j = 0; j < lanes; ++j) p[j] = narrow<S>(x[j]);
    }
  } else {
    for (int j = 0; j < count; ++j) p[j] = narrow<S>(x[j]);
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

template <class V>
V load(const Operand& operand, int64_t row, int64_t column, int64_t count) {
  if (operand.data == nullptr) return broadcast(static_cast<lane_t<V>>(operand.value));
  const int64_t offset = row * operand.outer_stride + column * operand.inner_stride;
  return with_storage(operand.dtype, [&](auto storage) {
    return load_as<V>(static_cast<const decltype(storage)*>(operand.data) + offset, operand.inner_stride, count);
  });
}

}  // namespace rewardfuse::REWARDFUSE_TARGET
