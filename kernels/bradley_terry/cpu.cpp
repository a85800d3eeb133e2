// Bradley–Terry on the CPU: the loops of pairwise/cpu.h around the maths of math.h.
#include "pairwise/cpu.h"

#include "bradley_terry/math.h"
#include "pairwise/kernels.h"

namespace rewardfuse::REWARDFUSE_TARGET {

const PairKernelsCpu bradley_terry = {&pairwise::forward<BradleyTerry>, &pairwise::backward<BradleyTerry>};

}  // namespace rewardfuse::REWARDFUSE_TARGET
