// Reductions of a loss on torch's side: checks, dtypes, the mean's denominator.
#pragma once

#include <ATen/ATen.h>

#include "common/check.h"

namespace rewardfuse {

inline bool has_normalizer(const OptionalTensor& normalizer, double value) { return present(normalizer) || value != 0; }

inline void check_reduction(Reduction reduction, const OptionalTensor& normalizer, double value, const char* other_name,
                            const at::Tensor& other) {
  TORCH_CHECK_VALUE(reduction >= Reduction::kNone && reduction <= Reduction::kMean,
                    "reduction: expected 0 (none), 1 (sum) or 2 (mean), got ", static_cast<int>(reduction));
  if (!has_normalizer(normalizer, value)) return;
  TORCH_CHECK_VALUE(reduction == Reduction::kMean, "normalizer: expected only with reduction=\"mean\"");
  if (present(normalizer)) {
    TORCH_CHECK_VALUE(normalizer->dim() == 0, "normalizer: expected a positive number or a 0-d tensor, got shape ",
                      normalizer->sym_sizes());
    check_per_item("normalizer", normalizer, other_name, other);
  } else {
    TORCH_CHECK_VALUE(value > 0, "normalizer: expected a positive number or a 0-d tensor, got ", value);
  }
}

inline double cpu_normalizer(const OptionalTensor& normalizer, double number) {
  const double value = present(normalizer) ? normalizer->item().toDouble() : number;
  TORCH_CHECK_VALUE(value > 0, "normalizer: expected a positive number or a 0-d tensor, got ", value);
  return value;
}

inline void check_constant(const char* name, const OptionalTensor& t) {
  TORCH_CHECK_VALUE(!present(t) || !t->requires_grad(), name, ": expected a tensor that requires no gradient");
}

// Losses are float32, float64 for float64 rewards.
inline at::TensorOptions loss_options(const at::Tensor& rewards) {
  return rewards.options().dtype(rewards.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

inline void write_numbers(const at::Tensor& out, std::initializer_list<double> values) {
  int64_t i = 0;
  for (const double value : values) {
    if (out.scalar_type() == at::kDouble) {
      out.mutable_data_ptr<double>()[i++] = value;
    } else {
      out.mutable_data_ptr<float>()[i++] = static_cast<float>(value);
    }
  }
}

inline double mean_or_zero(double sum, double count) { return count > 0 ? sum / count : 0; }

// A normalizer as a CUDA kernel reads it: no data and the number 0 for none.
inline Operand normalizer_operand(const OptionalTensor& normalizer, double value) {
  Operand operand;
  operand.value = value;
  if (present(normalizer)) {
    operand.data = normalizer->const_data_ptr();
    operand.dtype = *kernel_dtype(normalizer->scalar_type());
  }
  return operand;
}

}  // namespace rewardfuse
