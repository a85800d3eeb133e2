// Token log-probs, exact KL and entropy on the CPU.
//
// Decomposition: a row is one thread's; its bits do not depend on how many there are. Nothing is allocated.
// Traffic: forward reads each model's real logits once and writes some numbers a row. Backward reads them again (those
// of the reference only for a KL's gradient) and writes the gradient once, past the caches where it is larger than they
// are; masked rows, and rows whose every gradient is 0, are not read. Precision: exponents, exponentials and sums
// within a block are float32 (float64 for float64), the rest float64.
#include "token_logprobs/backward.h"
#include "token_logprobs/forward.h"

namespace rewardfuse::REWARDFUSE_TARGET {
namespace token_logprobs {

template <class T>
void write(void* to, int64_t row, double value) {
  if (to) static_cast<T*>(to)[row] = static_cast<T>(value);
}

template <class T, class S, Direction direction, bool entropy>
void forward_row(const Problem& problem, const Results& results, int64_t i) {
  if (!problem.counts(i)) {
    for (void* to : {results.logprobs, results.ref_logprobs, results.kl, results.entropy}) write<T>(to, i, 0);
    for (double* to : {results.lse, results.ref_lse}) write<double>(to, i, 0);
    return;
  }
  const Row<T, S, direction, entropy> row(problem, i);
  write<double>(results.lse, i, row.lse());
  write<T>(results.logprobs, i, row.logprob(problem.tokens[i]));
  if (entropy) write<T>(results.entropy, i, row.entropy_of_policy());
  if (direction == Direction::kNone) return;
  write<double>(results.ref_lse, i, row.ref_lse());
  write<T>(results.ref_logprobs, i, row.ref_logprob(problem.tokens[i]));
  write<T>(results.kl, i, row.kl());
}

void forward(const Problem& problem, const Results& results, int64_t begin, int64_t end) {
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    using S = decltype(storage);
    const auto rows = [&](auto direction) {
      const auto row =
          results.entropy ? &forward_row<T, S, direction.value, true> : &forward_row<T, S, direction.value, false>;
      for (int64_t i = begin; i < end; ++i) row(problem, results, i);
    };
    switch (problem.direction) {
      case Direction::kNone: return rows(std::integral_constant<Direction, Direction::kNone>{});
      case Direction::kReverse: return rows(std::integral_constant<Direction, Direction::kReverse>{});
      case Direction::kForward: return rows(std::integral_constant<Direction, Direction::kForward>{});
    }
  });
}

void backward(const Problem& problem, const Gradients& out, int64_t begin, int64_t end) {
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    for (int64_t i = begin; i < end; ++i) backward_row<decltype(acc), decltype(storage)>(problem, out, i);
  });
  finish_streams();
}

}  // namespace token_logprobs

const TokenLogprobsCpu token_logprobs_kernels = {&token_logprobs::forward, &token_logprobs::backward};

}  // namespace rewardfuse::REWARDFUSE_TARGET
