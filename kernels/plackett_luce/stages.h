// The stages of a tile, in registers: column c holds the c-th position of every lane.
//
// A tile is either `lanes` short lists side by side, each lane a list, or a piece of one long list cut into `lanes`
// runs of positions that follow one another. The second kind takes a pass more: each run first on its own, then what
// stands behind it (forward: the sum of later runs; backward: the a of earlier ones) comes in through one number a run.
#pragma once

#include "common/simd.h"
#include "plackett_luce/math.h"

namespace rewardfuse::REWARDFUSE_TARGET::plackett_luce {

template <class T>
constexpr T kLowest = sizeof(T) == 4 ? T(-0x1.fffffep127) : T(-0x1.fffffffffffffp1023);

// Of put_in_front. More would cost the loss digits: its terms are the sum of max − s ≥ −slack and a logarithm.
constexpr int kSlack = 1;

// A tile and its companions, all of them columns of registers.
template <class T>
struct Tile {
  using V = typename Lanes<T>::Reg;
  V* score = nullptr;  // −inf where a lane has ended; backward leaves the gradient here
  V* keep = nullptr;   // of the step to this position
  V* add = nullptr;    // likewise
  V* sum = nullptr;    // of the run from this position on, relative to the largest score from here on; then u / sum
  V* scale = nullptr;  // what a sum behind the run is worth relative to that
  V* u = nullptr;      // weights by position, 0 beyond the observed ones; null: 1 at observed positions
  V* v = nullptr;      // null: u
  int64_t columns = 0;
  typename Lanes<T>::Mask observed{};  // how many positions of each lane are
  int64_t all_observed = 0;            // the least of them
  V first{};                           // the first score of the lane's list
};

// Σ u·L − v·s. Where every weight is 1, Σ log(sum) is the log of a product: exponents are added, mantissas multiplied,
// so that a stage costs four instructions and not a logarithm.
template <class T>
class StageLoss {
  using V = typename Lanes<T>::Reg;
  using Mask = typename Lanes<T>::Mask;
  static constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
  static constexpr int kBias = sizeof(T) == 4 ? 127 : 1023;

 public:
  // The position's own excess over its score, max − s.
  RF_HD void add_excess(V max, V score) { excess_ += max - score; }
  RF_HD void add_excess(V max, V score, Mask observed) { excess_ += observed ? max - score : V{}; }
  RF_HD void add_log(V sum) {
    const Mask bits = (Mask)sum;
    exponent_ += bits >> kMantissa;
    ++stages_;
    product_ *= mantissa(bits);
  }
  RF_HD void add_log(V sum, Mask observed) {
    const Mask bits = (Mask)sum;
    exponent_ += observed ? (bits >> kMantissa) - kBias : Mask{};
    product_ *= observed ? mantissa(bits) : broadcast(T(1));
  }
  RF_HD void add_weighted(V max, V sum, V score, V u, const V* v, V first) {
    const V log_sum = log_nonnegative(sum);
    if (v == nullptr) {
      excess_ += u == 0.0f ? V{} : u * ((max - score) + log_sum);
    } else {
      excess_ += u == 0.0f ? V{} : u * ((max - first) + log_sum);
      excess_ -= *v == 0.0f ? V{} : *v * (score - first);
    }
  }
  // Before the product of mantissas in [1, 2) could overflow, and before sums lose digits.
  RF_HD void fold() {
    folded_ += excess_ + log_nonnegative(product_);
    excess_ = V{};
    product_ = broadcast(T(1));
  }
  RF_HD V total() const {
    const Mask exponent = exponent_ - kBias * stages_;
    return folded_ + (excess_ + log_nonnegative(product_)) +
           __builtin_convertvector(exponent, V) * T(0.69314718055994530942);
  }

 private:
  static RF_HD V mantissa(Mask bits) {
    const Mask one = (Mask)broadcast(T(1));
    return (V)((bits & ((typename Lanes<T>::Int(1) << kMantissa) - 1)) | one);
  }

  V excess_{}, folded_{}, product_ = broadcast(T(1));
  Mask exponent_{};
  typename Lanes<T>::Int stages_ = 0;
};
constexpr int64_t kFold = 32;

template <class T>
RF_HD Suffix<typename Lanes<T>::Reg> nothing() {
  return {broadcast(kLowest<T>), typename Lanes<T>::Reg{}};
}

// Calls f(c, whether every lane's position c is observed) for the columns from the last to the first.
template <class F>
RF_HD void from_last(int64_t columns, int64_t all_observed, F&& f) {
  int64_t c = columns - 1;
  for (; c >= all_observed; --c) f(c, std::false_type{});
  for (; c >= 0; --c) f(c, std::true_type{});
}

template <class T>
RF_HD typename Lanes<T>::Mask is_observed(const Tile<T>& tile, int64_t c) {
  return tile.observed > static_cast<typename Lanes<T>::Int>(c);
}

// Lists side by side: the loss of each lane's list.
template <bool weighted, class T>
typename Lanes<T>::Reg short_forward(const Tile<T>& tile) {
  using V = typename Lanes<T>::Reg;
  StageLoss<T> loss;
  auto suffix = nothing<T>();
  from_last(tile.columns, tile.all_observed, [&](int64_t c, auto all) __attribute__((always_inline)) {
    const V score = tile.score[c];
    put_in_front<kSlack>(suffix, score);
    if constexpr (weighted) {
      loss.add_weighted(suffix.max, suffix.sum, score, tile.u[c], tile.v ? tile.v + c : nullptr, tile.first);
    } else {
      if constexpr (all) {
        loss.add_excess(suffix.max, score);
        loss.add_log(suffix.sum);
      } else {
        loss.add_excess(suffix.max, score, is_observed(tile, c));
        loss.add_log(suffix.sum, is_observed(tile, c));
      }
    }
    if (c % kFold == 0) loss.fold();
  });
  return suffix.sum == suffix.sum ? loss.total() : suffix.sum;  // a NaN behind the observed positions
}

// What a stage adds to a, u / sum; 0 where nothing was observed, whatever the sum is.
template <bool weighted, class T>
RF_HD typename Lanes<T>::Reg stage_weight(const Tile<T>& tile, int64_t c, typename Lanes<T>::Reg sum) {
  using V = typename Lanes<T>::Reg;
  if constexpr (weighted) return tile.u[c] == 0.0f ? V{} : tile.u[c] / sum;
  return is_observed(tile, c) ? 1.0f / sum : V{};
}

// a from the first column to the last, and the gradient in place of the scores. Finds the stages' weights in `sum`;
// `a` is what comes from the positions before.
template <bool weighted, class T>
void gradient_from_weights(const Tile<T>& tile, typename Lanes<T>::Reg a, typename Lanes<T>::Reg factor) {
  using V = typename Lanes<T>::Reg;
  const V one = broadcast(T(1));
  const auto column = [&](int64_t c, V v) __attribute__((always_inline)) {
    a += tile.sum[c];
    tile.score[c] = (tile.add[c] * a - v) * factor;
    a *= tile.keep[c];
  };
  if constexpr (weighted) {
    for (int64_t c = 0; c < tile.columns; ++c) column(c, tile.v ? tile.v[c] : tile.u[c]);
  } else {
    const int64_t all = tile.all_observed < tile.columns ? tile.all_observed : tile.columns;
    for (int64_t c = 0; c < all; ++c) column(c, one);
    for (int64_t c = all; c < tile.columns; ++c) column(c, is_observed(tile, c) ? one : V{});
  }
}

template <bool weighted, class T>
void short_backward(const Tile<T>& tile, typename Lanes<T>::Reg factor) {
  auto suffix = nothing<T>();
  for (int64_t c = tile.columns - 1; c >= 0; --c) {
    const auto step = put_in_front<kSlack>(suffix, tile.score[c]);
    tile.keep[c] = step.keep;
    tile.add[c] = step.add;
    tile.sum[c] = stage_weight<weighted>(tile, c, suffix.sum);
  }
  gradient_from_weights<weighted>(tile, typename Lanes<T>::Reg{}, factor);
}

// log Σ e^s of what a list holds behind a piece. Sums across runs and pieces are float64, so that they do not drift.
template <class T>
struct Carry {
  T max = kLowest<T>;
  double sum = 0;
};

// The sums behind the runs, and what brings a sum from a run's own max to the largest score, on which runs meet.
template <class T>
struct Behind {
  typename Lanes<T>::Reg sum, to_largest;
};

// A piece of one list, run by run on its own: fills sum, scale, and keep and add where asked. Leaves `carry` with the
// state in front of the piece.
template <bool backward, class T, class F>
Behind<T> take_runs(const Tile<T>& tile, Carry<T>& carry, F&& each) {
  using V = typename Lanes<T>::Reg;
  constexpr int lanes = Lanes<T>::count;
  Behind<T> behind;
  V max_behind, largest, top = broadcast(kLowest<T>);
  for (int64_t c = 0; c < tile.columns; ++c) top = tile.score[c] > top ? tile.score[c] : top;
  for (int j = lanes - 1; j >= 0; --j) {
    max_behind[j] = carry.max;
    carry.max = top[j] > carry.max ? top[j] : carry.max;
    largest[j] = carry.max;
  }
  Suffix<V> suffix{max_behind, V{}};
  V scale = broadcast(T(1));
  for (int64_t c = tile.columns - 1; c >= 0; --c) {
    const V score = tile.score[c];
    const auto step = put_in_front<kSlack>(suffix, score);
    scale *= step.keep;
    tile.sum[c] = suffix.sum;
    tile.scale[c] = scale;
    if constexpr (backward) {
      tile.keep[c] = step.keep;
      tile.add[c] = step.add;
    }
    each(c, suffix.max, score);
  }
  behind.to_largest = exp_nonpositive(suffix.max - largest);
  for (int j = lanes - 1; j >= 0; --j) {
    behind.sum[j] = static_cast<T>(carry.sum);
    carry.sum = (suffix.sum[j] + carry.sum * scale[j]) * behind.to_largest[j];
  }
  return behind;
}

// The loss of a piece; `carry` is the state behind it and becomes the one in front of it.
template <bool weighted, class T>
double long_forward(const Tile<T>& tile, Carry<T>& carry) {
  using V = typename Lanes<T>::Reg;
  StageLoss<T> loss;
  if constexpr (weighted) {
    const auto behind = take_runs<false>(tile, carry, [&](int64_t c, V max, V) { tile.add[c] = max; });
    for (int64_t c = 0; c < tile.columns; ++c) {
      const V sum = tile.sum[c] + tile.scale[c] * behind.sum;
      loss.add_weighted(tile.add[c], sum, tile.score[c], tile.u[c], tile.v ? tile.v + c : nullptr, tile.first);
      if (c % kFold == 0) loss.fold();
    }
  } else {
    const auto behind = take_runs<false>(tile, carry, [&](int64_t c, V max, V score) __attribute__((always_inline)) {
      if (c < tile.all_observed) return loss.add_excess(max, score);
      loss.add_excess(max, score, is_observed(tile, c));
    });
    from_last(tile.columns, tile.all_observed, [&](int64_t c, auto all) __attribute__((always_inline)) {
      const V sum = tile.sum[c] + tile.scale[c] * behind.sum;
      if constexpr (all) {
        loss.add_log(sum);
      } else {
        loss.add_log(sum, is_observed(tile, c));
      }
      if (c % kFold == 0) loss.fold();
    });
  }
  return sum_lanes(loss.total());
}

// The gradient of a piece; `carry` is the state behind it, `carried` is the a that comes from the positions before it
// and becomes that of the positions before the next piece.
template <bool weighted, class T>
void long_backward(const Tile<T>& tile, Carry<T> carry, double& carried, T factor) {
  using V = typename Lanes<T>::Reg;
  const auto behind = take_runs<true>(tile, carry, [](int64_t, V, V) {});
  V gained{};  // by the a that leaves a run from the run's own stages
  for (int64_t c = 0; c < tile.columns; ++c) {
    const V weight = stage_weight<weighted>(tile, c, tile.sum[c] + tile.scale[c] * behind.sum);
    gained += tile.scale[c] * weight;
    tile.sum[c] = weight;
  }
  V before;
  for (int j = 0; j < Lanes<T>::count; ++j) {
    carried *= behind.to_largest[j];
    before[j] = static_cast<T>(carried);
    carried = gained[j] + tile.scale[0][j] * carried;
  }
  gradient_from_weights<weighted>(tile, before, broadcast(factor));
}

}  // namespace rewardfuse::REWARDFUSE_TARGET::plackett_luce
