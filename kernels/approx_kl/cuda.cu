// Estimators of a KL divergence on CUDA devices: the kernels of pairwise/cuda.cuh around the maths of math.h.
#include "pairwise/cuda.cuh"

#include "approx_kl/math.h"

namespace rewardfuse::cuda {

const PairKernelsCuda approx_kl = {&pairwise::forward<ApproxKl>, &pairwise::backward<ApproxKl>};

}  // namespace rewardfuse::cuda
