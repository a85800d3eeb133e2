// One pair of a list: items i and j with labels y_i ≠ y_j.
//
//   z = sign(y_i − y_j)·(s_i − s_j) − m·|y_i − y_j|,   loss −log σ(z),   ∂/∂s_i = −sign(y_i − y_j)·σ(−z) = −∂/∂s_j
//
// With e = exp(−|z|): −log σ(z) = log1p(e) + max(−z, 0). Nothing overflows, nothing cancels.
#pragma once

#include "common/host_device.h"

namespace rewardfuse::REWARDFUSE_TARGET {

template <class V>
struct PairOfItems {
  V sign, z;

  RF_HD PairOfItems(V score, V label, V other_score, V other_label, V margin) {
    const V one = V{} + 1.0f;
    sign = label > other_label ? one : (label < other_label ? -one : V{});
    z = sign * (score - other_score) - margin * magnitude(label - other_label);
  }

  RF_HD V loss() const { return log1p_unit(exp_nonpositive(-magnitude(z))) + (z < 0.0f ? -z : V{}); }

  // ∂/∂score.
  RF_HD V slope() const {
    const V e = exp_nonpositive(-magnitude(z));
    return -sign * ((z < 0.0f ? V{} + 1.0f : e) / (1.0f + e));
  }
};

}  // namespace rewardfuse::REWARDFUSE_TARGET
