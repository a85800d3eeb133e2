// One row of logits: p_j = cap(l_j) / T, π = softmax(p); the reference's likewise: q, ρ.
//
//   cap(l) = c·tanh(l / c)                      d cap = 1 − tanh² = 4E / (1 + E)², E = e^{−2|l| / c}
//   log-prob of token a     p_a − lse           lse = log Σ e^p
//   entropy                 H = lse − Σ π·p
//   reverse KL(π‖ρ)         Σ π·(p − q) − lse + ref_lse
//   forward KL(ρ‖π)         Σ ρ·(q − p) − ref_lse + lse
//
// Their gradients in p_j are of one form, π_j·(c0 + c1·log π_j + c2·log ρ_j) + c3·ρ_j + [j = a]·g.
#pragma once

#include "common/host_device.h"

namespace rewardfuse::REWARDFUSE_TARGET {

// With expm1, so that small logits keep their digits.
template <class V, class T>
RF_HD V soft_cap(V logit, T cap) {
  const V e = expm1_nonpositive(magnitude(logit) * (T(-2) / cap));
  const V size = cap * (-e / (2.0f + e));
  return logit < 0.0f ? -size : size;
}

// Not 1 − tanh², which has no digits left where the cap is near.
template <class V, class T>
RF_HD V soft_cap_slope(V logit, T cap) {
  const V e = exp_nonpositive(magnitude(logit) * (T(-2) / cap));
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

// c0 … c3 of a row from the gradients of its outputs.
struct RowSlopes {
  double one = 0, log_policy = 0, log_ref = 0, ref = 0;

  RF_HD void add_logprob(double gradient) { one -= gradient; }
  RF_HD void add_entropy(double gradient, double entropy) {
    log_policy -= gradient;
    one -= gradient * entropy;
  }
  RF_HD void add_reverse_kl(double gradient, double kl) {
    log_policy += gradient;
    log_ref -= gradient;
    one -= gradient * kl;
  }
  RF_HD void add_forward_kl(double gradient) {
    one += gradient;
    ref -= gradient;
  }
};

}  // namespace rewardfuse::REWARDFUSE_TARGET
