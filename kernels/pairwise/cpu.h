// The loops of every op on pairs, for one instruction set.
//
// Decomposition: the caller splits the items into ranges whose bounds depend on the number of items alone and adds the
// ranges' totals in order; within a range, lane j of a register sums every `lanes`-th pair. So the bits of a result do
// not depend on the number of threads.
// Traffic: forward reads a and b (8 bytes a pair in float32) and what of p, q, weight and mask is a whole tensor; it
// writes nothing unless reduction is "none". Backward reads the same and writes the gradients asked for.
// Precision: float32 maths for 16-bit and float32 rewards, float64 for float64; sums are float32 lanes within a range
// of a few thousand pairs, float64 across lanes and ranges.
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

template <class V, class S>
RF_HD Pairs<V> load_pairs(const Problem& problem, int64_t row, int64_t column, int64_t count) {
  const auto scores = [&](const Operand& operand) {
    const int64_t offset = row * operand.outer_stride + column * operand.inner_stride;
    return load_as<V>(static_cast<const S*>(operand.data) + offset, operand.inner_stride, count);
  };
  Pairs<V> pairs;
  pairs.a = scores(problem.a);
  pairs.b = scores(problem.b);
  pairs.p = load<V>(problem.p, row, column, count);
  pairs.q = load<V>(problem.q, row, column, count);
  pairs.weight = load<V>(problem.weight, row, column, count);
  pairs.valid = first_lanes<lane_t<V>>(count) & (load<V>(problem.mask, row, column, count) != 0.0f);
  pairs.counted = pairs.valid & (pairs.weight != 0.0f);
  return pairs;
}

// Calls f(row, column, item, count) for the pieces of [begin, end) that one register holds.
template <class T, class F>
RF_HD void for_each_register(const Plane& plane, int64_t begin, int64_t end, F&& f) {
  int64_t row = begin / plane.inner, column = begin % plane.inner;
  for (int64_t item = begin; item < end;) {
    const int64_t stop = end - item < plane.inner - column ? end : item + plane.inner - column;
    for (; item < stop; item += Lanes<T>::count, column += Lanes<T>::count) {
      const int64_t count = stop - item < Lanes<T>::count ? stop - item : Lanes<T>::count;
      f(row, column, item, count);
    }
    item = stop;
    column = 0;
    ++row;
  }
}

template <class Model, class T, class S>
void forward_range(const Problem& problem, int64_t begin, int64_t end, T* loss, Totals& totals) {
  using V = typename Lanes<T>::Reg;
  const Model model(problem.options);
  const V zero{};
  const V one = broadcast(T(1));
  V sum{}, valid{}, counted{}, correct{}, ties{}, a{}, b{}, invalid{};
  for_each_register<T>(problem.plane, begin, end, [&](int64_t row, int64_t column, int64_t item, int64_t count) {
    const Pairs<V> x = load_pairs<V, S>(problem, row, column, count);
    const auto bad = model.invalid(x.p, x.q);
    V value = x.weight * model.loss(x.a, x.b, x.p, x.q);
    value = bad ? broadcast(T(__builtin_nan(""))) : value;
    value = x.counted ? value : zero;
    if (loss) store_as(loss + item, value, count);
    sum += value;
    valid += x.valid ? one : zero;
    counted += x.counted ? one : zero;
    correct += x.counted & (x.a > x.b) ? one : zero;
    ties += x.counted & (x.a == x.b) ? one : zero;
    a += x.counted ? x.a : zero;
    b += x.counted ? x.b : zero;
    invalid += x.counted & bad ? one : zero;
  });
  totals.loss = sum_lanes(sum);
  totals.valid = sum_lanes(valid);
  totals.counted = sum_lanes(counted);
  totals.correct = sum_lanes(correct);
  totals.ties = sum_lanes(ties);
  totals.a = sum_lanes(a);
  totals.b = sum_lanes(b);
  totals.invalid = sum_lanes(invalid);
}

template <class Model, class T, class S>
void backward_range(const Problem& problem, const Gradients& out, int64_t begin, int64_t end, Totals& totals) {
  using V = typename Lanes<T>::Reg;
  const Model model(problem.options);
  const V zero{};
  V sum_p{};
  for_each_register<T>(problem.plane, begin, end, [&](int64_t row, int64_t column, int64_t item, int64_t count) {
    const Pairs<V> x = load_pairs<V, S>(problem, row, column, count);
    const auto bad = model.invalid(x.p, x.q);
    V scale = load<V>(out.grad_output, row, column, count) * T(out.scale) * x.weight;
    scale = bad ? broadcast(T(__builtin_nan(""))) : scale;
    V grad_a, grad_b, grad_p;
    model.gradient(x.a, x.b, x.p, x.q, grad_a, grad_b, grad_p);
    if (out.a) store_as(static_cast<S*>(out.a) + item, x.counted ? scale * grad_a : zero, count);
    if (out.b) store_as(static_cast<S*>(out.b) + item, x.counted ? scale * grad_b : zero, count);
    grad_p = x.counted ? scale * grad_p : zero;
    if (out.sum_p) sum_p += grad_p;
    if (out.p) {
      with_storage(out.p_dtype, [&](auto storage) {
        store_as(static_cast<decltype(storage)*>(out.p) + item, grad_p, count);
      });
    }
  });
  totals.grad_p = sum_lanes(sum_p);
}

// Calls f(accumulation type, storage type) for the dtype of the rewards.
template <class F>
RF_HD void with_rewards(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{}, double{});
    case DType::kFloat16: return f(float{}, Half{});
    case DType::kBFloat16: return f(float{}, BFloat16{});
    default: return f(float{}, float{});
  }
}

template <template <class> class Model>
void forward(const Problem& problem, int64_t begin, int64_t end, void* loss, Totals& totals) {
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    forward_range<Model<T>, T, decltype(storage)>(problem, begin, end, static_cast<T*>(loss), totals);
  });
}

template <template <class> class Model>
void backward(const Problem& problem, const Gradients& out, int64_t begin, int64_t end, Totals& totals) {
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    backward_range<Model<T>, T, decltype(storage)>(problem, out, begin, end, totals);
  });
}

}  // namespace rewardfuse::REWARDFUSE_TARGET::pairwise
