// How many threads take a row together on a CUDA device. Torch-free; read by the launch, which sizes the grid, and by
// the kernels.
#pragma once

#include "kl_penalized_rewards/args.h"
#include "lists/teams.h"

namespace rewardfuse::kl_rewards {

using lists::Teams;

// Sixteen tokens a thread before a row gets another lane, and past 32 lanes a block of its own.
inline Teams teams(const Problem& problem) {
  constexpr int64_t kTokens = 16;
  return lists::teams_of((problem.size + kTokens - 1) / kTokens);
}

}  // namespace rewardfuse::kl_rewards
