// Estimators of KL(π‖ρ) from one token, x = log π − log ρ: values, derivatives, and the clamps around them.
//
//   k1 = x,   k2 = x²/2,   k3 = e^{−x} − 1 + x,   abs = |x|
//
// k3 saturates: below x = −80 it stays what it is there, finite in float32, and its derivative is 0. Its terms cancel
// near 0, so for |x| ≤ 1 it is the series x²·Σ (−x)^n/(n + 2)!, beyond expm1(−x) + x. For |x| ≤ 80 it is off by at most
// 4 units in the last place.
//
// Bounds belong to what a clamp lets through; a NaN is outside of nothing.
#pragma once

#include "common/host_device.h"

namespace rewardfuse::REWARDFUSE_TARGET {

enum class KlEstimator : int8_t { kOfValue = -1, kK1, kK2, kK3, kAbs };  // kOfValue: for a gradient, the value's own

template <int n>
constexpr double kFactorial = n * kFactorial<n - 1>;
template <>
constexpr double kFactorial<1> = 1;

template <class T>
struct ApproxKl {
  static constexpr float kSaturation = -80.0f;

  KlEstimator of_value, of_gradient;
  T input_low, input_high, output_low, output_high;

  RF_HD explicit ApproxKl(const double* options)
      : of_value(KlEstimator(int8_t(options[0]))),
        of_gradient(KlEstimator(int8_t(options[1]))),
        input_low(T(options[2])),
        input_high(T(options[3])),
        output_low(T(options[4])),
        output_high(T(options[5])) {}

  template <class V>
  static RF_HD V clamp(V x, T low, T high) {
    x = x < low ? V{} + low : x;
    return x > high ? V{} + high : x;
  }

  template <class V>
  static RF_HD auto outside(V x, T low, T high) {
    return (x < low) | (x > high);
  }

  // Σ x^{2k}/(n + 2k)! as far as T tells on |x| ≤ 1.
  template <int n, class V>
  static RF_HD V series(V square) {
    constexpr int kLast = sizeof(T) == 4 ? 11 : 19;
    constexpr T coefficient = T(1 / kFactorial<n>);
    if constexpr (n + 2 > kLast)
      return V{} + coefficient;
    else
      return series<n + 2>(square) * square + coefficient;
  }

  template <class V>
  static RF_HD V k3(V x) {
    x = x < kSaturation ? V{} + kSaturation : x;
    const V square = x * x;
    const V near = square * (series<2>(square) - series<3>(square) * x);
    return magnitude(x) <= 1.0f ? near : expm1_nonpositive(-x) + x;
  }

  template <class V>
  RF_HD V estimate(V x) const {
    switch (of_value) {
      case KlEstimator::kK2: return (x * 0.5f) * x;
      case KlEstimator::kK3: return k3(x);
      case KlEstimator::kAbs: return magnitude(x);
      default: return x;
    }
  }

  template <class V>
  static RF_HD V derivative(KlEstimator estimator, V x) {
    const V zero{};
    const V one = zero + 1.0f;
    switch (estimator) {
      case KlEstimator::kK2: return x;
      case KlEstimator::kK3: return x < kSaturation ? zero : -expm1_nonpositive(-x);
      case KlEstimator::kAbs: return x > 0.0f ? one : x < 0.0f ? -one : x;
      default: return one;
    }
  }

  // The value before the weight and the output clamp; the value.
  template <class V>
  RF_HD V unweighted(V x) const {
    return estimate(clamp(x, input_low, input_high));
  }
  template <class V>
  RF_HD V value(V x) const {
    return clamp(unweighted(x), output_low, output_high);
  }

  // d value/d x of what has weight 1, and of what has weight w.
  template <class V>
  RF_HD V slope(V x) const {
    return slope(x, V{} + 1.0f);
  }
  template <class V>
  RF_HD V slope(V x, V w) const {
    if (of_gradient != KlEstimator::kOfValue) return w * derivative(of_gradient, x);
    const V v = w * unweighted(x);
    return outside(x, input_low, input_high) | outside(v, output_low, output_high) ? V{} : w * derivative(of_value, x);
  }

  // As a model of pairs (pairwise/args.h): a = log π, b = log ρ, p = the importance weight w, no q.
  template <class V>
  RF_HD auto invalid(V w, V /*q*/) const {
    using Mask = decltype(w < w);
    return Mask{};
  }

  template <class V>
  RF_HD V loss(V logprob, V ref_logprob, V w, V /*q*/) const {
    return clamp(w * unweighted(logprob - ref_logprob), output_low, output_high);
  }

  template <class V>
  RF_HD void gradient(V logprob, V ref_logprob, V w, V /*q*/, V& d_logprob, V& d_ref_logprob, V& d_w) const {
    const V x = logprob - ref_logprob;
    const V plain = unweighted(x);
    d_logprob = slope(x, w);
    d_ref_logprob = V{};
    d_w = outside(w * plain, output_low, output_high) ? V{} : plain;
  }
};

}  // namespace rewardfuse::REWARDFUSE_TARGET
