#include "autograd/pairwise_cuda.h"

#if REWARDFUSE_WITH_CUDA

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "common/nonce.h"

namespace rewardfuse::pairwise {
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

// A launch on the current stream with scratch of its own. The caching allocator hands the scratch to nobody else before
// the launch is over on this stream, and under graph capture keeps it for the graph.
class Launch {
 public:
  Launch(const at::Tensor& like, int64_t items) : guard_(like.device()) {
    constexpr int64_t kThreads = 256, kPairsPerThread = 4, kBlocksPerSm = 8;
    int processors = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, like.get_device()));
    const int64_t wanted = (items + kThreads * kPairsPerThread - 1) / (kThreads * kPairsPerThread);
    const int64_t blocks = std::clamp<int64_t>(wanted, 1, processors * kBlocksPerSm);
    launch_.blocks = static_cast<unsigned>(blocks);
    launch_.stream = c10::cuda::getCurrentCUDAStream().stream();
    if (blocks == 1) return;
    scratch_ = at::empty({blocks * (kCudaSums + 1)}, like.options().dtype(at::kLong));
    launch_.flags = reinterpret_cast<unsigned long long*>(scratch_.mutable_data_ptr<int64_t>());
    launch_.partials = reinterpret_cast<double*>(launch_.flags + blocks);
    launch_.nonce = next_nonce();
  }

  const CudaLaunch& operator*() const { return launch_; }

 private:
  c10::cuda::CUDAGuard guard_;
  at::Tensor scratch_;
  CudaLaunch launch_;
};

}  // namespace

void launch_forward(const PairKernelsCuda* kernels, const Inputs& in, const Problem& problem, const at::Tensor& loss,
                    const at::Tensor& stats, const at::Tensor& denominator) {
  CudaForward out;
  out.reduction = in.reduction;
  out.loss = loss.mutable_data_ptr();
  out.stats = stats.mutable_data_ptr();
  if (in.counts()) out.denominator = denominator.mutable_data_ptr<double>();
  out.normalizer = normalizer_operand(in);
  const Launch launch(in.a, problem.plane.items);
  kernels->forward(problem, out, *launch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_backward(const PairKernelsCuda* kernels, const Inputs& in, const Problem& problem, Gradients& out,
                     const OptionalTensor& denominator) {
  if (in.counts()) out.denominator = denominator->const_data_ptr<double>();
  out.normalizer = normalizer_operand(in);
  const Launch launch(in.a, problem.plane.items);
  kernels->backward(problem, out, *launch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace rewardfuse::pairwise

#else

namespace rewardfuse::pairwise {

constexpr const char* kNoCuda = "rewardfuse was built without its CUDA kernels; `rewardfuse info` says why";

void launch_forward(const PairKernelsCuda*, const Inputs&, const Problem&, const at::Tensor&, const at::Tensor&,
                    const at::Tensor&) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, kNoCuda);
}

void launch_backward(const PairKernelsCuda*, const Inputs&, const Problem&, Gradients&, const OptionalTensor&) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, kNoCuda);
}

}  // namespace rewardfuse::pairwise

#endif
