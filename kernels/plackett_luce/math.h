// Plackett–Luce, stage by stage.
//
//   L_i = log Σ_{j ≥ i} e^{s_j},   NLL = Σ_i u_i·L_i − v_i·s_i
//
// L_i is carried as max_i + log(sum_i), sum_i ≥ 1 relative to the largest score from i on: no exponent is positive, and
// L_i − s_i is not a difference of large numbers. With
//
//   a_i = Σ_{j ≤ i} u_j·e^{max_i − max_j} / sum_j = u_i / sum_i + a_{i−1}·e^{max_i − max_{i−1}}
//   ∂NLL/∂s_i = e^{s_i − max_i}·a_i − v_i
//
// The maximum seldom falls, so a is a plain sum over long stretches; Q_i = a_i·sum_i, by a recurrence of its own
// (Q_i = u_i + Q_{i−1}·e^{L_i − L_{i−1}}), is a product of as many rounded factors as there are positions.
#pragma once

#include "common/host_device.h"

namespace rewardfuse::REWARDFUSE_TARGET {

// log Σ e^s from some place on. Of nothing: max the lowest finite number (so that differences are not NaN), sum 0.
template <class V>
struct Suffix {
  V max, sum;
};

// What putting a score in front does: sum' = sum·keep + add, keep = e^{max − max'}, add = e^{s − max'}; one of them
// is 1.
template <class V>
struct Step {
  V keep, add;
};

// `max` follows the largest score once that is ahead of it by more than `slack`. With slack 0 it is the maximum. In a
// list that is in order already every score is a new maximum, and thousands of factors close to 1 are rounded in the
// same direction; with slack 1 there is one for each unit that the scores climb.
template <int slack = 0, class V>
RF_HD Step<V> put_in_front(Suffix<V>& suffix, V score) {
  const V one = V{} + 1.0f, ahead = score - suffix.max;
  const auto up = ahead > V{} + float(slack);
  const V e = exp_nonpositive(slack == 0 ? -magnitude(ahead) : up ? -ahead : ahead);
  const Step<V> step{up ? e : one, up ? one : e};
  suffix.sum = suffix.sum * step.keep + step.add;
  suffix.max = up ? score : suffix.max;
  return step;
}

}  // namespace rewardfuse::REWARDFUSE_TARGET
