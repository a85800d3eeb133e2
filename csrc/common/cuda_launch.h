// A CUDA launch on torch's current stream with scratch of its own; in a build without CUDA, the sentence that says so.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#if REWARDFUSE_WITH_CUDA

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "common/launch.h"
#include "common/nonce.h"

namespace rewardfuse {

// The caching allocator hands the scratch to nobody else before the launch is over on this stream, and under graph
// capture keeps it for the graph.
class Launch {
 public:
  // On the device of `like`: as many blocks as the work wants but no more than keep the device busy; the kernel adds up
  // `sums` numbers over its blocks.
  Launch(const at::Tensor& like, int64_t wanted_blocks, int64_t sums) : guard_(like.device()) {
    constexpr int64_t kBlocksPerSm = 8;
    int processors = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, like.get_device()));
    const int64_t blocks = std::clamp<int64_t>(wanted_blocks, 1, processors * kBlocksPerSm);
    launch_.blocks = static_cast<unsigned>(blocks);
    launch_.stream = c10::cuda::getCurrentCUDAStream().stream();
    if (blocks == 1 || sums == 0) return;
    scratch_ = at::empty({blocks * (sums + 1)}, like.options().dtype(at::kLong));
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

}  // namespace rewardfuse

#else

namespace rewardfuse {

[[noreturn]] inline void raise_no_cuda() {
  C10_THROW_ERROR(NotImplementedError, "rewardfuse was built without its CUDA kernels; `rewardfuse info` says why");
}

}  // namespace rewardfuse

#endif
