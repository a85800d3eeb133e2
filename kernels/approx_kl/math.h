// Estimators of KL(π‖ρ) from one token, x = log π − log ρ: values, derivatives, and the clamps around them.
//
//   k1 = x,   k2 = x²/2,   k3 = e^{−x} − 1 + x,   abs = |x|
//
// k3 saturates: below x = −80 it stays what it is there, finite in float32, and its derivative is 0. Its terms cancel
// near 0, where it is a series; it is off by at most 4 units in the last place.
//
// Bounds belong to what a clamp lets through; a NaN is outside of nothing.
#pragma once

#include "common/host_device.h"

namespace rewardfuse::REWARDFUSE_TARGET {

enum class KlEstimator : int8_t { kOfValue = -1, kK1, kK2, kK3, kAbs };  // kOfValue: for a gradient, the value's own

template <class T>
struct ApproxKl {
  static constexpr float kSaturation = -80.0f;

  KlEstimator of_value, of_gradient;
  T input_low, input_high, output_low, output_high;
  bool clamps_input, clamps_output;

  RF_HD explicit ApproxKl(const double* options)
      : of_value(KlEstimator(int8_t(options[0]))),
        of_gradient(KlEstimator(int8_t(options[1]))),
        input_low(T(options[2])),
        input_high(T(options[3])),
        output_low(T(options[4])),
        output_high(T(options[5])),
        clamps_input(input_low > -T(INFINITY) || input_high < T(INFINITY)),
        clamps_output(output_low > -T(INFINITY) || output_high < T(INFINITY)) {}

  template <class V>
  static RF_HD V clamp(V x, T low, T high) {
    x = x < low ? V{} + low : x;
    return x > high ? V{} + high : x;
  }

  template <class V>
  static RF_HD auto outside(V x, T low, T high) {
    return (x < low) | (x > high);
  }

  template <class V>
  static RF_HD V k3(V x) {
    return expm1_minus_x(x < kSaturation ? V{} - kSaturation : -x);
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
    return estimate(clamps_input ? clamp(x, input_low, input_high) : x);
  }
  template <class V>
  RF_HD V value(V x, V w) const {
    const V v = w * unweighted(x);
    return clamps_output ? clamp(v, output_low, output_high) : v;
  }

  // d value/d x and d value/d w.
  template <class V>
  RF_HD V slope(V x, V w) const {
    if (of_gradient != KlEstimator::kOfValue) return w * derivative(of_gradient, x);
    V slope = w * derivative(of_value, x);
    if (clamps_input) slope = outside(x, input_low, input_high) ? V{} : slope;
    if (clamps_output) slope = outside(w * unweighted(x), output_low, output_high) ? V{} : slope;
    return slope;
  }
  template <class V>
  RF_HD V slope_of_weight(V x, V w) const {
    const V v = unweighted(x);
    return outside(w * v, output_low, output_high) ? V{} : v;
  }

  // As a model of pairs (pairwise/args.h): a = log π, b = log ρ, p = the importance weight w, no q.
  template <class V>
  RF_HD auto invalid(V w, V /*q*/) const {
    using Mask = decltype(w < w);
    return Mask{};
  }

  template <class V>
  RF_HD V loss(V logprob, V ref_logprob, V w, V /*q*/) const {
    return value(logprob - ref_logprob, w);
  }

  template <class V>
  RF_HD void gradient(V logprob, V ref_logprob, V w, V /*q*/, V& d_logprob, V& d_ref_logprob, V& d_w) const {
    const V x = logprob - ref_logprob;
    d_logprob = slope(x, w);
    d_ref_logprob = V{};
    d_w = slope_of_weight(x, w);
  }
};

}  // namespace rewardfuse::REWARDFUSE_TARGET
