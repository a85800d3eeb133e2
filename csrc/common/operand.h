// How a kernel sees a tensor argument. Torch-free.
#pragma once

#include <stdint.h>

namespace rewardfuse {

enum class DType : int8_t { kFloat32, kFloat64, kFloat16, kBFloat16, kBool, kUInt8, kInt8, kInt16, kInt32, kInt64 };

enum class Reduction : int8_t { kNone, kSum, kMean };

// Items are numbered 0..items−1 in row-major order; item i stands at (i / inner, i % inner).
struct Plane {
  int64_t items = 0;
  int64_t inner = 1;
};

// A tensor laid over a plane with two element strides (0 repeats), or, where data is null, one number for every item.
struct Operand {
  const void* data = nullptr;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
  double value = 0;
  DType dtype = DType::kFloat32;
};

}  // namespace rewardfuse
