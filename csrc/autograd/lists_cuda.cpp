#include "autograd/lists_cuda.h"

#include "common/cuda_launch.h"
#include "lists/teams.h"

namespace rewardfuse::lists {

#if REWARDFUSE_WITH_CUDA

void launch_plackett_luce_forward(const plackett_luce::Problem& problem, const CudaForward& out,
                                  const at::Tensor& scores) {
  const Launch launch(scores, plackett_luce_teams(problem.lists).blocks(problem.lists.count), kCudaSums);
  cuda::plackett_luce_kernels.forward(problem, out, *launch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_plackett_luce_backward(const plackett_luce::Problem& problem, const Gradients& out,
                                   const at::Tensor& scores) {
  const Launch launch(scores, plackett_luce_teams(problem.lists).blocks(problem.lists.count), 0);
  cuda::plackett_luce_kernels.backward(problem, out, *launch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_all_pairs_forward(const all_pairs::Problem& problem, const CudaForward& out, const at::Tensor& scores) {
  const Launch launch(scores, all_pairs_teams(problem.lists).blocks(problem.lists.count), kCudaSums);
  cuda::all_pairs_kernels.forward(problem, out, *launch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_all_pairs_backward(const all_pairs::Problem& problem, const Gradients& out, const at::Tensor& scores) {
  const Launch launch(scores, all_pairs_teams(problem.lists).blocks(problem.lists.count), 0);
  cuda::all_pairs_kernels.backward(problem, out, *launch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

#else

void launch_plackett_luce_forward(const plackett_luce::Problem&, const CudaForward&, const at::Tensor&) {
  raise_no_cuda();
}

void launch_plackett_luce_backward(const plackett_luce::Problem&, const Gradients&, const at::Tensor&) {
  raise_no_cuda();
}

void launch_all_pairs_forward(const all_pairs::Problem&, const CudaForward&, const at::Tensor&) { raise_no_cuda(); }

void launch_all_pairs_backward(const all_pairs::Problem&, const Gradients&, const at::Tensor&) { raise_no_cuda(); }

#endif

}  // namespace rewardfuse::lists
