// Launches of the ops on pairs on CUDA devices; in a build without CUDA, the sentence that says so.
#pragma once

#include "autograd/pairwise.h"

namespace rewardfuse::pairwise {

void launch_forward(const PairKernelsCuda* kernels, const Inputs& in, const Problem& problem, const at::Tensor& loss,
                    const at::Tensor& stats, const at::Tensor& denominator);
void launch_backward(const PairKernelsCuda* kernels, const Inputs& in, const Problem& problem, Gradients& out,
                     const OptionalTensor& denominator);

}  // namespace rewardfuse::pairwise
