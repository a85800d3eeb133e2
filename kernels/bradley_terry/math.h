// Bradley–Terry with margin, soft target and centering: the loss of one pair and its derivatives.
//
//   z = β(c − r) − m,   t = target(1 − ε) + (1 − target)ε
//   ℓ = −t·log σ(z) − (1 − t)·log σ(−z) + κ(c + r)²
//
// With σ(−|z|) = e/(1 + e), e = exp(−|z|): −log σ(|z|) = log1p(e), and the unlikelier side costs |z| more. Nothing
// overflows, nothing cancels. (c ± r)/2 is formed first, since c ± r may overflow where its products with β, κ do not.
#pragma once

#include "common/host_device.h"

namespace rewardfuse::REWARDFUSE_TARGET {

template <class T>
struct BradleyTerry {
  T smoothing, two_beta, four_center;

  RF_HD explicit BradleyTerry(const double* options)
      : smoothing(T(options[0])), two_beta(T(2 * options[1])), four_center(T(4 * options[2])) {}

  template <class V>
  RF_HD V logit(V chosen, V rejected, V margin) const {
    return (chosen * 0.5f - rejected * 0.5f) * two_beta - margin;
  }

  template <class V>
  RF_HD V soft_target(V target) const {
    return target * (1.0f - 2.0f * smoothing) + smoothing;
  }

  template <class V>
  RF_HD auto invalid(V /*margin*/, V target) const {
    return !((target >= 0.0f) & (target <= 1.0f));
  }

  template <class V>
  RF_HD V loss(V chosen, V rejected, V margin, V target) const {
    const V z = logit(chosen, rejected, margin);
    const V t = soft_target(target);
    const V distance = magnitude(z);
    const V against = z < 0.0f ? t : 1.0f - t;  // probability mass on the unlikelier side
    V value = log1p_unit(exp_nonpositive(-distance));
    value += against == 0.0f ? V{} : against * distance;  // 0·inf is not a loss
    if (four_center != 0) {
      const V half_sum = chosen * 0.5f + rejected * 0.5f;
      value += (half_sum * four_center) * half_sum;
    }
    return value;
  }

  template <class V>
  RF_HD void gradient(V chosen, V rejected, V margin, V target, V& d_chosen, V& d_rejected, V& d_margin) const {
    const V z = logit(chosen, rejected, margin);
    const V t = soft_target(target);
    const V e = exp_nonpositive(-magnitude(z));
    const V likely = 1.0f / (1.0f + e);
    const V unlikely = e * likely;
    const V sigma = z < 0.0f ? unlikely : likely;
    const V sigma_neg = z < 0.0f ? likely : unlikely;
    const V d_z = (1.0f - t) * sigma - t * sigma_neg;
    d_margin = -d_z;
    d_chosen = d_z * (two_beta * 0.5f);
    d_rejected = -d_chosen;
    if (four_center != 0) {
      const V d_center = (chosen * 0.5f + rejected * 0.5f) * four_center;
      d_chosen += d_center;
      d_rejected += d_center;
    }
  }
};

}  // namespace rewardfuse::REWARDFUSE_TARGET
