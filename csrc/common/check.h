// Argument checks whose messages name the argument, what was expected and what came. Python sees ValueError for a
// value, shape or device and TypeError for a dtype; ops/_checks.py words the same checks for the Python backends.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>

#include "common/dispatch.h"

namespace rewardfuse {

using OptionalTensor = std::optional<at::Tensor>;

inline std::string dtype_name(const at::Tensor& t) {
  return "torch." + std::string(c10::getDtypeNames(t.scalar_type()).first);
}

inline bool present(const OptionalTensor& t) { return t.has_value() && t->defined(); }

inline void check_rewards(const char* name, const at::Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, name,
                   ": expected a tensor of float16, bfloat16, float32 or float64, got ", dtype_name(t));
}

inline void check_device(const char* name, const at::Tensor& t, const char* other_name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(t.device() == other.device(), name, ": expected the device of ", other_name, ", ", other.device(),
                    ", got ", t.device());
}

inline void check_like(const char* name, const at::Tensor& t, const char* other_name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(t.sym_sizes() == other.sym_sizes(), name, ": expected the shape of ", other_name, ", ",
                    other.sym_sizes(), ", got ", t.sym_sizes());
  check_device(name, t, other_name, other);
}

// A per-item argument: a 0-d tensor or exactly the shape of the rewards; any real dtype.
inline void check_per_item(const char* name, const OptionalTensor& t, const char* other_name, const at::Tensor& other) {
  if (!present(t)) return;
  TORCH_CHECK_TYPE(dtype_is_real(t->scalar_type()), name, ": expected a tensor of a real dtype, got ", dtype_name(*t));
  TORCH_CHECK_VALUE(t->dim() == 0 || t->sym_sizes() == other.sym_sizes(), name,
                    ": expected a number, a 0-d tensor or the shape of ", other_name, ", ", other.sym_sizes(), ", got ",
                    t->sym_sizes());
  check_device(name, *t, other_name, other);
}

inline void check_number(const char* name, bool good, const char* expected, double value) {
  TORCH_CHECK_VALUE(good, name, ": expected ", expected, ", got ", value);
}

}  // namespace rewardfuse
