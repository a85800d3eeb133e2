// What the token log-prob kernels are told: rows of logits, one token of each.
#pragma once

#include "common/instruction_set.h"
#include "common/operand.h"

namespace rewardfuse::token_logprobs {

enum class Direction : int8_t { kNone, kReverse, kForward };

// Row r of a tensor [*, V] whose last stride is 1 begins at (r / inner)·outer_stride + (r % inner)·inner_stride.
struct Matrix {
  const void* data = nullptr;
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;
};

struct Problem {
  DType dtype = DType::kFloat32;  // of the logits of both models
  int64_t columns = 0;            // the real ones; what stands beyond is not read
  Matrix logits, ref;             // ref: no data where direction is kNone
  const int64_t* tokens = nullptr;
  const bool* mask = nullptr;           // null: every row counts
  const double* temperature = nullptr;  // by row; null: temperature_value for all
  double temperature_value = 1;
  double softcap = 0;  // 0: none
  Direction direction = Direction::kNone;

  bool counts(int64_t row) const { return mask == nullptr || mask[row]; }
  double temperature_of(int64_t row) const { return temperature ? temperature[row] : temperature_value; }
};

// Where forward writes, one number a row; null where nobody asks.
struct Results {
  void *logprobs = nullptr, *ref_logprobs = nullptr, *kl = nullptr, *entropy = nullptr;  // in the accumulation type
  double *lse = nullptr, *ref_lse = nullptr;
};

// What backward is given by row (null: no gradient of that output) and where it writes.
struct Gradients {
  const double *of_logprobs = nullptr, *of_kl = nullptr, *of_entropy = nullptr;
  const double *kl = nullptr, *entropy = nullptr, *lse = nullptr, *ref_lse = nullptr;  // of forward
  void* logits = nullptr;                                                              // [rows, width], contiguous
  int64_t width = 0;
  bool streams = false;  // past the caches: the gradient is larger than they are
};

}  // namespace rewardfuse::token_logprobs

namespace rewardfuse {

// Rows [begin, end).
struct TokenLogprobsCpu {
  void (*forward)(const token_logprobs::Problem&, const token_logprobs::Results&, int64_t begin, int64_t end);
  void (*backward)(const token_logprobs::Problem&, const token_logprobs::Gradients&, int64_t begin, int64_t end);
};

RF_CPU_VARIANTS(TokenLogprobsCpu, token_logprobs_kernels)

}  // namespace rewardfuse
