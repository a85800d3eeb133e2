// What the kernels of kl_penalized_rewards are told.
#pragma once

#include "common/host_device.h"
#include "common/instruction_set.h"
#include "common/launch.h"
#include "common/operand.h"

namespace rewardfuse::kl_rewards {

// Row r is a sequence of `size` tokens; item (r, t) of an operand stands at r·outer + t·inner.
struct Problem {
  int64_t rows = 0;
  int64_t size = 0;
  DType dtype = DType::kFloat32;   // of logprobs and ref_logprobs
  Operand logprobs, ref_logprobs;  // [rows, size]
  Operand mask;                    // [rows, size] boolean; no data: every token is valid
  Operand scores;                  // [rows] or, with token_scores, [rows, size]; no data: 0
  Operand ended;                   // [rows] boolean; no data: every response ended
  Operand kl_coef;                 // a 0-d tensor or a number
  bool token_scores = false;
  bool one_past = false;  // a row's score stands after its last valid token, where there is room
  bool replace = false;   // the penalty takes the score's place
  double missing_eos_penalty = 0;
  double score_low = 0, score_high = 0;
  double options[6] = {};  // of ApproxKl
};

// Sums over the rows that have a valid token.
struct Totals {
  double kl = 0, score = 0, reward = 0, tokens = 0, rows = 0;

  RF_HD void add(const Totals& other) {
    kl += other.kl;
    score += other.score;
    reward += other.reward;
    tokens += other.tokens;
    rows += other.rows;
  }
};

// Where a forward writes: contiguous, in the accumulation type.
struct Results {
  void* rewards = nullptr;          // [rows, size]
  void* kl = nullptr;               // [rows, size]
  void* sequence_kl = nullptr;      // [rows]
  void* sequence_reward = nullptr;  // [rows]
  void* stats = nullptr;            // [6]; CUDA only
};

// Gradients of the results in the accumulation type, of which those nobody has (no data) are 0, and where a backward
// writes; null where nobody asks.
struct Gradients {
  Operand rewards, kl;                   // [rows, size]
  Operand sequence_kl, sequence_reward;  // [rows]
  void* logprobs = nullptr;              // [rows, size] contiguous, in their type
  void* scores = nullptr;                // contiguous, in the shape and type of the scores
};

constexpr int kStats = 6;
constexpr int kCudaSums = 5;

}  // namespace rewardfuse::kl_rewards

namespace rewardfuse {

struct KlPenalizedRewardsCpu {
  // Rows [begin, end).
  void (*forward)(const kl_rewards::Problem&, const kl_rewards::Results&, int64_t begin, int64_t end,
                  kl_rewards::Totals&);
  void (*backward)(const kl_rewards::Problem&, const kl_rewards::Gradients&, int64_t begin, int64_t end);
};

struct KlPenalizedRewardsCuda {
  void (*forward)(const kl_rewards::Problem&, const kl_rewards::Results&, const CudaLaunch&);
  void (*backward)(const kl_rewards::Problem&, const kl_rewards::Gradients&, const CudaLaunch&);
};

RF_CPU_VARIANTS(KlPenalizedRewardsCpu, kl_penalized_rewards_kernels)

namespace cuda {
extern const KlPenalizedRewardsCuda kl_penalized_rewards_kernels;
}

}  // namespace rewardfuse
