// Forward on the CPU: one read of each row.
//
// A row is taken in blocks. Exponentials are relative to a logit `top` that some block held: the greatest of the first
// block, and a later one where a block's sum shows that it went far above. So nothing looks for maxima on the way, and
// the row's own is at most 12 bits above `top`. Within a block sums are float lanes, across blocks float64. Differences
// of log-probs are taken between the very numbers whose exponentials are summed: KL is that of logits rounded once.
//
// A block goes fast: without a cap, and as though no logit were −inf, for which 0·inf would be NaN. Where the sums come
// out NaN it is taken again with guards, and so are all after it.
#pragma once

#include "token_logprobs/args.h"
#include "token_logprobs/groups.h"
#include "token_logprobs/math.h"

namespace rewardfuse::REWARDFUSE_TARGET::token_logprobs {

using rewardfuse::token_logprobs::Direction;
using rewardfuse::token_logprobs::Problem;
using rewardfuse::token_logprobs::Results;

constexpr int64_t kBlock = 1024;
// What a block's exponentials may add up to before `top` follows them.
constexpr float kHighest = 4096;
constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

// Sums over exponentials e = 2^(scale·(l − top)) of one model's logits.
template <class T>
struct Model {
  double top = std::is_same_v<T, double> ? -1.7976931348623157e308 : -3.4028234663852886e38;  // T's lowest number
  double sum = 0;

  // What a new `top` adds to the exponents, in bits; finite.
  double shift_to(double new_top, double scale) const { return fmax((top - new_top) * scale, -1e300); }
  double log_sum() const { return sum > 0 ? log(sum) : __builtin_nan(""); }
};

// What a row needs beside its logits.
template <class T>
struct Terms {
  T scale;  // log2(e) / temperature
  T cap;    // 0: none
};

// Sums of a block, and of a row: e of each model, Σ e·(difference of the exponents) in the direction asked for, Σ
// e·exponent of the policy, all in bits.
struct Sums {
  double policy = 0, ref = 0, difference = 0, exponent = 0;

  bool in_range() const { return policy <= kHighest && ref <= kHighest; }
  bool is_nan() const { return policy != policy || ref != ref || difference != difference || exponent != exponent; }
};

template <class T, class S, Direction direction, bool entropy, bool fast>
struct Block {
  using V = typename Lanes<T>::Reg;
  using G = Group<T, S>;
  static constexpr bool has_ref = direction != Direction::kNone;

  const Terms<T>& terms;
  const T policy_top, ref_top;
  V policy{}, ref{}, difference{}, exponent{};

  RF_HD V score(V logit) const {
    if (!fast && terms.cap != 0) return soft_cap(logit, terms.cap);
    return logit;
  }

  // `valid`: true for all, or a mask.
  template <class Valid>
  RF_HD void add(V p_logit, V q_logit, Valid valid) {
    const auto keep = [&](auto counts, V x) __attribute__((always_inline)) { return counts ? x : V{}; };
    const V p = (score(p_logit) - policy_top) * terms.scale;
    V p_exp = exp2_any(p), q{}, q_exp{};
    if constexpr (has_ref) {
      q = (score(q_logit) - ref_top) * terms.scale;
      q_exp = exp2_any(q);
    }
    if constexpr (!std::is_same_v<Valid, bool>) {
      p_exp = keep(valid, p_exp);
      q_exp = keep(valid, q_exp);
    }
    policy += p_exp;
    ref += q_exp;
    const V weight = direction == Direction::kReverse ? p_exp : q_exp;
    const V gap = direction == Direction::kReverse ? p - q : q - p;
    if constexpr (has_ref) difference += fast ? weight * gap : keep(weight != T(0), weight * gap);
    if constexpr (entropy) exponent += fast ? p_exp * p : keep(p_exp != T(0), p_exp * p);
  }

  RF_HD Sums run(const S* p, const S* q, int64_t count) {
    int64_t i = 0;
    for (; i + G::count <= count; i += G::count) {
      const G p_logits = G::load(p + i), q_logits = has_ref ? G::load(q + i) : p_logits;
      for (int r = 0; r < G::registers; ++r) add(p_logits.part[r], q_logits.part[r], true);
    }
    if (i < count) {
      const int64_t n = count - i;
      const G p_logits = G::load_first(p + i, n), q_logits = has_ref ? G::load_first(q + i, n) : p_logits;
      for (int r = 0; r < G::registers; ++r) add(p_logits.part[r], q_logits.part[r], G::valid(r, n));
    }
    return {add_lanes(policy), add_lanes(ref), add_lanes(difference), add_lanes(exponent)};
  }
};

// The greatest capped logit of a block; NaN may be passed over.
template <class T, class S>
T greatest(const S* logits, int64_t count, T cap) {
  using V = typename Lanes<T>::Reg;
  using G = Group<T, S>;
  V top = broadcast(-T(__builtin_inf()));
  const auto add = [&](V x) __attribute__((always_inline)) { top = x > top ? x : top; };
  int64_t i = 0;
  for (; i + G::count <= count; i += G::count) {
    const G group = G::load(logits + i);
    for (int r = 0; r < G::registers; ++r) add(group.part[r]);
  }
  if (i < count) {
    const G group = G::load_first(logits + i, count - i);
    for (int r = 0; r < G::registers; ++r) add(G::valid(r, count - i) ? group.part[r] : top);
  }
  // The cap keeps the order.
  if (cap != 0) top = soft_cap(top, cap);
  T result = top[0];
  for (int j = 1; j < Lanes<T>::count; ++j) result = top[j] > result ? T(top[j]) : result;
  return result;
}

template <class T, class S, Direction direction, bool entropy>
class Row {
 public:
  static constexpr bool has_ref = direction != Direction::kNone;

  Row(const Problem& problem, int64_t row)
      : terms_{static_cast<T>(kLog2e / problem.temperature_of(row)), static_cast<T>(problem.softcap)},
        per_temperature_(1 / problem.temperature_of(row)),
        p_(row_of<S>(problem.logits, row)),
        q_(has_ref ? row_of<S>(problem.ref, row) : nullptr) {
    guarded_ = terms_.cap != 0;
    for (int64_t i = 0; i < problem.columns; i += kBlock) {
      const int64_t count = problem.columns - i < kBlock ? problem.columns - i : kBlock;
      if (i == 0) raise(0, count);
      add(i, count);
    }
  }

  double lse() const { return finite(policy_.top * per_temperature_ + policy_.log_sum()); }
  double ref_lse() const { return finite(ref_.top * per_temperature_ + ref_.log_sum()); }
  double logprob(int64_t token) const { return of_token(p_[token], policy_); }
  double ref_logprob(int64_t token) const { return of_token(q_[token], ref_); }
  double entropy_of_policy() const { return policy_.log_sum() - kLn2 * exponent_ / policy_.sum; }
  double kl() const {
    const double between = ref_.log_sum() - policy_.log_sum();
    if (direction == Direction::kReverse) return kLn2 * difference_ / policy_.sum + between;
    return kLn2 * difference_ / ref_.sum - between;
  }

 private:
  static double finite(double x) { return x - x == 0 ? x : __builtin_nan(""); }

  double of_token(S logit, const Model<T>& model) const {
    using G = Group<T, S>;
    auto score = G::load_first(&logit, 1).part[0];
    if (terms_.cap != 0) score = soft_cap(score, terms_.cap);
    return (static_cast<double>(score[0]) - model.top) * per_temperature_ - model.log_sum();
  }

  template <bool fast>
  __attribute__((noinline)) Sums sums(int64_t at, int64_t count) const {
    Block<T, S, direction, entropy, fast> block{terms_, static_cast<T>(policy_.top), static_cast<T>(ref_.top)};
    return block.run(p_ + at, has_ref ? q_ + at : nullptr, count);
  }

  void add(int64_t at, int64_t count) {
    Sums block = guarded_ ? sums<false>(at, count) : sums<true>(at, count);
    if (!block.in_range() && raise(at, count)) block = guarded_ ? sums<false>(at, count) : sums<true>(at, count);
    if (block.is_nan() && !guarded_) {
      guarded_ = true;
      block = sums<false>(at, count);
    }
    policy_.sum += block.policy;
    ref_.sum += block.ref;
    difference_ += block.difference;
    exponent_ += block.exponent;
  }

  // Lets the tops follow a block that went above them; false where it did not.
  bool raise(int64_t at, int64_t count) {
    const double p_top = greatest<T>(p_ + at, count, terms_.cap);
    const double q_top = has_ref ? greatest<T>(q_ + at, count, terms_.cap) : ref_.top;
    const double p_shift = p_top > policy_.top ? policy_.shift_to(p_top, terms_.scale) : 0;
    const double q_shift = q_top > ref_.top ? ref_.shift_to(q_top, terms_.scale) : 0;
    if (p_shift == 0 && q_shift == 0) return false;
    const double p_factor = exp2(p_shift), q_factor = exp2(q_shift);
    // What weighs nothing any more is gone, even a KL that was infinite.
    const auto scaled = [](double factor, double x) { return factor == 0 ? 0 : factor * x; };
    exponent_ = scaled(p_factor, exponent_ + policy_.sum * p_shift);
    if (direction == Direction::kReverse) {
      difference_ = scaled(p_factor, difference_ + policy_.sum * (p_shift - q_shift));
    } else {
      difference_ = scaled(q_factor, difference_ + ref_.sum * (q_shift - p_shift));
    }
    policy_.sum *= p_factor;
    ref_.sum *= q_factor;
    if (p_shift != 0) policy_.top = p_top;
    if (q_shift != 0) ref_.top = q_top;
    return true;
  }

  const Terms<T> terms_;
  const double per_temperature_;
  const S *const p_, *const q_;
  Model<T> policy_, ref_;
  double difference_ = 0, exponent_ = 0;
  bool guarded_ = false;
};

}  // namespace rewardfuse::REWARDFUSE_TARGET::token_logprobs
