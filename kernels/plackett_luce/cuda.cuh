// Plackett–Luce on CUDA devices: a list taken by a team of threads, tile by tile.
//
// A slot is a place of the scan: a position of the ranking, or, with a mask and no order, an item that may be missing,
// whose position is the number of items before it. A thread holds kSlots neighbours; a tile is a team's slots. Suffix
// states join associatively, and so do the maps a -> slope·a + offset of the gradient's recurrence, so that each is a
// fold of a thread's slots, a scan over the team and a carry from tile to tile.
#pragma once

#include "plackett_luce/math.h"
#include "plackett_luce/ranking.cuh"

namespace rewardfuse::cuda::plackett_luce {

using lists::CudaForward;
using lists::Gradients;
using lists::Teams;
using rewardfuse::plackett_luce::kChunk;
using rewardfuse::plackett_luce::saved_at;

constexpr int kSlots = rewardfuse::lists::kSlotsPerThread;
static_assert(kChunk == kThreads * kSlots);  // a block's tile: where forward saves a state for backward

template <class T>
__device__ __forceinline__ Suffix<T> nothing() {
  return {sizeof(T) == 4 ? T(-0x1.fffffep127) : T(-0x1.fffffffffffffp1023), T(0)};
}

// In either order.
template <class T>
__device__ __forceinline__ Suffix<T> join(Suffix<T> a, Suffix<T> b) {
  const bool up = b.max > a.max;
  const T e = exp_nonpositive(-magnitude(a.max - b.max));
  return {up ? b.max : a.max, up ? a.sum * e + b.sum : a.sum + b.sum * e};
}

// a -> slope·a + offset.
template <class T>
struct Affine {
  T slope, offset;
};

template <class T>
__device__ __forceinline__ Affine<T> then(Affine<T> first, Affine<T> second) {
  return {second.slope * first.slope, second.slope * first.offset + second.offset};
}

template <class T>
struct Slots {
  T score[kSlots], u[kSlots], v[kSlots];  // weights 0 where nothing was observed
  int64_t item[kSlots];
  bool there[kSlots];
};

// One team's walk over one list.
template <class T, class S, bool plain, class Team>
struct Walk {
  const Problem& problem;
  const Ranking<T>& ranking;
  const Team team;
  const int64_t tile = static_cast<int64_t>(team.width) * kSlots;
  int64_t position = 0;          // with holes: of the tile's first item, or past its last
  unsigned long long names = 0;  // of what this thread read of the order

  __device__ __forceinline__ bool has_holes() const { return !plain && problem.lists.mask.data && !problem.order.data; }
  __device__ __forceinline__ bool is_weighted() const { return !plain && problem.position_weight.data; }
  __device__ __forceinline__ bool has_item_weight() const { return !plain && problem.item_weight.data; }

  __device__ __forceinline__ int64_t tiles() const { return (ranking.slots + tile - 1) / tile; }

  // The item at a slot, wherever the device's order points.
  __device__ __forceinline__ int64_t item_at(int64_t slot, bool notes) {
    if (plain || problem.order.data == nullptr) return slot;
    const int64_t item = load<int64_t>(problem.order, ranking.row, ranking.begin + slot);
    if (notes) names += name_of(item);
    return lists::clamp(item, 0, ranking.places - 1);
  }

  __device__ __forceinline__ T score_of(int64_t item) const {
    return widen<T>(lists::scores_of<S>(problem.lists, ranking)[item * problem.lists.scores.inner_stride]);
  }

  __device__ __forceinline__ void read_scores(int64_t first, Slots<T>& slots) {
    if constexpr (plain) {
      const bool whole = first + kSlots <= ranking.slots;
      Vector<S, kSlots> items = {};
      if (whole) {
        items = *reinterpret_cast<const Vector<S, kSlots>*>(lists::scores_of<S>(problem.lists, ranking) + first);
      }
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        slots.item[j] = first + j;
        slots.there[j] = first + j < ranking.slots;
        slots.score[j] = whole ? widen<T>(items.item[j]) : slots.there[j] ? score_of(first + j) : T(0);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        const int64_t slot = first + j;
        slots.there[j] = slot < ranking.slots && (!has_holes() || lists::is_there(problem.lists, ranking, slot));
        slots.item[j] = slots.there[j] ? item_at(slot, true) : slot;
        slots.score[j] = slots.there[j] ? score_of(slots.item[j]) : T(0);
      }
    }
  }

  // The position of the thread's first item.
  template <bool forward>
  __device__ __forceinline__ int64_t first_position(int64_t first, const Slots<T>& slots) {
    if (!has_holes()) return first;
    int items = 0, total;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) items += slots.there[j];
    const int before = team.template scan<false>(items, 0, [](int a, int b) { return a + b; }, total);
    if (forward) position -= total;
    const int64_t of_thread = position + before;
    if (!forward) position += total;
    return of_thread;
  }

  __device__ __forceinline__ void read_weights(int64_t at, Slots<T>& slots) const {
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const bool observed = slots.there[j] && at < ranking.stages;
      slots.u[j] = observed ? T(1) : T(0);
      if (is_weighted() && observed) slots.u[j] = load<T>(problem.position_weight, ranking.row, ranking.begin + at);
      slots.v[j] = slots.u[j];
      if (has_item_weight() && observed) slots.v[j] = load<T>(problem.item_weight, ranking.row, ranking.begin + at);
      at += slots.there[j];
    }
  }

  // The thread's slots of a tile. Returns the state behind them, where `carry` is that behind the tile; `total` is the
  // tile's own.
  template <bool forward>
  __device__ __forceinline__ Suffix<T> read_tile(int64_t start, Suffix<T> carry, Slots<T>& slots, Suffix<T>& total) {
    const int64_t first = start + static_cast<int64_t>(team.rank) * kSlots;
    read_scores(first, slots);
    read_weights(first_position<forward>(first, slots), slots);
    Suffix<T> own = nothing<T>();
#pragma unroll
    for (int j = kSlots - 1; j >= 0; --j) {
      if (slots.there[j]) put_in_front(own, slots.score[j]);
    }
    const auto joined = [](Suffix<T> a, Suffix<T> b) { return join(a, b); };
    return join(team.template scan<true>(own, nothing<T>(), joined, total), carry);
  }

  // The thread's stages of a tile. Where every weight is 1, the sum of logarithms is that of a product: at most
  // length^4, which float holds.
  __device__ __forceinline__ T forward_tile(int64_t start, T first_score, Suffix<T>& carry) {
    Slots<T> slots;
    Suffix<T> total;
    Suffix<T> suffix = read_tile<true>(start, carry, slots, total);
    carry = join(total, carry);
    T loss = 0, product = 1;
#pragma unroll
    for (int j = kSlots - 1; j >= 0; --j) {
      const T score = slots.score[j], u = slots.u[j], v = slots.v[j];
      if (slots.there[j]) put_in_front(suffix, score);
      if (has_item_weight()) {
        if (u != T(0)) loss += u * ((suffix.max - first_score) + log_nonnegative(suffix.sum));
        if (v != T(0)) loss -= v * (score - first_score);
      } else if (u != T(0)) {
        loss += u * (suffix.max - score);
        if (is_weighted()) {
          loss += u * log_nonnegative(suffix.sum);
        } else {
          product *= suffix.sum;
        }
      }
    }
    return is_weighted() ? loss : loss + log_nonnegative(product);
  }

  // −log-likelihood of the list, in every thread; NaN where the list is bad.
  __device__ __forceinline__ T forward(Suffix<T>* saved) {
    Suffix<T> carry = nothing<T>();
    const T first_score = has_item_weight() && ranking.slots > 0 && !has_holes() ? score_of(item_at(0, false)) : T(0);
    position = ranking.length;
    double loss = 0;
    if constexpr (Team::kIsBlock) {
      for (int64_t t = tiles() - 1; t >= 0; --t) {
        if (saved && t < tiles() - 1 && team.rank == 0) saved[saved_at(problem.lists, ranking.index) + t] = carry;
        loss += forward_tile(t * tile, first_score, carry);
      }
    } else {
      loss = forward_tile(0, first_score, carry);
    }
    loss = team.sum(loss);
    bool bad = ranking.bad;
    if (!plain && problem.order.data) {
      for (int64_t i = team.rank; i < ranking.places && ranking.slots > 0; i += team.width) {
        if (lists::is_there(problem.lists, ranking, i)) names -= name_of(i);
      }
      bad |= team.sum(names) != 0;
    }
    if (carry.sum != carry.sum) bad = true;  // a NaN behind the observed positions
    return bad ? T(nan("")) : static_cast<T>(loss);
  }

  // The gradient of a tile; `carry` is the state behind it and `carried` the sum a that comes from the tiles before:
  // a_i = Q_i / sum_i = Σ_{j ≤ i} u_j·e^{max_i − max_j} / sum_j, ∂NLL/∂s_i = e^{s_i − max_i}·a_i − v_i. The maximum
  // seldom falls, so that a is a plain sum over long stretches and, unlike a product of r_i, keeps its accuracy.
  __device__ __forceinline__ void backward_tile(int64_t start, Suffix<T> carry, T& carried, T factor, S* gradient) {
    Slots<T> slots;
    Suffix<T> total;
    Suffix<T> suffix = read_tile<false>(start, carry, slots, total);
    T add[kSlots], keep[kSlots];
#pragma unroll
    for (int j = kSlots - 1; j >= 0; --j) {
      add[j] = 0;
      keep[j] = 1;
      if (slots.there[j]) {
        const Step<T> step = put_in_front(suffix, slots.score[j]);
        add[j] = step.add;
        keep[j] = step.keep;
        if (slots.u[j] != T(0)) slots.u[j] /= suffix.sum;  // the sum of scores of −inf is 0
      }
    }
    T a = sum_before(slots, keep, carried);
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      a += slots.u[j];
      slots.score[j] = slots.there[j] ? factor * (add[j] * a - slots.v[j]) : T(0);
      a *= keep[j];
    }
    if (ranking.slots > 0) write(slots, gradient + ranking.to);
  }

  // The sum a that reaches this thread's slots; `carried` goes from what reaches the tile to what leaves it.
  __device__ __forceinline__ T sum_before(const Slots<T>& slots, const T (&keep)[kSlots], T& carried) const {
    Affine<T> map{1, 0};
#pragma unroll
    for (int j = 0; j < kSlots; ++j) map = then(map, {keep[j], keep[j] * slots.u[j]});
    Affine<T> of_tile;
    const auto joined = [](Affine<T> a, Affine<T> b) { return then(a, b); };
    const Affine<T> before = team.template scan<false>(map, Affine<T>{1, 0}, joined, of_tile);
    const T a = before.slope * carried + before.offset;
    carried = of_tile.slope * carried + of_tile.offset;
    return a;
  }

  // Gradients, which stand in place of the scores.
  __device__ __forceinline__ void write(const Slots<T>& slots, S* gradient) const {
    if constexpr (plain) {
      if (slots.item[0] + kSlots <= ranking.places) {
        Vector<S, kSlots> items;
#pragma unroll
        for (int j = 0; j < kSlots; ++j) items.item[j] = narrow<S>(slots.score[j]);
        *reinterpret_cast<Vector<S, kSlots>*>(gradient + slots.item[0]) = items;
        return;
      }
    }
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const bool mine = !plain && problem.order.data ? slots.there[j] : slots.item[j] < ranking.places;
      if (mine) gradient[slots.item[j]] = narrow<S>(slots.score[j]);
    }
  }

  // Lists that are read and not bad; for the others slots is 0, and nothing is written.
  __device__ __forceinline__ void backward(const Suffix<T>* saved, T factor, S* gradient) {
    T carried = 0;
    if constexpr (Team::kIsBlock) {
      for (int64_t t = 0; t < tiles(); ++t) {
        Suffix<T> carry = nothing<T>();
        if (t < tiles() - 1) carry = saved[saved_at(problem.lists, ranking.index) + t];
        backward_tile(t * tile, carry, carried, factor, gradient);
      }
    } else {
      backward_tile(0, nothing<T>(), carried, factor, gradient);
    }
    if (ranking.slots == 0) return;
    const bool ordered = !plain && problem.order.data;
    for (int64_t i = (ordered ? 0 : tiles() * tile) + team.rank; i < ranking.places; i += team.width) {
      if (!ordered || !lists::is_there(problem.lists, ranking, i)) gradient[ranking.to + i] = narrow<S>(0.0f);
    }
  }
};

}  // namespace rewardfuse::cuda::plackett_luce
