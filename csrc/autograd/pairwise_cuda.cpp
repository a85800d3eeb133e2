#include "autograd/pairwise_cuda.h"

#include "autograd/reduction.h"
#include "common/cuda_launch.h"

namespace rewardfuse::pairwise {

#if REWARDFUSE_WITH_CUDA

namespace {

Operand normalizer_operand(const Inputs& in) {
  Operand operand;
  operand.value = in.numbers[3];
  if (present(in.normalizer)) {
    operand.data = in.normalizer->const_data_ptr();
    operand.dtype = *kernel_dtype(in.normalizer->scalar_type());
  }
  return operand;
}

int64_t wanted_blocks(const Problem& problem) {
  constexpr int64_t kPairsPerBlock = 256 * 4;
  return (problem.plane.items + kPairsPerBlock - 1) / kPairsPerBlock;
}

}  // namespace

void launch_forward(const PairKernelsCuda* kernels, const Inputs& in, const Problem& problem, const at::Tensor& loss,
                    const at::Tensor& stats, const at::Tensor& denominator) {
  CudaForward out;
  out.reduction = in.reduction;
  out.loss = loss.mutable_data_ptr();
  out.stats = stats.mutable_data_ptr();
  if (in.counts()) out.denominator = denominator.mutable_data_ptr<double>();
  out.normalizer = normalizer_operand(in);
  const Launch launch(in.a, wanted_blocks(problem), kCudaSums);
  kernels->forward(problem, out, *launch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_backward(const PairKernelsCuda* kernels, const Inputs& in, const Problem& problem, Gradients& out,
                     const OptionalTensor& denominator) {
  if (in.counts()) out.denominator = denominator->const_data_ptr<double>();
  out.normalizer = normalizer_operand(in);
  const Launch launch(in.a, wanted_blocks(problem), kCudaSums);
  kernels->backward(problem, out, *launch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

#else

void launch_forward(const PairKernelsCuda*, const Inputs&, const Problem&, const at::Tensor&, const at::Tensor&,
                    const at::Tensor&) {
  raise_no_cuda();
}

void launch_backward(const PairKernelsCuda*, const Inputs&, const Problem&, Gradients&, const OptionalTensor&) {
  raise_no_cuda();
}

#endif

}  // namespace rewardfuse::pairwise
