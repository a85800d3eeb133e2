// The entry points of every op on pairs, as csrc/autograd calls them. Torch-free.
#pragma once

#include "common/instruction_set.h"
#include "pairwise/args.h"

namespace rewardfuse {

struct PairKernelsCpu {
  // Items [begin, end); `loss` is [items] or null.
  void (*forward)(const pairwise::Problem&, int64_t begin, int64_t end, void* loss, pairwise::Totals&);
  void (*backward)(const pairwise::Problem&, const pairwise::Gradients&, int64_t begin, int64_t end, pairwise::Totals&);
};

struct PairKernelsCuda {
  void (*forward)(const pairwise::Problem&, const pairwise::CudaForward&, const CudaLaunch&);
  void (*backward)(const pairwise::Problem&, const pairwise::Gradients&, const CudaLaunch&);
};

RF_CPU_VARIANTS(PairKernelsCpu, bradley_terry)
RF_CPU_VARIANTS(PairKernelsCpu, rao_kupper)
RF_CPU_VARIANTS(PairKernelsCpu, davidson)
RF_CPU_VARIANTS(PairKernelsCpu, approx_kl)

namespace cuda {
extern const PairKernelsCuda bradley_terry, rao_kupper, davidson, approx_kl;
}

}  // namespace rewardfuse
