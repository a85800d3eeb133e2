// From torch tensors to what the torch-free kernels read.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "common/operand.h"

namespace rewardfuse {

inline std::optional<DType> kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kHalf: return DType::kFloat16;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kBool: return DType::kBool;
    case at::kByte: return DType::kUInt8;
    case at::kChar: return DType::kInt8;
    case at::kShort: return DType::kInt16;
    case at::kInt: return DType::kInt32;
    case at::kLong: return DType::kInt64;
    default: return std::nullopt;
  }
}

inline bool dtype_is_real(at::ScalarType type) { return kernel_dtype(type).has_value(); }

// Lays tensors of one shape (undefined ones and 0-d ones aside) over a plane of at most two strided dimensions. A
// layout that needs more is made contiguous first; the copies live as long as this object.
class PlaneLayout {
 public:
  explicit PlaneLayout(at::IntArrayRef sizes) : sizes_(sizes.vec()) {}

  void add(Operand& operand, const at::Tensor& tensor) {
    operand.dtype = *kernel_dtype(tensor.scalar_type());
    entries_.push_back({&operand, tensor});
  }

  void add(Operand& operand, const std::optional<at::Tensor>& tensor, double value) {
    operand.value = value;
    if (tensor.has_value() && tensor->defined()) add(operand, *tensor);
  }

  Plane lay() {
    auto outer_dims = collapse();
    if (outer_dims < 0) {
      for (auto& entry : entries_) entry.tensor = entry.tensor.contiguous();
      outer_dims = collapse();
    }
    for (auto& entry : entries_) entry.operand->data = entry.tensor.const_data_ptr();
    int64_t items = 1, inner = 1;
    for (int64_t d = 0; d < static_cast<int64_t>(sizes_.size()); ++d) {
      items *= sizes_[d];
      if (d >= outer_dims) inner *= sizes_[d];
    }
    return {items, inner > 0 ? inner : 1};
  }

 private:
  struct Entry {
    Operand* operand;
    at::Tensor tensor;
  };

  // Sets the strides and returns how many leading dimensions form the outer one, or −1 where two do not suffice.
  int64_t collapse() {
    int64_t split = 0, groups = 0, inner_dim = -1;
    for (auto& entry : entries_) entry.operand->outer_stride = entry.operand->inner_stride = 0;
    for (int64_t d = static_cast<int64_t>(sizes_.size()) - 1; d >= 0; --d) {
      if (sizes_[d] == 1) continue;
      if (groups > 0 && merges(d, inner_dim)) {
        inner_dim = d;
        continue;
      }
      if (++groups > 2) return -1;
      inner_dim = d;
      for (auto& entry : entries_) {
        if (entry.tensor.dim() == 0) continue;
        (groups == 1 ? entry.operand->inner_stride : entry.operand->outer_stride) = entry.tensor.stride(d);
      }
      if (groups == 2) split = d + 1;
    }
    return split;
  }

  bool merges(int64_t outer, int64_t inner) const {
    for (const auto& entry : entries_) {
      if (entry.tensor.dim() == 0) continue;
      if (entry.tensor.stride(outer) != entry.tensor.stride(inner) * sizes_[inner]) return false;
    }
    return true;
  }

  std::vector<int64_t> sizes_;
  std::vector<Entry> entries_;
};

}  // namespace rewardfuse
