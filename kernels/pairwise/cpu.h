// The loops of every op on pairs, for one instruction set.
//
// Decomposition: the caller splits the items into ranges whose bounds depend on the number of items alone and adds the
// ranges' totals in order; within a range, lane j of a register sums every `lanes`-th pair. So the bits of a result do
// not depend on the number of threads.
// Traffic: forward reads a and b (8 bytes a pair in float32) and what of p, q, weight and mask is a whole tensor; it
// writes nothing unless reduction is "none". Backward reads the same and writes the gradients asked for.
// Precision: float32 maths for 16-bit and float32 rewards, float64 for float64; sums are float32 lanes within a block
// of 1,024 pairs, float64 across lanes and blocks.
#pragma once

#include "common/storage.h"
#include "pairwise/args.h"

namespace rewardfuse::REWARDFUSE_TARGET::pairwise {

using rewardfuse::pairwise::Gradients;
using rewardfuse::pairwise::Problem;
using rewardfuse::pairwise::Totals;

// One register of pairs.
template <class V>
struct Pairs {
  V a, b, p, q, weight;
  typename Lanes<lane_t<V>>::Mask valid;    // mask is true
  typename Lanes<lane_t<V>>::Mask counted;  // and weight is not 0
};

RF_HD bool is_number(const Operand& operand) {
  return operand.data == nullptr || (operand.outer_stride == 0 && operand.inner_stride == 0);
}

// Contiguous rewards, no mask, and p, q, weight the same for every pair: the loop is loads and maths alone.
RF_HD bool is_plain(const Problem& problem) {
  return problem.plane.inner == problem.plane.items && problem.a.inner_stride == 1 && problem.b.inner_stride == 1 &&
         problem.mask.data == nullptr && problem.weight.data == nullptr && problem.weight.value != 0 &&
         is_number(problem.p) && is_number(problem.q);
}

template <class V, class S, bool plain>
struct PairSource {
  const Problem& problem;
  const S *a, *b;
  V p{}, q{}, weight{};

  RF_HD explicit PairSource(const Problem& problem)
      : problem(problem), a(static_cast<const S*>(problem.a.data)), b(static_cast<const S*>(problem.b.data)) {
    if constexpr (plain) {
      p = load<V>(problem.p, 0, 0, 1);
      q = load<V>(problem.q, 0, 0, 1);
      weight = load<V>(problem.weight, 0, 0, 1);
    }
  }

  RF_HD V scores(const S* from, const Operand& operand, int64_t row, int64_t column, int64_t count) const {
    if constexpr (plain) return load_as<V>(from + column, 1, count);
    return load_as<V>(from + row * operand.outer_stride + column * operand.inner_stride, operand.inner_stride, count);
  }

  RF_HD Pairs<V> operator()(int64_t row, int64_t column, int64_t count) const {
    Pairs<V> pairs;
    pairs.a = scores(a, problem.a, row, column, count);
    pairs.b = scores(b, problem.b, row, column, count);
    pairs.valid = first_lanes<lane_t<V>>(count);
    if constexpr (plain) {
      pairs.p = p;
      pairs.q = q;
      pairs.weight = weight;
      pairs.counted = pairs.valid;
    } else {
      pairs.p = load<V>(problem.p, row, column, count);
      pairs.q = load<V>(problem.q, row, column, count);
      pairs.weight = load<V>(problem.weight, row, column, count);
      pairs.valid &= load<V>(problem.mask, row, column, count) != 0.0f;
      pairs.counted = pairs.valid & (pairs.weight != 0.0f);
    }
    return pairs;
  }
};

// Calls f(row, column, item, count) for the pieces of [begin, end) that one register holds; `count` is a compile-time
// constant for full registers.
template <class T, class F>
RF_HD void for_each_register(const Plane& plane, int64_t begin, int64_t end, F&& f) {
  constexpr std::integral_constant<int64_t, Lanes<T>::count> lanes{};
  int64_t row = begin / plane.inner, column = begin % plane.inner;
  for (int64_t item = begin; item < end;) {
    const int64_t stop = end - item < plane.inner - column ? end : item + plane.inner - column;
    for (; item + lanes <= stop; item += lanes, column += lanes) f(row, column, item, lanes);
    if (item < stop) f(row, column, item, stop - item);
    item = stop;
    column = 0;
    ++row;
  }
}

// Lanes sum in units of 2^16, which no sum over a block of finite values overflows; the product is exact and free in a
// fused multiply-add. (Values below 2^−110 lose their last bits to subnormals.)
constexpr float kScale = 0x1p-16f;
// What lanes sum before float64 takes over: at most 256 values each.
constexpr int64_t kBlock = 1024;

template <class Model, class T, class S, bool plain>
void forward_range(const Problem& problem, int64_t begin, int64_t end, T* loss, Totals& totals) {
  using V = typename Lanes<T>::Reg;
  const Model model(problem.options);
  const PairSource<V, S, plain> source(problem);
  const V zero{};
  const V one = broadcast(T(1));
  V sum{}, valid{}, counted{}, correct{}, ties{}, a{}, b{}, invalid{};
  const auto body = [&](int64_t row, int64_t column, int64_t item, auto count) __attribute__((always_inline)) {
    const Pairs<V> x = source(row, column, count);
    V value = model.loss(x.a, x.b, x.p, x.q);
    if constexpr (plain) {
      sum += (x.counted ? value : zero) * kScale;
      return;
    }
    const auto bad = model.invalid(x.p, x.q);
    value = bad ? broadcast(T(__builtin_nan(""))) : x.weight * value;
    value = x.counted ? value : zero;
    sum += value * kScale;
    if (loss) store_as(loss + item, value, count);
    valid += x.valid ? one : zero;
    counted += x.counted ? one : zero;
    invalid += x.counted & bad ? one : zero;
    if (problem.wants_stats) {
      correct += x.counted & (x.a > x.b) ? one : zero;
      ties += x.counted & (x.a == x.b) ? one : zero;
      a += (x.counted ? x.a : zero) * kScale;
      b += (x.counted ? x.b : zero) * kScale;
    }
  };
  for_each_register<T>(problem.plane, begin, end, body);
  totals.loss = sum_lanes(sum) / kScale * (plain ? source.weight[0] : 1);
  totals.valid = plain ? end - begin : sum_lanes(valid);
  totals.counted = plain ? end - begin : sum_lanes(counted);
  totals.correct = sum_lanes(correct);
  totals.ties = sum_lanes(ties);
  totals.a = sum_lanes(a) / kScale;
  totals.b = sum_lanes(b) / kScale;
  totals.invalid = plain ? model.invalid(source.p, source.q)[0] != 0 : sum_lanes(invalid);
  if (totals.invalid > 0) totals.loss = __builtin_nan("");
}

template <class Model, class T, class S, bool plain>
void backward_range(const Problem& problem, const Gradients& out, int64_t begin, int64_t end, Totals& totals) {
  using V = typename Lanes<T>::Reg;
  const Model model(problem.options);
  const PairSource<V, S, plain> source(problem);
  const V zero{};
  const bool one_grad_output = is_number(out.grad_output);
  const V grad_output = load<V>(out.grad_output, 0, 0, 1) * T(out.scale);
  S* const to_a = static_cast<S*>(out.a);
  S* const to_b = static_cast<S*>(out.b);
  const V plain_scale =
      model.invalid(source.p, source.q) ? broadcast(T(__builtin_nan(""))) : grad_output * source.weight;
  V sum_p{};
  const auto body = [&](int64_t row, int64_t column, int64_t item, auto count) __attribute__((always_inline)) {
    const Pairs<V> x = source(row, column, count);
    V scale = plain_scale;
    if constexpr (!plain) {
      scale = grad_output;
      if (!one_grad_output) scale = load<V>(out.grad_output, row, column, count) * T(out.scale);
      scale = model.invalid(x.p, x.q) ? broadcast(T(__builtin_nan(""))) : scale * x.weight;
    }
    V grad_a, grad_b, grad_p;
    model.gradient(x.a, x.b, x.p, x.q, grad_a, grad_b, grad_p);
    if (plain || out.a) store_as(to_a + item, x.counted ? scale * grad_a : zero, count);
    if (plain || out.b) store_as(to_b + item, x.counted ? scale * grad_b : zero, count);
    if (plain || (out.p == nullptr && !out.sum_p)) return;
    grad_p = x.counted ? scale * grad_p : zero;
    sum_p += grad_p * kScale;
    if (out.p == nullptr) return;
    with_storage(out.p_dtype,
                 [&](auto storage) { store_as(static_cast<decltype(storage)*>(out.p) + item, grad_p, count); });
  };
  for_each_register<T>(problem.plane, begin, end, body);
  totals.grad_p = sum_lanes(sum_p) / kScale;
}

template <template <class> class Model>
void forward(const Problem& problem, int64_t begin, int64_t end, void* loss, Totals& totals) {
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    using S = decltype(storage);
    const bool plain = is_plain(problem) && loss == nullptr && !problem.wants_stats;
    const auto range = plain ? &forward_range<Model<T>, T, S, true> : &forward_range<Model<T>, T, S, false>;
    for (int64_t block = begin; block < end; block += kBlock) {
      Totals part;
      range(problem, block, block + kBlock < end ? block + kBlock : end, static_cast<T*>(loss), part);
      totals.add(part);
    }
  });
}

template <template <class> class Model>
void backward(const Problem& problem, const Gradients& out, int64_t begin, int64_t end, Totals& totals) {
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    using S = decltype(storage);
    const bool plain = is_plain(problem) && is_number(out.grad_output) && out.a && out.b && !out.p && !out.sum_p;
    const auto range = plain ? &backward_range<Model<T>, T, S, true> : &backward_range<Model<T>, T, S, false>;
    if (!out.sum_p) return range(problem, out, begin, end, totals);
    for (int64_t block = begin; block < end; block += kBlock) {
      Totals part;
      range(problem, out, block, block + kBlock < end ? block + kBlock : end, part);
      totals.add(part);
    }
  });
}

}  // namespace rewardfuse::REWARDFUSE_TARGET::pairwise
