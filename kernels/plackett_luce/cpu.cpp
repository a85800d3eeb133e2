// Plackett–Luce on the CPU.
//
// Decomposition: the caller splits the lists into ranges. Lists of at most kShort items are taken `lanes` at a time, a
// list a lane; longer ones in chunks of kChunk positions, each cut into `lanes` runs. What a list gives does not depend
// on its neighbours, so the bits of a result do not depend on the number of threads.
// Traffic, float32: forward reads 4 bytes a score; backward reads 4 and writes 4. An order adds its own 8, a mask 1.
// Everything else stays in the first-level cache: a tile and its companions take about 20 KiB.
// Precision: float32 for 16-bit and float32 scores, float64 for float64; a list's loss leaves the lanes as float64. No
// sum runs over more than kShort terms before it meets a shorter one, so errors do not grow with the list's length.
#include "lists/cpu.h"
#include "lists/tile.h"
#include "plackett_luce/args.h"
#include "plackett_luce/stages.h"

namespace rewardfuse::REWARDFUSE_TARGET {
namespace plackett_luce {

using lists::Gradients;
using lists::is_there;
using lists::List;
using lists::list_at;
using lists::Totals;
using lists::widen;
using rewardfuse::plackett_luce::chunks;
using rewardfuse::plackett_luce::kChunk;
using rewardfuse::plackett_luce::Problem;
using rewardfuse::plackett_luce::saved_at;

constexpr int64_t kShort = 128;

// The scratch of one range.
template <class T>
struct Scratch {
  using V = typename Lanes<T>::Reg;
  static constexpr int lanes = Lanes<T>::count;
  static constexpr int64_t kColumns = kChunk / lanes > kShort ? kChunk / lanes : kShort;
  static constexpr int64_t kRows = kColumns * lanes;

  V* columns;      // [7, kColumns]
  T* rows;         // [kRows]: scores, weights or gradients in the order of the ranking
  int64_t* index;  // [kShort · lanes or longest]: the item at each position
  uint8_t* seen;   // [longest]

  static int64_t bytes(int64_t longest) {
    const int64_t positions = longest > kShort * lanes ? longest : kShort * lanes;
    return 64 + 7 * kColumns * sizeof(V) + kRows * sizeof(T) + positions * (sizeof(int64_t) + 1);
  }

  Scratch(void* memory, int64_t longest) {
    const int64_t positions = longest > kShort * lanes ? longest : kShort * lanes;
    columns = reinterpret_cast<V*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    rows = reinterpret_cast<T*>(columns + 7 * kColumns);
    index = reinterpret_cast<int64_t*>(rows + kRows);
    seen = reinterpret_cast<uint8_t*>(index + positions);
  }

  V* column(int which) const { return columns + which * kColumns; }
};

// One lane of a tile: some positions of a list.
struct Lane {
  List list;
  int64_t start = 0, count = 0, observed = 0;
  const int64_t* index = nullptr;  // the items at these positions; null: the positions themselves
};

template <class T, class S, bool weighted>
class Range {
  using V = typename Lanes<T>::Reg;
  static constexpr int lanes = Lanes<T>::count;

 public:
  Range(const Problem& problem, const Gradients* gradients, void* scratch, T* loss, T* saved, Totals& totals)
      : problem_(problem),
        lists_(problem.lists),
        out_(gradients),
        scratch_(scratch, problem.lists.longest),
        loss_(loss),
        saved_(saved),
        totals_(totals),
        moved_(lists_.mask.data || problem.order.data) {
    tile_.score = scratch_.column(0);
    tile_.keep = scratch_.column(1);
    tile_.add = scratch_.column(2);
    tile_.sum = scratch_.column(3);
    tile_.scale = scratch_.column(4);
    if constexpr (weighted) {
      tile_.u = scratch_.column(5);
      tile_.v = problem.item_weight.data ? scratch_.column(6) : nullptr;
    }
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      List list = list_at(lists_, r);
      if (moved_ && list.places > kShort) flush();  // whose lanes' indices would be overwritten
      int64_t* const index = scratch_.index + waiting_ * kShort;
      const int64_t count = items(list, index);
      const bool read = count > 0 && lists::per_list<T>(lists_.weight, r) != 0;
      totals_.valid += count != 0;
      totals_.invalid += count < 0;
      if (out_ && (!read || count < list.places)) clear(list);
      if (!read) {
        if (loss_) loss_[r] = count < 0 ? T(__builtin_nan("")) : T(0);
        continue;
      }
      int64_t observed = problem_.top_k ? problem_.top_k[r] : problem_.top_k_value;
      if (observed == 0 || observed > count) observed = count;
      const Lane whole{list, 0, count, observed, moved_ ? index : nullptr};
      if ((moved_ ? list.places : count) > kShort) {
        one_list(whole);
      } else {
        bundle_[waiting_++] = whole;
        if (waiting_ == lanes) flush();
      }
    }
    flush();
  }

 private:
  // How many items the list has, and which stands at each position where that is not the position itself; −1 where the
  // order is none.
  int64_t items(const List& list, int64_t* index) {
    const auto& mask = lists_.mask;
    const int64_t mask_at = offset_of(lists_, list, mask);
    int64_t count = list.length;
    if (mask.data) {
      count = 0;
      for (int64_t i = 0; i < list.places; ++i) {
        if (is_there(mask, mask_at, i)) index[count++] = i;
      }
    }
    if (problem_.order.data == nullptr) return count;
    for (int64_t i = 0; i < list.places; ++i) scratch_.seen[i] = mask.data ? !is_there(mask, mask_at, i) : i >= count;
    bool good = true;
    with_storage(problem_.order.dtype, [&](auto storage) {
      using I = decltype(storage);
      if constexpr (std::is_integral_v<I>) {
        const I* order = static_cast<const I*>(problem_.order.data) + offset_of(lists_, list, problem_.order);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t item = static_cast<int64_t>(order[i * problem_.order.inner_stride]);
          if (item < 0 || item >= list.places || scratch_.seen[item]) {
            good = false;
            break;
          }
          scratch_.seen[item] = 1;
          index[i] = item;
        }
      }
    });
    return good ? count : -1;
  }

  void clear(const List& list) {
    S* const to = static_cast<S*>(out_->scores) + contiguous_offset(lists_, list);
    for (int64_t i = 0; i < list.places; ++i) to[i] = S{};
  }

  T factor(const List& list) const {
    return lists::per_list<T>(out_->grad_output, list.index) * T(out_->scale) *
           lists::per_list<T>(lists_.weight, list.index);
  }

  void flush() {
    if (waiting_ == 0) return;
    tile_.columns = 0;
    tile_.all_observed = kShort;
    V factors{};
    for (int j = 0; j < lanes; ++j) {
      if (j >= waiting_) bundle_[j] = Lane{};
      const Lane& lane = bundle_[j];
      if (lane.count > tile_.columns) tile_.columns = lane.count;
      if (lane.observed < tile_.all_observed) tile_.all_observed = lane.observed;
      tile_.observed[j] = lane.observed;
      if (out_ && j < waiting_) factors[j] = factor(lane.list);
    }
    load(bundle_);
    tile_.first = tile_.score[0];
    if (out_) {
      short_backward<weighted>(tile_, factors);
      store(bundle_);
    } else {
      const V loss = short_forward<weighted>(tile_);
      for (int j = 0; j < waiting_; ++j) add_loss(bundle_[j].list, loss[j]);
    }
    waiting_ = 0;
  }

  // One long list, chunk by chunk.
  void one_list(const Lane& whole) {
    const int64_t pieces = chunks(whole.count), at = saved_at(lists_, whole.list.index);
    Suffix<T> carry{kLowest<T>, 0};
    if (out_) {
      double carried = 0;
      const T scale = factor(whole.list);
      for (int64_t c = 0; c < pieces; ++c) {
        const bool last = c == pieces - 1;
        const T* const saved = static_cast<const T*>(out_->saved) + 2 * (at + c);
        cut(whole, c);
        long_backward<weighted>(tile_, last ? carry : Suffix<T>{saved[0], saved[1]}, carried, scale);
        store(runs_);
      }
    } else {
      double loss = 0;
      for (int64_t c = pieces - 1; c >= 0; --c) {
        if (saved_ && c < pieces - 1) {
          saved_[2 * (at + c)] = carry.max;
          saved_[2 * (at + c) + 1] = carry.sum;
        }
        cut(whole, c);
        loss += long_forward<weighted>(tile_, carry);
      }
      add_loss(whole.list, carry.sum == carry.sum ? loss : carry.sum);
    }
  }

  // Chunk c of a long list, cut into runs.
  void cut(const Lane& whole, int64_t c) {
    const int64_t start = c * kChunk, count = whole.count - start < kChunk ? whole.count - start : kChunk;
    tile_.columns = (count + lanes - 1) / lanes;
    tile_.all_observed = tile_.columns;
    for (int j = 0; j < lanes; ++j) {
      Lane& lane = runs_[j];
      lane = whole;
      lane.start = start + j * tile_.columns;
      lane.count = clamp(count - j * tile_.columns, 0, tile_.columns);
      lane.observed = clamp(whole.observed - lane.start, 0, lane.count);
      tile_.observed[j] = lane.observed;
      if (lane.observed < tile_.all_observed) tile_.all_observed = lane.observed;
    }
    load(runs_);
    const int64_t first = whole.index ? whole.index[0] : 0;
    tile_.first = broadcast(widen<T>(scores_of(whole.list) + first * lists_.scores.inner_stride));
  }

  const S* scores_of(const List& list) const {
    return static_cast<const S*>(lists_.scores.data) + offset_of(lists_, list, lists_.scores);
  }

  // The lanes' scores and weights as columns.
  void load(const Lane (&lane)[lanes]) {
    const int64_t stride = lists_.scores.inner_stride;
    const T fill = -__builtin_inf();
    if (!moved_ && stride == 1) {
      Row<const S> rows[lanes];
      for (int j = 0; j < lanes; ++j) {
        if (lane[j].count > 0) rows[j] = {scores_of(lane[j].list) + lane[j].start, lane[j].count};
      }
      load_tile<T>(rows, tile_.columns, fill, tile_.score);
    } else {
      gather(lane, fill, tile_.score, [&](const Lane& from, T* row) {
        const S* const scores = scores_of(from.list);
        for (int64_t i = from.start; i < from.start + from.count; ++i) {
          *row++ = widen<T>(scores + (from.index ? from.index[i] : i) * stride);
        }
      });
    }
    if constexpr (weighted) {
      load_weights(lane, problem_.position_weight, tile_.u);
      if (tile_.v) load_weights(lane, problem_.item_weight, tile_.v);
    }
  }

  void load_weights(const Lane (&lane)[lanes], const Operand& weight, V* column) {
    gather(lane, T(0), column, [&](const Lane& of, T* row) {
      if (weight.data == nullptr) {
        for (int64_t i = 0; i < of.observed; ++i) row[i] = static_cast<T>(weight.value);
      }
      with_storage(weight.dtype, [&](auto storage) {
        if (weight.data == nullptr) return;
        const auto* from = static_cast<const decltype(storage)*>(weight.data) + offset_of(lists_, of.list, weight);
        for (int64_t i = 0; i < of.observed; ++i) row[i] = widen<T>(from + (of.start + i) * weight.inner_stride);
      });
      for (int64_t i = of.observed; i < of.count; ++i) row[i] = 0;
    });
  }

  template <class F>
  void gather(const Lane (&lane)[lanes], T fill, V* column, F&& fill_row) {
    Row<const T> rows[lanes];
    for (int j = 0; j < lanes; ++j) {
      T* const row = scratch_.rows + j * Scratch<T>::kColumns;
      if (lane[j].count > 0) fill_row(lane[j], row);
      rows[j] = {row, lane[j].count};
    }
    load_tile<T>(rows, tile_.columns, fill, column);
  }

  // The gradient's columns to where the items stand.
  void store(const Lane (&lane)[lanes]) {
    S* const to = static_cast<S*>(out_->scores);
    if (!moved_) {
      Row<S> rows[lanes];
      for (int j = 0; j < lanes; ++j) {
        if (lane[j].count > 0) rows[j] = {to + contiguous_offset(lists_, lane[j].list) + lane[j].start, lane[j].count};
      }
      return store_tile<T>(tile_.score, tile_.columns, rows);
    }
    Row<S> rows[lanes];
    for (int j = 0; j < lanes; ++j) {
      rows[j] = {reinterpret_cast<S*>(scratch_.rows + j * Scratch<T>::kColumns), lane[j].count};
    }
    store_tile<T>(tile_.score, tile_.columns, rows);
    for (int j = 0; j < lanes; ++j) {
      if (lane[j].count == 0) continue;
      S* const of_list = to + contiguous_offset(lists_, lane[j].list);
      for (int64_t i = 0; i < lane[j].count; ++i) of_list[lane[j].index[lane[j].start + i]] = rows[j].items[i];
    }
  }

  void add_loss(const List& list, double loss) {
    loss *= lists::per_list<T>(lists_.weight, list.index);
    totals_.loss += loss;
    if (loss_) loss_[list.index] = static_cast<T>(loss);
  }

  const Problem& problem_;
  const lists::Lists& lists_;
  const Gradients* const out_;
  const Scratch<T> scratch_;
  T* const loss_;
  T* const saved_;
  Totals& totals_;
  const bool moved_;
  Tile<T> tile_{};
  Lane bundle_[lanes];  // short lists that wait for company
  Lane runs_[lanes];    // of a long list
  int waiting_ = 0;
};

// Calls f(accumulation type, storage type, whether there are weights) for the problem.
template <class F>
void with_kinds(const Problem& problem, F&& f) {
  lists::with_scores(problem.lists.dtype, [&](auto acc, auto storage) {
    if (problem.position_weight.data || problem.item_weight.data) {
      f(acc, storage, std::true_type{});
    } else {
      f(acc, storage, std::false_type{});
    }
  });
}

int64_t scratch_bytes(const Problem& problem) {
  const int64_t longest = problem.lists.longest;
  return problem.lists.dtype == DType::kFloat64 ? Scratch<double>::bytes(longest) : Scratch<float>::bytes(longest);
}

void forward(const Problem& problem, int64_t begin, int64_t end, void* scratch, void* loss, void* saved,
             Totals& totals) {
  with_kinds(problem, [&](auto acc, auto storage, auto weighted) {
    using T = decltype(acc);
    Range<T, decltype(storage), weighted> range(problem, nullptr, scratch, static_cast<T*>(loss),
                                                static_cast<T*>(saved), totals);
    range.run(begin, end);
  });
}

void backward(const Problem& problem, const Gradients& out, int64_t begin, int64_t end, void* scratch, Totals& totals) {
  with_kinds(problem, [&](auto acc, auto storage, auto weighted) {
    using T = decltype(acc);
    Range<T, decltype(storage), weighted> range(problem, &out, scratch, nullptr, nullptr, totals);
    range.run(begin, end);
  });
}

}  // namespace plackett_luce

const PlackettLuceCpu plackett_luce_kernels = {&plackett_luce::scratch_bytes, &plackett_luce::forward,
                                               &plackett_luce::backward};

}  // namespace rewardfuse::REWARDFUSE_TARGET
