// The options that approx_kl and kl_penalized_rewards share, checked; ops/approx_kl.py words these checks alike.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace rewardfuse {

inline void check_clamp(const char* name, double low, double high) {
  TORCH_CHECK_VALUE(low < high, name, ": expected low < high, got ", low, " and ", high);
}

inline void check_estimators(int64_t estimator, int64_t gradient_estimator) {
  TORCH_CHECK_VALUE(estimator >= 0 && estimator <= 3, "estimator: expected 0 (k1), 1 (k2), 2 (k3) or 3 (abs), got ",
                    estimator);
  TORCH_CHECK_VALUE(gradient_estimator >= -1 && gradient_estimator <= 3,
                    "gradient_estimator: expected -1 (that of the value) or 0 to 3, got ", gradient_estimator);
}

}  // namespace rewardfuse
