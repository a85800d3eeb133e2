// What every kernel on lists of scores is told: plackett_luce and all_pairs.
#pragma once

#include "common/host_device.h"
#include "common/launch.h"
#include "common/operand.h"

namespace rewardfuse::lists {

// List r holds the scores at r·outer + i·inner for i < size; or, packed, those from cu_seqlens[r] to cu_seqlens[r + 1].
struct Lists {
  int64_t count = 0;
  int64_t size = 0;     // items a padded list; packed: items of all lists
  int64_t longest = 0;  // items of the longest list; unknown (0) to CUDA where packed
  DType dtype = DType::kFloat32;
  Operand scores;                       // [count, size] or [size]
  const int64_t* cu_seqlens = nullptr;  // [count + 1]; null: padded
  const int64_t* lengths = nullptr;     // [count]; null: all items are there
  Operand mask;                         // [count, size] boolean; no data: all items are there
  Operand weight;                       // [count], or a number; a list of weight 0 is read by nobody
};

// Sums over lists.
struct Totals {
  double loss = 0;
  double valid = 0;    // lists that a mean counts
  double invalid = 0;  // lists with an index or a label that cannot be; their loss is NaN

  RF_HD void add(const Totals& other) {
    loss += other.loss;
    valid += other.valid;
    invalid += other.invalid;
  }
};

// d(loss)/d(list r) = grad_output[r] · scale, where grad_output repeats for a reduced loss.
struct Gradients {
  Operand grad_output;
  double scale = 1;
  void* scores = nullptr;       // contiguous, in the storage type and shape of the scores
  const void* saved = nullptr;  // what forward left for the op's backward
  // CUDA only, read on the device so that nothing waits: the mean's count of lists, a normalizer, and each list's
  // loss: where that is NaN, so is the list's gradient.
  const double* denominator = nullptr;
  Operand normalizer;
  const void* list_loss = nullptr;  // [count] in the accumulation type
};

// Where a CUDA forward writes.
struct CudaForward {
  Reduction reduction = Reduction::kMean;
  void* loss = nullptr;           // [] in the accumulation type; unused for "none"
  void* list_loss = nullptr;      // [count] in the accumulation type, weighted
  void* saved = nullptr;          // for backward
  double* denominator = nullptr;  // [] or null
  Operand normalizer;             // number 0: none
};

// The entry points of an op on lists. `saved` is what its forward leaves for its backward.
template <class Problem>
struct CpuKernels {
  int64_t (*scratch_bytes)(const Problem&);  // of a range of lists
  // Lists [begin, end); `loss` is [count] in the accumulation type.
  void (*forward)(const Problem&, int64_t begin, int64_t end, void* scratch, void* loss, void* saved, Totals&);
  void (*backward)(const Problem&, const Gradients&, int64_t begin, int64_t end, void* scratch, Totals&);
};

template <class Problem>
struct CudaKernels {
  void (*forward)(const Problem&, const CudaForward&, const CudaLaunch&);
  void (*backward)(const Problem&, const Gradients&, const CudaLaunch&);
};

}  // namespace rewardfuse::lists
