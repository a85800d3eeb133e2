// Registers of the widest kind that the instruction set of this compilation has, through the compilers' vector
// extension (GCC, Clang): arithmetic, comparisons and `mask ? a : b` work lane by lane. Torch-free, host only.
//
// Error of each function: at most 4 units in the last place over its whole range, subnormal results included to within
// the smallest subnormal (tests/test_accuracy.py measures them through the ops).
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

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

// The same within the type, for sums whose terms are many and short.
template <class V>
RF_HD lane_t<V> add_lanes(V x) {
#ifdef __AVX512F__
  if constexpr (sizeof(x[0]) == 4) return _mm512_reduce_add_ps((__m512)x);
  if constexpr (sizeof(x[0]) == 8) return _mm512_reduce_add_pd((__m512d)x);
#endif
  lane_t<V> total = 0;
  for (unsigned j = 0; j < sizeof(V) / sizeof(x[0]); ++j) total += x[j];
  return total;
}

// Σ c[k]·x^k, in pairs (Estrin): half the latency of Horner's rule, which the loops here wait for.
template <class V, class T, int terms>
RF_HD V polynomial(V x, const T (&c)[terms]) {
  if constexpr (terms == 1) {
    return broadcast<T>(c[0]);
  } else {
    constexpr int half = (terms + 1) / 2;
    V pair[half];
    for (int k = 0; k < half; ++k) {
      pair[k] = 2 * k + 1 < terms ? x * c[2 * k + 1] + c[2 * k] : broadcast<T>(c[2 * k]);
    }
    V power = x * x;
    for (int width = half; width > 1; width = (width + 1) / 2) {
      for (int k = 0; k < (width + 1) / 2; ++k) {
        pair[k] = 2 * k + 1 < width ? pair[2 * k + 1] * power + pair[2 * k] : pair[2 * k];
      }
      power *= power;
    }
    return pair[0];
  }
}

// expm1(r)/r on |r| ≤ ln 2 / 2, (expm1(r) − r)/r² on |r| ≤ ln 2, and atanh(s)/s in s² on s ≤ 1/3: in float32 the
// polynomials of least relative error (1.1e-8, 1.2e-8 and 4e-9), in float64 the Taylor series.
template <class T>
struct Coefficients {
  T expm1[13], expm1_minus_r[17], atanh[17];
  constexpr Coefficients() : expm1{}, expm1_minus_r{}, atanh{} {
    T factorial = 1;
    for (int k = 0; k < 13; ++k) expm1[k] = 1 / (factorial *= k + 1);
    factorial = 1;
    for (int k = 0; k < 17; ++k) expm1_minus_r[k] = 1 / (factorial *= k + 2);
    for (int k = 0; k < 17; ++k) atanh[k] = T(1) / (2 * k + 1);
  }
};
template <>
struct Coefficients<float> {
  float expm1[6] = {1, 0.49999997f, 0.166665062f, 0.0416671373f, 0.00836907607f, 0.00138888729f};
  float expm1_minus_r[7] = {0.5f,           0.166666701f,    0.0416666567f,  0.00833278988f,
                            0.00138893141f, 0.000200718117f, 2.48896868e-05f};
  float atanh[5] = {1, 0.333331585f, 0.200124547f, 0.139803007f, 0.140891671f};
};

template <class V, class = decltype(V{}[0])>
RF_HD V magnitude(V x) {
  using T = lane_t<V>;
  using Mask = typename Lanes<T>::Mask;
  return (V)((Mask)x & ~(Mask)broadcast<T>(T(-0.0)));
}

template <class V>
RF_HD V at_least(V x, lane_t<V> floor) {  // NaN stays
#ifdef __AVX512F__
  if constexpr (sizeof(floor) == 4) return (V)_mm512_max_ps(_mm512_set1_ps(floor), (__m512)x);
  if constexpr (sizeof(floor) == 8) return (V)_mm512_max_pd(_mm512_set1_pd(floor), (__m512d)x);
#else
  return x < floor ? broadcast(floor) : x;
#endif
}

// 2^f on 0 ≤ f ≤ 1: in float32 the polynomial of least relative error (8.3e-8) that is 1 at 0; in float64 the Taylor
// series at ½, in f − ½.
template <class T>
struct Exp2Coefficients {
  static constexpr T origin = T(0.5);
  T terms[15];
  constexpr Exp2Coefficients() : terms{} {
    T term = T(1.41421356237309504880);
    for (int k = 0; k < 15; term *= T(0.69314718055994530942) / ++k) terms[k] = term;
  }
};
template <>
struct Exp2Coefficients<float> {
  static constexpr float origin = 0;
  float terms[6] = {1, 0.6931513f, 0.2401646f, 0.055799514f, 0.009017481f, 0.0018669526f};
};

// x = n·ln 2 + r with |r| ≤ ln 2 / 2; expm1(r) by a polynomial.
template <class V>
struct ExpParts {
  using T = lane_t<V>;
  using Mask = typename Lanes<T>::Mask;
  static constexpr bool f32 = sizeof(T) == 4;
  static constexpr T round_to_int = f32 ? T(12582912) : T(6755399441055744);  // 1.5·2^23, 1.5·2^52
  static constexpr T log2_e = T(1.44269504088896340736);
  static constexpr T ln2_high = f32 ? T(0.693359375) : T(6.93145751953125e-1);
  static constexpr T ln2_low = f32 ? T(-2.12194440054690583e-4) : T(1.42860682030941723212e-6);
  V expm1_r, shifted, n;

  RF_HD explicit ExpParts(V x) {
    constexpr T lowest = f32 ? T(-104) : T(-746);
    constexpr Coefficients<T> series;
    x = at_least(x, lowest);
    shifted = x * log2_e + round_to_int;
    n = shifted - round_to_int;
    const V r = (x - n * ln2_high) - n * ln2_low;
    expm1_r = polynomial(r, series.expm1) * r;
  }

  RF_HD Mask exponent() const { return (Mask)shifted - (Mask)broadcast<T>(round_to_int); }
  static RF_HD V power_of_two(Mask n) { return (V)((n + (f32 ? 127 : 1023)) << (f32 ? 23 : 52)); }
};

template <class V, class = decltype(V{}[0])>
RF_HD V exp_nonpositive(V x) {
  const ExpParts<V> parts(x);
  const V mantissa = 1.0f + parts.expm1_r;
#ifdef __AVX512F__
  if constexpr (sizeof(lane_t<V>) == 4) {
    return (V)_mm512_scalef_ps((__m512)mantissa, (__m512)parts.n);
  } else {
    return (V)_mm512_scalef_pd((__m512d)mantissa, (__m512d)parts.n);
  }
#else
  // 2^n in two factors, so that subnormal results come out.
  const auto n = parts.exponent(), half = n >> 1;
  return mantissa * parts.power_of_two(half) * parts.power_of_two(n - half);
#endif
}

// 2^x for any x, in half of exp_nonpositive's instructions: relatively right to 2.1e-7 in float32. −inf gives 0; below
// −126 (float64: −1022) the result is subnormal or 0; from 128 (1024) on it is at least 2^127 (2^1023).
template <class V, class = decltype(V{}[0])>
RF_HD V exp2_any(V x) {
  using T = lane_t<V>;
  constexpr bool f32 = sizeof(T) == 4;
  constexpr Exp2Coefficients<T> series;
  constexpr int degree = sizeof(series.terms) / sizeof(T) - 1;
#ifdef __AVX512F__
  constexpr int floor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  V whole;
  if constexpr (f32) whole = (V)_mm512_roundscale_ps((__m512)x, floor);
  if constexpr (!f32) whole = (V)_mm512_roundscale_pd((__m512d)x, floor);
  const V f = x - whole;
#else
  constexpr T highest = f32 ? 127 : 1023;
  const V bounded = x > highest ? broadcast<T>(highest) : x;
  const V shifted = (bounded - T(0.5)) + ExpParts<V>::round_to_int;
  const V f = bounded - (shifted - ExpParts<V>::round_to_int);
#endif
  // Horner's rule: the fewest instructions. Nothing here waits for its latency.
  const V r = f - series.origin;
  V mantissa = broadcast<T>(series.terms[degree]);
  for (int k = degree - 1; k >= 0; --k) mantissa = mantissa * r + series.terms[k];
#ifdef __AVX512F__
  if constexpr (f32) return (V)_mm512_scalef_ps((__m512)mantissa, (__m512)x);  // by 2^⌊x⌋
  if constexpr (!f32) return (V)_mm512_scalef_pd((__m512d)mantissa, (__m512d)x);
#else
  const auto n = (typename Lanes<T>::Mask)shifted - (typename Lanes<T>::Mask)broadcast<T>(ExpParts<V>::round_to_int);
  const V result = mantissa * ExpParts<V>::power_of_two(n);
  return x < (f32 ? T(-126) : T(-1022)) ? V{} : result;
#endif
}

template <class V, class = decltype(V{}[0])>
RF_HD V expm1_nonpositive(V x) {
  const ExpParts<V> parts(at_least(x, -64));  // there −1 to the last bit, and 2^n is normal
  const V scale = parts.power_of_two(parts.exponent());
  return scale * parts.expm1_r + (scale - 1.0f);
}

// Around 0, where the terms cancel, n stays 0 as far as |x| ≤ ln 2.
template <class V, class = decltype(V{}[0])>
RF_HD V expm1_minus_x(V x) {
  using Parts = ExpParts<V>;
  using T = lane_t<V>;
  constexpr Coefficients<T> series;
  const V y = at_least(x, -64);  // there expm1 is −1 to the last bit, and 2^n is normal
  const auto is_near = magnitude(y) <= T(0.69314718055994530942);
  const V shifted = is_near ? broadcast(Parts::round_to_int) : y * Parts::log2_e + Parts::round_to_int;
  const V n = shifted - Parts::round_to_int;
  const V r = (y - n * Parts::ln2_high) - n * Parts::ln2_low;
  const V near = polynomial(r, series.expm1_minus_r) * (r * r);
  const V scale =
      Parts::power_of_two((typename Lanes<T>::Mask)shifted - (typename Lanes<T>::Mask)broadcast(Parts::round_to_int));
  return is_near ? near : (scale * (near + r) + (scale - 1.0f)) - x;
}

// log(1 + x) = 2·atanh(s), s = x / (2 + x) ≤ 1/3: the odd series needs no range reduction.
template <class V, class = decltype(V{}[0])>
RF_HD V log1p_unit(V x) {
  using T = lane_t<V>;
  constexpr Coefficients<T> series;
  const V s = x / (x + T(2));
  return (s + s) * polynomial(s * s, series.atanh);
}

// x = 2^n·m with √½ ≤ m < √2; log(m) = 2·atanh((m − 1) / (m + 1)).
template <class V, class = decltype(V{}[0])>
RF_HD V log_nonnegative(V x) {
  using T = lane_t<V>;
  using Mask = typename Lanes<T>::Mask;
  constexpr bool f32 = sizeof(T) == 4;
  constexpr int mantissa = f32 ? 23 : 52;
  constexpr Coefficients<T> series;
  constexpr T smallest_normal = f32 ? T(0x1p-126) : T(0x1p-1022), lift = f32 ? T(0x1p24) : T(0x1p54);
  const V input = x;
  const Mask subnormal = x < smallest_normal;
  x = subnormal ? x * lift : x;
  const Mask root_half = (Mask)broadcast<T>(T(0.70710678118654752440));
  const Mask n = ((Mask)x - root_half) >> mantissa;
  const V m = (V)((Mask)x - (n << mantissa));
  const V s = (m - 1.0f) / (m + 1.0f);
  V whole = __builtin_convertvector(n, V);
  whole -= subnormal ? broadcast<T>(f32 ? 24 : 54) : V{};
  V result = whole * T(0.69314718055994530942) + (s + s) * polynomial(s * s, series.atanh);
  result = input == 0.0f ? broadcast<T>(-__builtin_inf()) : result;
  return input <= T(f32 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023) ? result : input;  // inf and NaN stay
}

}  // namespace rewardfuse::REWARDFUSE_TARGET
