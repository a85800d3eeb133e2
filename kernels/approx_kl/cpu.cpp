// Estimators of a KL divergence on the CPU: the loops of pairwise/cpu.h around the maths of math.h.
#include "pairwise/cpu.h"

#include "approx_kl/math.h"
#include "pairwise/kernels.h"

namespace rewardfuse::REWARDFUSE_TARGET {

const PairKernelsCpu approx_kl = {&pairwise::forward<ApproxKl>, &pairwise::backward<ApproxKl>};

}  // namespace rewardfuse::REWARDFUSE_TARGET
