// What the all-pairs kernels are told.
#pragma once

#include "common/instruction_set.h"
#include "common/launch.h"
#include "lists/args.h"

namespace rewardfuse::all_pairs {

// Loss of a list: the mean of −log σ(s_i − s_j − margin·(y_i − y_j)) over its pairs with y_i > y_j. Forward saves the
// number of each list's pairs, [count] float64. The lists are padded (no cu_seqlens).
struct Problem {
  lists::Lists lists;
  Operand labels;  // [count, size], any real dtype
  Operand margin;  // a 0-d tensor or a number
};

}  // namespace rewardfuse::all_pairs

namespace rewardfuse {

struct AllPairsCpu {
  int64_t (*scratch_bytes)(const all_pairs::Problem&);  // of a range of lists
  // Lists [begin, end). `loss` is [count] or null; `pairs` is [count].
  void (*forward)(const all_pairs::Problem&, int64_t begin, int64_t end, void* scratch, void* loss, double* pairs,
                  lists::Totals&);
  void (*backward)(const all_pairs::Problem&, const lists::Gradients&, int64_t begin, int64_t end, void* scratch,
                   lists::Totals&);
};

struct AllPairsCuda {
  void (*forward)(const all_pairs::Problem&, const lists::CudaForward&, const CudaLaunch&);
  void (*backward)(const all_pairs::Problem&, const lists::Gradients&, const CudaLaunch&);
};

RF_CPU_VARIANTS(AllPairsCpu, all_pairs_kernels)

namespace cuda {
extern const AllPairsCuda all_pairs_kernels;
}

}  // namespace rewardfuse
