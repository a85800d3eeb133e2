// Plackett–Luce, stage by stage.
//
//   L_i = log Σ_{j ≥ i} e^{s_j},   NLL = Σ_i u_i·L_i − v_i·s_i
//   p_i = e^{s_i − L_i},  r_i = e^{L_{i+1} − L_i},  Q_i = u_i + r_{i−1}·Q_{i−1},  ∂NLL/∂s_i = p_i·Q_i − v_i
//
// L_i is carried as max + log(sum), sum ≥ 1 relative to the largest score from i on, so that no exponent is positive,
// L_i − s_i is not a difference of large numbers, and r_i keeps its relative accuracy where 1 − p_i would not.
#pragma once

#include "common/host_device.h"

namespace rewardfuse::REWARDFUSE_TARGET {

// log Σ e^s from some place on. Of nothing: max the lowest finite number (so that differences are not NaN), sum 0.
template <class V>
struct Suffix {
  V max, sum;
};

// What putting a score in front does: sum' = sum·keep + add.
template <class V>
struct Step {
  V keep, add;
};

template <class V>
RF_HD Step<V> put_in_front(Suffix<V>& suffix, V score) {
  const V one = V{} + 1.0f;
  const auto up = score > suffix.max;
  const V e = exp_nonpositive(-magnitude(score - suffix.max));
  const Step<V> step{up ? e : one, up ? one : e};
  suffix.sum = suffix.sum * step.keep + step.add;
  suffix.max = up ? score : suffix.max;
  return step;
}

}  // namespace rewardfuse::REWARDFUSE_TARGET
