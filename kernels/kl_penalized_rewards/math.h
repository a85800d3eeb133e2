// The reward of a token: its share of the score minus β times the estimate of the KL (approx_kl/math.h).
//
//   s = clamp(score), less a penalty, or replaced by it, where the response did not end;   r = s − β·k(x)
//
// β = 0 means no KL term: 0·∞ is no reward. A reward of 0 is +0.
#pragma once

#include "approx_kl/math.h"
#include "kl_penalized_rewards/args.h"

namespace rewardfuse::REWARDFUSE_TARGET {

template <class V, class T>
RF_HD V kl_penalized(V score, T beta, V kl) {
  return beta == T(0) ? score : score - beta * kl;
}

// What a sequence's score becomes; `missed`: the response did not end.
template <class T>
struct ScoreShape {
  T low, high, penalty;
  bool replace;

  // A score that nobody gave is 0, whatever the clip.
  RF_HD explicit ScoreShape(const kl_rewards::Problem& problem)
      : low(problem.scores.data ? T(problem.score_low) : -T(INFINITY)),
        high(problem.scores.data ? T(problem.score_high) : T(INFINITY)),
        penalty(T(problem.missing_eos_penalty)),
        replace(problem.replace) {}

  template <class V>
  RF_HD V clamped(V score) const {
    return ApproxKl<T>::clamp(score, low, high);
  }
  RF_HD T operator()(T score, bool missed) const {
    if (missed && replace) return T(0) - penalty;
    return missed ? clamped(score) - penalty : clamped(score);
  }
  // d s/d score.
  template <class V>
  RF_HD V slope(V score) const {
    return ApproxKl<T>::outside(score, low, high) ? V{} : V{} + 1.0f;
  }
  RF_HD T slope(T score, bool missed) const { return missed && replace ? T(0) : slope(score); }
};

}  // namespace rewardfuse::REWARDFUSE_TARGET
