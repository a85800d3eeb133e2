// Backward on the CPU: the logits are read once more, the gradient is written once. From sampled tokens alone it needs
// the policy's logits and log-sum-exp; the same function of a part of the columns gives that part of the gradient.
#pragma once

#include "token_logprobs/args.h"
#include "token_logprobs/groups.h"
#include "token_logprobs/math.h"

namespace rewardfuse::REWARDFUSE_TARGET::token_logprobs {

using rewardfuse::token_logprobs::Direction;
using rewardfuse::token_logprobs::Gradients;
using rewardfuse::token_logprobs::Problem;

// log2 π = (l − at)·scale − rest, where `at` is T's number nearest to what the log-sum-exp is in units of a logit.
template <class T>
struct LogProb {
  T at = 0, scale = 0, rest = 0;

  LogProb() = default;
  LogProb(double lse, double temperature) {
    constexpr double kLog2e = 1.44269504088896340736;
    at = static_cast<T>(lse * temperature);
    scale = static_cast<T>(kLog2e / temperature);
    rest = static_cast<T>((lse - at / temperature) * kLog2e);
  }

  template <class V>
  RF_HD V operator()(V score) const {
    return (score - at) * scale - rest;
  }
};

// A row's gradient is π·(one + log_policy·log2 π + log_gap·(log2 π − log2 ρ)) + ref·ρ times the cap's slope.
template <class T>
struct RowTerms {
  LogProb<T> policy, reference;
  T one, log_policy, log_gap, ref;
  T cap;

  RowTerms(const Problem& problem, const RowSlopes& slopes, double lse, double ref_lse, double temperature)
      : policy(lse, temperature) {
    constexpr double kLn2 = 0.69314718055994530942;
    if (problem.ref.data) reference = {ref_lse, temperature};
    one = static_cast<T>(slopes.one / temperature);
    log_policy = static_cast<T>(kLn2 * (slopes.log_policy + slopes.log_ref) / temperature);
    log_gap = static_cast<T>(-kLn2 * slopes.log_ref / temperature);
    ref = static_cast<T>(slopes.ref / temperature);
    cap = static_cast<T>(problem.softcap);
  }
};

template <class T, class S, Direction direction, bool entropy, bool capped>
struct GradientRow {
  using V = typename Lanes<T>::Reg;
  using G = Group<T, S>;
  static constexpr bool has_ref = direction != Direction::kNone;

  const RowTerms<T>& terms;

  RF_HD V at(V p_logit, V q_logit) const {
    V p_score = p_logit, q_score = q_logit;
    if constexpr (capped) p_score = soft_cap(p_logit, terms.cap);
    if constexpr (capped && has_ref) q_score = soft_cap(q_logit, terms.cap);
    const V log_pi = terms.policy(p_score), pi = exp2_any(log_pi);
    V log_rho{};
    if constexpr (has_ref) log_rho = terms.reference(q_score);
    V factor = broadcast(terms.one);
    if constexpr (entropy) factor += terms.log_policy * log_pi;
    if constexpr (direction == Direction::kReverse) factor += terms.log_gap * (log_pi - log_rho);
    V result = pi * factor;
    if constexpr (entropy || direction == Direction::kReverse) result = pi != T(0) ? result : V{};
    if constexpr (direction == Direction::kForward) result += terms.ref * exp2_any(log_rho);
    if constexpr (capped) result *= soft_cap_slope(p_logit, terms.cap);
    return result;
  }

  RF_HD G at(const G& p, const G& q) const {
    G result;
    for (int r = 0; r < G::registers; ++r) result.part[r] = at(p.part[r], q.part[r]);
    return result;
  }

  __attribute__((noinline)) void some(const S* p, const S* q, S* to, int64_t n) const {
    const G p_logits = G::load_first(p, n);
    at(p_logits, has_ref ? G::load_first(q, n) : p_logits).store_first(to, n);
  }

  void run(const S* p, const S* q, S* to, int64_t count, bool streams) const {
    int64_t i = 0;
    if (streams) {  // as far as the first aligned group
      constexpr int64_t size = REWARDFUSE_SIMD_BYTES;
      i = (size - reinterpret_cast<uintptr_t>(to) % size) % size / sizeof(S);
      if (i > count) i = count;
      if (i > 0) some(p, q, to, i);
    }
    for (; i + G::count <= count; i += G::count) {
      const G p_logits = G::load(p + i);
      at(p_logits, has_ref ? G::load(q + i) : p_logits).store(to + i, streams);
    }
    if (i < count) some(p + i, has_ref ? q + i : nullptr, to + i, count - i);
  }
};

template <class T, class S>
void fill(S* to, int64_t count, T value, bool streams) {
  using G = Group<T, S>;
  G group;
  for (auto& part : group.part) part = broadcast(value);
  int64_t i = 0;
  if (streams) {
    constexpr int64_t size = REWARDFUSE_SIMD_BYTES;
    i = (size - reinterpret_cast<uintptr_t>(to) % size) % size / sizeof(S);
    if (i > count) i = count;
    group.store_first(to, i);
  }
  for (; i + G::count <= count; i += G::count) group.store(to + i, streams);
  group.store_first(to + i, count - i);
}

// The token's own element, in float64.
template <class T, class S>
T slope_of_token(const Problem& problem, const RowSlopes& slopes, double gradient, int64_t row, int64_t token,
                 double lse, double ref_lse) {
  const double temperature = problem.temperature_of(row), cap = problem.softcap;
  const auto logit = [&](const auto& matrix) {
    return static_cast<double>(Group<T, S>::load_first(row_of<S>(matrix, row) + token, 1).part[0][0]);
  };
  const auto score = [&](double l) { return (cap != 0 ? cap * tanh(l / cap) : l) / temperature; };
  const double log_pi = score(logit(problem.logits)) - lse, pi = exp(log_pi);
  double result = gradient;
  if (pi != 0) result += pi * (slopes.one + (slopes.log_policy != 0 ? slopes.log_policy * log_pi : 0));
  if (slopes.log_ref != 0 || slopes.ref != 0) {
    const double log_rho = score(logit(problem.ref)) - ref_lse;
    // With a finite KL −inf stands only where π, rounded to T, is 0.
    if (slopes.log_ref != 0 && pi != 0 && log_rho > -__builtin_inf()) result += pi * slopes.log_ref * log_rho;
    result += slopes.ref * exp(log_rho);
  }
  if (cap != 0) {
    const double cosine = cosh(logit(problem.logits) / cap);
    result /= cosine * cosine;
  }
  return static_cast<T>(result / temperature);
}

template <class T, class S, bool capped>
void run_row(const Problem& problem, const RowTerms<T>& terms, Direction direction, int64_t row, S* to, bool streams) {
  const S* const p = row_of<S>(problem.logits, row);
  const S* const q = direction == Direction::kNone ? nullptr : row_of<S>(problem.ref, row);
  const auto run = [&](auto direction, auto entropy) {
    const GradientRow<T, S, direction.value, entropy.value, capped> gradient{terms};
    gradient.run(p, q, to, problem.columns, streams);
  };
  const auto with_direction = [&](auto entropy) {
    switch (direction) {
      case Direction::kNone: return run(std::integral_constant<Direction, Direction::kNone>{}, entropy);
      case Direction::kReverse: return run(std::integral_constant<Direction, Direction::kReverse>{}, entropy);
      case Direction::kForward: return run(std::integral_constant<Direction, Direction::kForward>{}, entropy);
    }
  };
  if (terms.log_policy != 0) return with_direction(std::true_type{});
  with_direction(std::false_type{});
}

template <class T, class S>
void backward_row(const Problem& problem, const Gradients& out, int64_t row) {
  S* const to = static_cast<S*>(out.logits) + row * out.width;
  const int64_t columns = problem.columns;
  fill(to + columns, out.width - columns, T(0), out.streams);
  const double logprob = out.of_logprobs ? out.of_logprobs[row] : 0, kl = out.of_kl ? out.of_kl[row] : 0;
  const double entropy = out.of_entropy ? out.of_entropy[row] : 0;
  if (!problem.counts(row)) return fill(to, columns, T(0), out.streams);
  const double lse = out.lse[row], ref_lse = kl != 0 ? out.ref_lse[row] : 0;
  RowSlopes slopes;
  slopes.add_logprob(logprob);
  // What nobody asks for is left out: it may be infinite.
  if (entropy != 0) slopes.add_entropy(entropy, out.entropy[row]);
  if (kl != 0 && problem.direction == Direction::kReverse) slopes.add_reverse_kl(kl, out.kl[row]);
  if (kl != 0 && problem.direction == Direction::kForward) slopes.add_forward_kl(kl);
  const double all = slopes.one + slopes.log_policy + slopes.log_ref + slopes.ref + lse + ref_lse;
  if (all - all != 0) return fill(to, columns, T(__builtin_nan("")), out.streams);
  if (logprob == 0 && kl == 0 && entropy == 0) return fill(to, columns, T(0), out.streams);

  const RowTerms<T> terms(problem, slopes, lse, ref_lse, problem.temperature_of(row));
  const auto run = problem.softcap != 0 ? &run_row<T, S, true> : &run_row<T, S, false>;
  run(problem, terms, kl != 0 ? problem.direction : Direction::kNone, row, to, out.streams);
  const int64_t token = problem.tokens[row];
  if (logprob == 0 || token < 0 || token >= columns) return;
  fill(to + token, 1, slope_of_token<T, S>(problem, slopes, logprob, row, token, lse, ref_lse), false);
}

}  // namespace rewardfuse::REWARDFUSE_TARGET::token_logprobs
