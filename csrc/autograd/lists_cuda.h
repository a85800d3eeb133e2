// Launches of the ops on lists on CUDA devices; in a build without CUDA, the sentence that says so. `scores` gives the
// device.
#pragma once

#include <ATen/core/Tensor.h>

#include "all_pairs/args.h"
#include "plackett_luce/args.h"

namespace rewardfuse::lists {

void launch_plackett_luce_forward(const plackett_luce::Problem& problem, const CudaForward& out,
                                  const at::Tensor& scores);
void launch_plackett_luce_backward(const plackett_luce::Problem& problem, const Gradients& out,
                                   const at::Tensor& scores);
void launch_all_pairs_forward(const all_pairs::Problem& problem, const CudaForward& out, const at::Tensor& scores);
void launch_all_pairs_backward(const all_pairs::Problem& problem, const Gradients& out, const at::Tensor& scores);

}  // namespace rewardfuse::lists
