// Two models of a comparison that may end in a tie; d = r₁ − r₂, outcome 1 (first wins), ½ (tie), 0 (second wins).
//
// Rao–Kupper (1967), η = log θ ≥ 0:
//   P(first) = σ(d − η), P(second) = σ(−d − η), P(tie) = (1 − e^{−2η})·σ(η + d)·σ(η − d)
// Davidson (1970), λ = log ν: P ∝ e^{d/2}, e^{−d/2}, e^λ.
//
// Every −log σ is a softplus of one sign, computed as log1p of a number in [0, 1] plus a positive part; Davidson's
// normalizer is taken relative to its largest term. d is formed from halves, since r₁ − r₂ may overflow.
#pragma once

#include "common/host_device.h"

namespace rewardfuse::REWARDFUSE_TARGET {

template <class V>
RF_HD auto no_outcome(V outcome) {
  return (outcome != 0.0f) & (outcome != 0.5f) & (outcome != 1.0f);
}

// log(1 + e^x) and its derivative σ(x).
template <class V>
RF_HD V softplus(V x) {
  return log1p_unit(exp_nonpositive(-magnitude(x))) + (x > 0.0f ? x : V{});
}
template <class V>
RF_HD V sigmoid(V x) {
  const V e = exp_nonpositive(-magnitude(x));
  const V likely = 1.0f / (1.0f + e);
  return x < 0.0f ? e * likely : likely;
}

// −log(1 − e^{−x}) for x ≥ 0; inf at 0.
template <class V>
RF_HD V minus_log_one_minus_exp(V x) {
  const V e = exp_nonpositive(-x);
  return e <= 0.5f ? log1p_unit(e / (1.0f - e)) : -log_nonnegative(-expm1_nonpositive(-x));
}

template <class T>
struct RaoKupper {
  RF_HD explicit RaoKupper(const double* /*options*/) {}

  template <class V>
  RF_HD auto invalid(V log_tie, V outcome) const {
    return no_outcome(outcome) | !(log_tie >= 0.0f);
  }

  template <class V>
  RF_HD V loss(V first, V second, V log_tie, V outcome) const {
    const V half = first * 0.5f - second * 0.5f;
    const V above = log_tie + half * 2.0f, below = log_tie - half * 2.0f;
    const V tie = softplus(-above) + softplus(-below) + minus_log_one_minus_exp(log_tie * 2.0f);
    return outcome == 1.0f ? softplus(below) : outcome == 0.0f ? softplus(above) : tie;
  }

  template <class V>
  RF_HD void gradient(V first, V second, V log_tie, V outcome, V& d_first, V& d_second, V& d_log_tie) const {
    const V half = first * 0.5f - second * 0.5f;
    const V above = log_tie + half * 2.0f, below = log_tie - half * 2.0f;
    const V win = sigmoid(below), loss = sigmoid(above);
    const V not_above = sigmoid(-above), not_below = sigmoid(-below);
    const V e = exp_nonpositive(log_tie * -2.0f);
    const V tie = -not_above - not_below - 2.0f * e / magnitude(expm1_nonpositive(log_tie * -2.0f));
    d_first = outcome == 1.0f ? -win : outcome == 0.0f ? loss : not_below - not_above;
    d_second = -d_first;
    d_log_tie = outcome == 1.0f ? win : outcome == 0.0f ? loss : tie;
  }
};

// The three log-weights d/2, −d/2, λ relative to the largest of them: two are e^0 = 1 at most and one is exactly 1.
template <class V>
struct DavidsonWeights {
  V largest, first, second, tie;

  RF_HD DavidsonWeights(V half, V log_tie) {
    const V distance = magnitude(half);
    largest = log_tie > distance ? log_tie : distance;
    first = exp_nonpositive(half - largest);
    second = exp_nonpositive(-half - largest);
    tie = exp_nonpositive(log_tie - largest);
  }
};

template <class T>
struct Davidson {
  RF_HD explicit Davidson(const double* /*options*/) {}

  template <class V>
  RF_HD auto invalid(V log_tie, V outcome) const {
    return no_outcome(outcome) | (log_tie != log_tie);
  }

  template <class V>
  RF_HD V loss(V first, V second, V log_tie, V outcome) const {
    const V half = first * 0.5f - second * 0.5f;
    const DavidsonWeights<V> w(half, log_tie);
    const V chosen = outcome == 1.0f ? half : outcome == 0.0f ? -half : log_tie;
    // log of 1 + x, x the two smaller weights, 0 ≤ x ≤ 2.
    const V x = w.largest == log_tie ? w.first + w.second : w.tie + (half > 0.0f ? w.second : w.first);
    const V tail = x <= 1.0f ? log1p_unit(x) : T(0.69314718055994530942) + log1p_unit((x - 1.0f) * 0.5f);
    return (w.largest - chosen) + tail;
  }

  template <class V>
  RF_HD void gradient(V first, V second, V log_tie, V outcome, V& d_first, V& d_second, V& d_log_tie) const {
    const V half = first * 0.5f - second * 0.5f;
    const DavidsonWeights<V> w(half, log_tie);
    const V total = 1.0f / (w.first + w.second + w.tie);
    const V first_wins = w.first * total, second_wins = w.second * total, tie = w.tie * total;
    // π − 1 of the outcome seen is written as minus the other two, which does not cancel.
    const V d_u_first = outcome == 1.0f ? -(second_wins + tie) : first_wins;
    const V d_u_second = outcome == 0.0f ? -(first_wins + tie) : second_wins;
    d_log_tie = outcome == 0.5f ? -(first_wins + second_wins) : tie;
    d_first = (d_u_first - d_u_second) * 0.5f;
    d_second = -d_first;
  }
};

}  // namespace rewardfuse::REWARDFUSE_TARGET
