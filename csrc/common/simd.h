// Registers of the widest kind that the instruction set of this compilation has, through the compilers' vector
// extension (GCC, Clang): arithmetic, comparisons and `mask ? a : b` work lane by lane. Torch-free, host only.
//
// Max error against the correctly rounded value, all floats of the range (tests/test_simd.py):
//   exp_nonpositive    x in [−104, 0]   2 ulp (subnormal results: 1 ulp of the smallest subnormal)
//   expm1_nonpositive  x in [−104, 0]   3 ulp
//   log1p_unit         x in [0, 1]      3 ulp
//   log_nonnegative    x in [0, max]    3 ulp
#pragma once

#include <type_traits>

#include "common/host_device.h"
#include "common/operand.h"

namespace rewardfuse::REWARDFUSE_TARGET {

template <class T>
struct Lanes {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int count = REWARDFUSE_SIMD_BYTES / sizeof(T);
  typedef T Reg __attribute__((vector_size(REWARDFUSE_SIMD_BYTES)));
  typedef Int Mask __attribute__((vector_size(REWARDFUSE_SIMD_BYTES)));
  typedef signed char Bytes __attribute__((vector_size(count)));
};

template <class V>
using lane_t = std::remove_cvref_t<decltype(V{}[0])>;

template <class T>
RF_HD typename Lanes<T>::Reg broadcast(T value) {
  return value - typename Lanes<T>::Reg{};
}

// −1 (all bits) in the first `count` lanes.
template <class T>
RF_HD typename Lanes<T>::Mask first_lanes(int64_t count) {
  typename Lanes<T>::Mask iota;
  for (int j = 0; j < Lanes<T>::count; ++j) iota[j] = j;
  return iota < static_cast<typename Lanes<T>::Int>(count);
}

template <class V>
RF_HD double sum_lanes(V x) {
  double total = 0;
  for (unsigned j = 0; j < sizeof(V) / sizeof(x[0]); ++j) total += x[j];
  return total;
}

// x = n·ln 2 + r with |r| ≤ ln 2 / 2; expm1(r) by its Taylor series.
template <class V>
struct ExpParts {
  using T = lane_t<V>;
  using Mask = typename Lanes<T>::Mask;
  static constexpr bool f32 = sizeof(T) == 4;
  V expm1_r;
  Mask n;

  RF_HD explicit ExpParts(V x) {
    constexpr T lowest = f32 ? T(-104) : T(-746);
    constexpr T round_to_int = f32 ? T(12582912) : T(6755399441055744);  // 1.5·2^23, 1.5·2^52
    constexpr T ln2_high = f32 ? T(0.693359375) : T(6.93145751953125e-1);
    constexpr T ln2_low = f32 ? T(-2.12194440054690583e-4) : T(1.42860682030941723212e-6);
    constexpr int terms = f32 ? 7 : 13;
    x = x < lowest ? broadcast<T>(lowest) : x;
    const V shifted = x * T(1.44269504088896340736) + round_to_int;
    const V whole = shifted - round_to_int;
    const V r = (x - whole * ln2_high) - whole * ln2_low;
    T factorial[terms + 1] = {1};
    for (int k = 1; k <= terms; ++k) factorial[k] = factorial[k - 1] * k;
    V series = broadcast<T>(T(1) / factorial[terms]);
    for (int k = terms - 1; k >= 1; --k) series = series * r + T(1) / factorial[k];
    expm1_r = series * r;
    n = (Mask)shifted - (Mask)broadcast<T>(round_to_int);
  }

  static RF_HD V power_of_two(Mask exponent) { return (V)((exponent + (f32 ? 127 : 1023)) << (f32 ? 23 : 52)); }
};

// 2^n in two factors, so that subnormal results come out.
template <class V, class = decltype(V{}[0])>
RF_HD V exp_nonpositive(V x) {
  const ExpParts<V> parts(x);
  const auto half = parts.n >> 1;
  return (1.0f + parts.expm1_r) * parts.power_of_two(half) * parts.power_of_two(parts.n - half);
}

template <class V, class = decltype(V{}[0])>
RF_HD V expm1_nonpositive(V x) {
  const V floor = broadcast<lane_t<V>>(-64);  // −1 to the last bit, and 2^n is normal
  const ExpParts<V> parts(x < floor ? floor : x);
  const V scale = parts.power_of_two(parts.n);
  return scale * parts.expm1_r + (scale - 1.0f);
}

// log(1 + x) = 2·atanh(s), s = x / (2 + x) ≤ 1/3: the odd series needs no range reduction.
template <class V, class = decltype(V{}[0])>
RF_HD V log1p_unit(V x) {
  using T = lane_t<V>;
  constexpr int terms = sizeof(T) == 4 ? 7 : 16;
  const V s = x / (x + T(2));
  const V s2 = s * s;
  V series = broadcast<T>(T(1) / (2 * terms + 1));
  for (int k = terms - 1; k >= 0; --k) series = series * s2 + T(1) / (2 * k + 1);
  return (s + s) * series;
}

// x = 2^n·m with √½ ≤ m < √2; log(m) = 2·atanh((m − 1) / (m + 1)).
template <class V, class = decltype(V{}[0])>
RF_HD V log_nonnegative(V x) {
  using T = lane_t<V>;
  using Mask = typename Lanes<T>::Mask;
  constexpr bool f32 = sizeof(T) == 4;
  constexpr int mantissa = f32 ? 23 : 52, terms = f32 ? 5 : 11;
  constexpr T smallest_normal = f32 ? T(0x1p-126) : T(0x1p-1022), lift = f32 ? T(0x1p24) : T(0x1p54);
  const V input = x;
  const Mask subnormal = x < smallest_normal;
  x = subnormal ? x * lift : x;
  const Mask root_half = (Mask)broadcast<T>(T(0.70710678118654752440));
  const Mask n = ((Mask)x - root_half) >> mantissa;
  const V m = (V)((Mask)x - (n << mantissa));
  const V s = (m - 1.0f) / (m + 1.0f);
  const V s2 = s * s;
  V series = broadcast<T>(T(1) / (2 * terms + 1));
  for (int k = terms - 1; k >= 0; --k) series = series * s2 + T(1) / (2 * k + 1);
  V whole = __builtin_convertvector(n, V);
  whole -= subnormal ? broadcast<T>(f32 ? 24 : 54) : V{};
  V result = whole * T(0.69314718055994530942) + (s + s) * series;
  result = input == 0.0f ? broadcast<T>(-__builtin_inf()) : result;
  return input <= T(f32 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023) ? result : input;  // inf and NaN stay
}

}  // namespace rewardfuse::REWARDFUSE_TARGET
