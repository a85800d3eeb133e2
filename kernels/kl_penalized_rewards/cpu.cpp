// KL-penalized rewards on the CPU; the equation is in math.h.
//
// Decomposition: the caller splits the rows into ranges whose bounds depend on the shape alone. The last valid token of
// a row is looked for from its end; then a register of tokens at a time up to there, and zeros beyond, where nothing
// but the mask is read. Each lane sums every `lanes`-th token in float64.
// Traffic in float32: forward reads 8 bytes a token and 1 of mask, writes 8; backward reads 8 and 1 and the gradients
// that came, writes 4.
// Precision: float32 maths for 16-bit and float32 log-probs, float64 for float64; all sums in float64.
#include "common/storage.h"

#include "kl_penalized_rewards/args.h"
#include "kl_penalized_rewards/math.h"

namespace rewardfuse::REWARDFUSE_TARGET {
namespace kl_rewards {

using rewardfuse::kl_rewards::Gradients;
using rewardfuse::kl_rewards::Problem;
using rewardfuse::kl_rewards::Results;
using rewardfuse::kl_rewards::Totals;

// Sums lanes in float64.
template <class T>
struct LaneSums {
  static constexpr int kParts = sizeof(double) / sizeof(T);
  typedef double Wide __attribute__((vector_size(REWARDFUSE_SIMD_BYTES)));
  typedef T Part __attribute__((vector_size(REWARDFUSE_SIMD_BYTES / kParts)));
  Wide sums[kParts] = {};

  RF_HD void add(typename Lanes<T>::Reg x) {
#ifdef __AVX512F__
    if constexpr (kParts == 2) {  // what GCC makes of the rest goes through memory
      sums[0] += (Wide)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
      sums[1] += (Wide)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
      return;
    }
#endif
    Part parts[kParts];
    __builtin_memcpy(parts, &x, sizeof(x));
    for (int i = 0; i < kParts; ++i) sums[i] += __builtin_convertvector(parts[i], Wide);
  }
  RF_HD double total() const {
    double total = 0;
    for (int i = 0; i < kParts; ++i) total += sum_lanes(sums[i]);
    return total;
  }
};

// Calls f(column, count) for the registers of columns [0, end); `count` is a compile-time constant for full ones.
template <class T, class F>
RF_HD void for_each_register(int64_t end, F&& f) {
  constexpr std::integral_constant<int64_t, Lanes<T>::count> lanes{};
  int64_t column = 0;
  for (; column + lanes <= end; column += lanes) f(column, lanes);
  if (column < end) f(column, end - column);
}

// −1 (all bits) where the first `count` lanes of a mask are true.
template <class T>
RF_HD typename Lanes<T>::Mask true_lanes(const uint8_t* mask, int64_t count) {
  using Mask = typename Lanes<T>::Mask;
#ifdef __AVX512F__
  const unsigned first = count >= Lanes<T>::count ? (1u << Lanes<T>::count) - 1 : (1u << count) - 1;
  const __m128i bytes = _mm_maskz_loadu_epi8(first, mask);
  const unsigned valid = _mm_test_epi8_mask(bytes, bytes);
  if constexpr (sizeof(T) == 4) return (Mask)_mm512_movm_epi32(valid);
  if constexpr (sizeof(T) == 8) return (Mask)_mm512_movm_epi64(valid);
#else
  typename Packed<uint8_t, Lanes<T>::count>::type bytes{};
  __builtin_memcpy(&bytes, mask, count >= Lanes<T>::count ? sizeof(bytes) : count);
  return __builtin_convertvector(bytes, Mask) != 0;
#endif
}

// Tokens side by side and scores by the row: the loops are loads, maths and stores alone.
RF_HD bool is_plain(const Problem& problem) {
  return problem.logprobs.inner_stride == 1 && problem.ref_logprobs.inner_stride == 1 &&
         (problem.mask.data == nullptr || problem.mask.inner_stride == 1) && !problem.token_scores;
}

// The tokens of one row.
template <class T, class S, bool plain>
struct Row {
  using V = typename Lanes<T>::Reg;
  using Mask = typename Lanes<T>::Mask;
  const S *logprobs, *ref_logprobs;
  const uint8_t* mask;
  int64_t stride, ref_stride, mask_stride;
  int64_t last;  // valid token; −1 where there is none

  Row(const Problem& problem, int64_t r)
      : logprobs(static_cast<const S*>(problem.logprobs.data) + r * problem.logprobs.outer_stride),
        ref_logprobs(static_cast<const S*>(problem.ref_logprobs.data) + r * problem.ref_logprobs.outer_stride),
        mask(static_cast<const uint8_t*>(problem.mask.data)),
        stride(plain ? 1 : problem.logprobs.inner_stride),
        ref_stride(plain ? 1 : problem.ref_logprobs.inner_stride),
        mask_stride(plain ? 1 : problem.mask.inner_stride) {
    last = problem.size - 1;
    if (mask == nullptr) return;
    mask += r * problem.mask.outer_stride;
    if (mask_stride == 1) {
      for (uint64_t eight = 0; last >= 7; last -= 8) {
        __builtin_memcpy(&eight, mask + last - 7, sizeof(eight));
        if (eight != 0) break;
      }
    }
    while (last >= 0 && mask[last * mask_stride] == 0) --last;
  }

  template <class Count>
  RF_HD V x(int64_t column, Count count) const {
    return load_as<V>(logprobs + column * stride, stride, count) -
           load_as<V>(ref_logprobs + column * ref_stride, ref_stride, count);
  }

  template <class Count>
  RF_HD Mask valid(int64_t column, Count count) const {
    if (mask == nullptr) return first_lanes<T>(count);
    if (mask_stride == 1) return true_lanes<T>(mask + column, count);
    Mask valid{};
    for (int j = 0; j < count; ++j) valid[j] = -(mask[(column + j) * mask_stride] != 0);
    return valid;
  }
};

template <class T>
RF_HD T at(const Operand& operand, int64_t r, int64_t column = 0) {
  return load<typename Lanes<T>::Reg>(operand, r, column, 1)[0];
}

// Gradients come in the accumulation type.
template <class V, bool plain, class Count>
RF_HD V load_gradient(const Operand& operand, int64_t r, int64_t column, Count count) {
  const auto* const row = static_cast<const lane_t<V>*>(operand.data) + r * operand.outer_stride;
  const int64_t stride = plain ? 1 : operand.inner_stride;
  return load_as<V>(row + column * stride, stride, count);
}

RF_HD bool missed(const Problem& problem, int64_t r) {
  return problem.ended.data && static_cast<const uint8_t*>(problem.ended.data)[r * problem.ended.outer_stride] == 0;
}

template <class T, class S, bool plain>
void forward_row(const Problem& problem, const ApproxKl<T>& model, double beta, int64_t r, const Results& out,
                 Totals& totals) {
  using V = typename Lanes<T>::Reg;
  const Row<T, S, plain> row(problem, r);
  const int64_t end = row.last + 1;
  T* const rewards = static_cast<T*>(out.rewards) + r * problem.size;
  T* const kl = static_cast<T*>(out.kl) + r * problem.size;
  T& sequence_kl = static_cast<T*>(out.sequence_kl)[r] = 0;
  T& sequence_reward = static_cast<T*>(out.sequence_reward)[r] = 0;
  __builtin_memset(rewards + end, 0, (problem.size - end) * sizeof(T));
  __builtin_memset(kl + end, 0, (problem.size - end) * sizeof(T));
  if (end == 0) return;

  const ScoreShape<T> shape(problem);
  const bool is_missed = missed(problem, r);
  LaneSums<T> of_kl, of_scores;
  typename Lanes<T>::Mask tokens{};
  for_each_register<T>(end, [&](int64_t column, auto count) __attribute__((always_inline)) {
    const auto valid = row.valid(column, count);
    const V estimate = valid ? model.value(row.x(column, count), V{} + 1.0f) : V{};
    V score{};
    if (!plain && problem.token_scores) {
      const V given = load<V>(problem.scores, r, column, count);
      score = valid ? shape.clamped(given) : V{};
      if (column + count == end) score[count - 1] = shape(given[count - 1], is_missed);
      of_scores.add(score);
    }
    store_as(kl + column, estimate, count);
    store_as(rewards + column, kl_penalized(score, T(beta), estimate), count);
    of_kl.add(estimate);
    tokens -= valid;
  });
  double score = of_scores.total();
  if (!problem.token_scores) {
    const T whole = shape(at<T>(problem.scores, r), is_missed);
    rewards[problem.one_past && end < problem.size ? end : row.last] += whole;
    score = whole;
  }
  const double sum = of_kl.total(), reward = kl_penalized(score, beta, sum);
  sequence_kl = static_cast<T>(sum);
  sequence_reward = static_cast<T>(reward);
  totals.add({sum, score, reward, sum_lanes(tokens), 1});
}

template <class T, class S, bool plain>
void backward_row(const Problem& problem, const ApproxKl<T>& model, T beta, int64_t r, const Gradients& out) {
  using V = typename Lanes<T>::Reg;
  const Row<T, S, plain> row(problem, r);
  const int64_t end = row.last + 1;
  S* const to = static_cast<S*>(out.logprobs) + r * problem.size;
  __builtin_memset(static_cast<void*>(to + end), 0, (problem.size - end) * sizeof(S));
  const bool of_rewards = beta != 0 && (out.rewards.data || out.sequence_reward.data);
  const T whole = at<T>(out.sequence_kl, r) - (of_rewards ? beta * at<T>(out.sequence_reward, r) : T(0));
  for_each_register<T>(end, [&](int64_t column, auto count) __attribute__((always_inline)) {
    V gradient = V{} + whole;
    if (out.kl.data) gradient += load_gradient<V, plain>(out.kl, r, column, count);
    if (of_rewards && out.rewards.data) gradient -= beta * load_gradient<V, plain>(out.rewards, r, column, count);
    // What nobody asks for may be infinite.
    gradient = gradient == 0.0f ? V{} : gradient * model.slope(row.x(column, count), V{} + 1.0f);
    store_as(to + column, row.valid(column, count) ? gradient : V{}, count);
  });
}

// The gradient of the scores of one row.
template <class T, class S>
void backward_scores(const Problem& problem, int64_t r, const Gradients& out) {
  using V = typename Lanes<T>::Reg;
  const Row<T, S, false> row(problem, r);
  const int64_t end = row.last + 1;
  const ScoreShape<T> shape(problem);
  const bool is_missed = missed(problem, r);
  const T whole = at<T>(out.sequence_reward, r);
  with_storage(problem.scores.dtype, [&](auto storage) {
    auto* const to = static_cast<decltype(storage)*>(out.scores);
    if (!problem.token_scores) {
      const int64_t place = problem.one_past && end < problem.size ? end : row.last;
      T gradient = 0;
      if (end > 0) gradient = (whole + at<T>(out.rewards, r, place)) * shape.slope(at<T>(problem.scores, r), is_missed);
      return store_as(to + r, broadcast(gradient), 1);
    }
    auto* const to_row = to + r * problem.size;
    __builtin_memset(static_cast<void*>(to_row + end), 0, (problem.size - end) * sizeof(storage));
    for_each_register<T>(end, [&](int64_t column, auto count) __attribute__((always_inline)) {
      const V given = load<V>(problem.scores, r, column, count);
      V slope = shape.slope(given);
      if (column + count == end) slope[count - 1] = shape.slope(given[count - 1], is_missed);
      const V gradient = (load<V>(out.rewards, r, column, count) + whole) * slope;
      store_as(to_row + column, row.valid(column, count) ? gradient : V{}, count);
    });
  });
}

void forward(const Problem& problem, const Results& out, int64_t begin, int64_t end, Totals& totals) {
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    const ApproxKl<T> model(problem.options);
    using S = decltype(storage);
    const double beta = at<double>(problem.kl_coef, 0);
    const auto row = is_plain(problem) ? &forward_row<T, S, true> : &forward_row<T, S, false>;
    for (int64_t r = begin; r < end; ++r) row(problem, model, beta, r, out, totals);
  });
}

void backward(const Problem& problem, const Gradients& out, int64_t begin, int64_t end) {
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    using S = decltype(storage);
    const ApproxKl<T> model(problem.options);
    const T beta = T(at<double>(problem.kl_coef, 0));
    const bool plain = is_plain(problem) && (out.kl.data == nullptr || out.kl.inner_stride == 1) &&
                       (out.rewards.data == nullptr || out.rewards.inner_stride == 1);
    const auto row = plain ? &backward_row<T, S, true> : &backward_row<T, S, false>;
    for (int64_t r = begin; r < end; ++r) {
      if (out.logprobs) row(problem, model, beta, r, out);
      if (out.scores) backward_scores<T, S>(problem, r, out);
    }
  });
}

}  // namespace kl_rewards

const KlPenalizedRewardsCpu kl_penalized_rewards_kernels = {&kl_rewards::forward, &kl_rewards::backward};

}  // namespace rewardfuse::REWARDFUSE_TARGET
