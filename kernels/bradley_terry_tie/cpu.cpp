// Comparisons with ties on the CPU: the loops of pairwise/cpu.h around the maths of math.h.
#include "pairwise/cpu.h"

#include "bradley_terry_tie/math.h"
#include "pairwise/kernels.h"

namespace rewardfuse::REWARDFUSE_TARGET {

const PairKernelsCpu rao_kupper = {&pairwise::forward<RaoKupper>, &pairwise::backward<RaoKupper>};
const PairKernelsCpu davidson = {&pairwise::forward<Davidson>, &pairwise::backward<Davidson>};

}  // namespace rewardfuse::REWARDFUSE_TARGET
