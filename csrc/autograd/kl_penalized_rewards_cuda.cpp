#include "autograd/kl_penalized_rewards_cuda.h"

#include "common/cuda_launch.h"
#include "kl_penalized_rewards/teams.h"

namespace rewardfuse::kl_rewards {

#if REWARDFUSE_WITH_CUDA

void launch_forward(const Problem& problem, const Results& out, const at::Tensor& like) {
  const Launch launch(like, teams(problem).blocks(problem.rows), kCudaSums);
  cuda::kl_penalized_rewards_kernels.forward(problem, out, *launch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_backward(const Problem& problem, const Gradients& out, const at::Tensor& like) {
  const Launch launch(like, teams(problem).blocks(problem.rows), 0);
  cuda::kl_penalized_rewards_kernels.backward(problem, out, *launch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

#else

void launch_forward(const Problem&, const Results&, const at::Tensor&) { raise_no_cuda(); }

void launch_backward(const Problem&, const Gradients&, const at::Tensor&) { raise_no_cuda(); }

#endif

}  // namespace rewardfuse::kl_rewards
