// Launches of kl_penalized_rewards on CUDA devices; in a build without CUDA, the sentence that says so. `like` gives
// the device.
#pragma once

#include <ATen/core/Tensor.h>

#include "kl_penalized_rewards/args.h"

namespace rewardfuse::kl_rewards {

void launch_forward(const Problem& problem, const Results& out, const at::Tensor& like);
void launch_backward(const Problem& problem, const Gradients& out, const at::Tensor& like);

}  // namespace rewardfuse::kl_rewards
