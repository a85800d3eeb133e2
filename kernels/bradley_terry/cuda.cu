// Bradley–Terry on CUDA devices: the kernels of pairwise/cuda.cuh around the maths of math.h.
#include "pairwise/cuda.cuh"

#include "bradley_terry/math.h"

namespace rewardfuse::cuda {

const PairKernelsCuda bradley_terry = {&pairwise::forward<BradleyTerry>, &pairwise::backward<BradleyTerry>};

}  // namespace rewardfuse::cuda
