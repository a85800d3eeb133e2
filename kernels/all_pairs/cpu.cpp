// All pairs of a list on the CPU.
//
// Decomposition: the caller splits the lists into ranges. A list's items are drawn together into scratch; item i meets
// a register of items j > i at a time, so that each pair is worked out once, and gives its slope to both. Traffic: what
// a list holds, once; K² / 2 pairs of arithmetic. Memory is O(K). Precision: float32 for 16-bit and float32 scores,
// float64 for float64 and wherever float32 cannot hold the labels; a list's loss is summed in float64 across items.
#include "lists/cpu.h"

#include "all_pairs/args.h"
#include "all_pairs/math.h"

namespace rewardfuse::REWARDFUSE_TARGET {
namespace all_pairs {

using lists::Gradients;
using lists::is_there;
using lists::List;
using lists::list_at;
using lists::Totals;
using lists::widen;
using rewardfuse::all_pairs::Problem;

// The valid items of one list, drawn together; room for one register more than there are items.
template <class T>
struct Items {
  T *score, *label, *slope;
  int64_t* index;
  int64_t count = 0;

  static constexpr int64_t kSpare = 64;
  static int64_t bytes(int64_t size) { return (size + kSpare) * (3 * sizeof(T) + sizeof(int64_t)); }
  Items(void* memory, int64_t size) {
    index = static_cast<int64_t*>(memory);
    score = reinterpret_cast<T*>(index + size + kSpare);
    label = score + size + kSpare;
    slope = label + size + kSpare;
  }
};

// Fills `items` with what the mask and the length leave; false where T cannot hold a label.
template <class T, class S>
bool draw(const Problem& problem, const List& list, Items<T>& items) {
  const auto& lists = problem.lists;
  const S* const scores = static_cast<const S*>(lists.scores.data) + offset_of(lists, list, lists.scores);
  const int64_t mask_at = offset_of(lists, list, lists.mask);
  items.count = 0;
  for (int64_t i = 0; i < list.length; ++i) {
    if (lists.mask.data && !is_there(lists.mask, mask_at, i)) continue;
    items.score[items.count] = widen<T>(scores + i * lists.scores.inner_stride);
    items.index[items.count++] = i;
  }
  return with_storage(problem.labels.dtype, [&](auto storage) {
    using L = decltype(storage);
    const L* const labels = static_cast<const L*>(problem.labels.data) + offset_of(lists, list, problem.labels);
    bool exact = true;
    for (int64_t i = 0; i < items.count; ++i) {
      const L* const label = labels + items.index[i] * problem.labels.inner_stride;
      items.label[i] = widen<T>(label);
      exact &= sizeof(T) == 8 || static_cast<double>(items.label[i]) == widen<double>(label);
    }
    return exact;
  });
}

template <class T>
bool has_bad_label(const Items<T>& items) {
  bool found = false;
  for (int64_t i = 0; i < items.count; ++i) found |= items.label[i] - items.label[i] != 0;  // NaN, inf
  return found;
}

// Calls f(i, j, mask, pair) for every register of items j > i.
template <class T, class F>
void for_each_pair(const Items<T>& items, T margin, F&& f) {
  using V = typename Lanes<T>::Reg;
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t i = 0; i + 1 < items.count; ++i) {
    const V score = broadcast(items.score[i]), label = broadcast(items.label[i]);
    for (int64_t j = i + 1; j < items.count; j += lanes) {
      const PairOfItems<V> pair(score, label, load_as<V>(items.score + j, 1, lanes),
                                load_as<V>(items.label + j, 1, lanes), broadcast(margin));
      f(i, j, first_lanes<T>(items.count - j) & (pair.sign != 0.0f), pair);
    }
  }
}

struct Sums {
  double loss = 0, pairs = 0;
};

// Lanes meet in float64 once in kBlock registers: every time would cost more than the pairs of a short list.
template <class T>
Sums sum_of_losses(const Items<T>& items, T margin) {
  using V = typename Lanes<T>::Reg;
  constexpr int kBlock = 64;
  Sums sums;
  V loss{}, pairs{};
  int registers = 0;
  const auto fold = [&] {
    sums.loss += sum_lanes(loss);
    sums.pairs += sum_lanes(pairs);
    loss = pairs = V{};
    registers = 0;
  };
  for_each_pair(items, margin, [&](int64_t, int64_t, auto is_pair, const PairOfItems<V>& pair) {
    loss += is_pair ? pair.loss() : V{};
    pairs += is_pair ? V{} + 1.0f : V{};
    if (++registers == kBlock) fold();
  });
  fold();
  return sums;
}

template <class T>
void sum_slopes(const Items<T>& items, T margin) {
  using V = typename Lanes<T>::Reg;
  for (int64_t i = 0; i < items.count + Lanes<T>::count; ++i) items.slope[i] = 0;
  for_each_pair(items, margin, [&](int64_t i, int64_t j, auto is_pair, const PairOfItems<V>& pair) {
    const V slope = is_pair ? pair.slope() : V{};
    V theirs;
    __builtin_memcpy(&theirs, items.slope + j, sizeof(theirs));
    theirs -= slope;
    __builtin_memcpy(items.slope + j, &theirs, sizeof(theirs));
    items.slope[i] += add_lanes(slope);
  });
}

// Draws the list in T, or in float64 where T cannot hold its labels, and calls f(items, whether a label is not finite).
template <class T, class S, class F>
void with_items(const Problem& problem, const List& list, void* scratch, F&& f) {
  Items<T> items(scratch, problem.lists.size);
  if (draw<T, S>(problem, list, items)) return f(items, has_bad_label(items));
  Items<double> wide(scratch, problem.lists.size);
  draw<double, S>(problem, list, wide);
  f(wide, has_bad_label(wide));
}

int64_t scratch_bytes(const Problem& problem) { return Items<double>::bytes(problem.lists.size); }

void forward(const Problem& problem, int64_t begin, int64_t end, void* scratch, void* loss, void* saved,
             Totals& totals) {
  double* const pairs = static_cast<double*>(saved);
  const auto& lists = problem.lists;
  with_rewards(lists.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    for (int64_t r = begin; r < end; ++r) {
      const List list = list_at(lists, r);
      const T weight = lists::per_list<T>(lists.weight, r);
      with_items<T, decltype(storage)>(problem, list, scratch, [&](const auto& items, bool bad) {
        using A = std::remove_cvref_t<decltype(*items.score)>;
        const Sums sums = sum_of_losses(items, lists::per_list<A>(problem.margin, 0));
        pairs[r] = sums.pairs;
        totals.valid += sums.pairs > 0;
        double value = 0;
        if (weight != 0) {
          totals.invalid += bad;
          if (sums.pairs > 0) value = weight * (sums.loss / sums.pairs);
          if (bad) value = __builtin_nan("");
        }
        totals.loss += value;
        if (loss) static_cast<T*>(loss)[r] = static_cast<T>(value);
      });
    }
  });
}

void backward(const Problem& problem, const Gradients& out, int64_t begin, int64_t end, void* scratch, Totals& totals) {
  const auto& lists = problem.lists;
  const double* const pairs = static_cast<const double*>(out.saved);
  with_rewards(lists.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    using S = decltype(storage);
    for (int64_t r = begin; r < end; ++r) {
      const List list = list_at(lists, r);
      S* const to = static_cast<S*>(out.scores) + contiguous_offset(lists, list);
      for (int64_t i = 0; i < list.places; ++i) to[i] = S{};
      const T weight = lists::per_list<T>(lists.weight, r);
      if (weight == 0 || !(pairs[r] > 0)) continue;
      const T factor = lists::per_list<T>(out.grad_output, r) * T(out.scale) * weight / T(pairs[r]);
      with_items<T, S>(problem, list, scratch, [&](const auto& items, bool bad) {
        using A = std::remove_cvref_t<decltype(*items.score)>;
        totals.invalid += bad;
        sum_slopes(items, lists::per_list<A>(problem.margin, 0));
        for (int64_t i = 0; i < items.count; ++i) {
          const T gradient = bad ? T(__builtin_nan("")) : factor * T(items.slope[i]);
          store_as(to + items.index[i], broadcast(gradient), 1);
        }
      });
    }
  });
}

}  // namespace all_pairs

const AllPairsCpu all_pairs_kernels = {&all_pairs::scratch_bytes, &all_pairs::forward, &all_pairs::backward};

}  // namespace rewardfuse::REWARDFUSE_TARGET
