// What the all-pairs kernels are told.
#pragma once

#include "common/instruction_set.h"
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

using AllPairsCpu = lists::CpuKernels<all_pairs::Problem>;
using AllPairsCuda = lists::CudaKernels<all_pairs::Problem>;

RF_CPU_VARIANTS(AllPairsCpu, all_pairs_kernels)

namespace cuda {
extern const AllPairsCuda all_pairs_kernels;
}

}  // namespace rewardfuse
