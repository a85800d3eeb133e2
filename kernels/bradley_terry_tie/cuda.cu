// Comparisons with ties on CUDA devices: the kernels of pairwise/cuda.cuh around the maths of math.h.
#include "pairwise/cuda.cuh"

#include "bradley_terry_tie/math.h"

namespace rewardfuse::cuda {

const PairKernelsCuda rao_kupper = {&pairwise::forward<RaoKupper>, &pairwise::backward<RaoKupper>};
const PairKernelsCuda davidson = {&pairwise::forward<Davidson>, &pairwise::backward<Davidson>};

}  // namespace rewardfuse::cuda
