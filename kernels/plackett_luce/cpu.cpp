// Plackett–Luce on the CPU.
//
// Decomposition: the caller splits the lists into ranges. Lists of at most kShort items are taken `lanes` at a time, a
// list a lane; longer ones in chunks of kChunk positions, each cut into `lanes` runs. What a list gives does not depend
// on its neighbours, so the bits of a result do not depend on the number of threads.
// Traffic, float32: forward reads 4 bytes a score; backward reads 4 and writes 4. An order adds its own 8, a mask 1.
// Everything else stays in the first-level cache: a tile and its companions take about 20 KiB.
// Precision: float32 for 16-bit and float32 scores, float64 for float64; a list's loss leaves the lanes as float64. No
// sum runs over more than kShort terms before it meets a shorter one, so errors do not grow with the list's length.
#include "plackett_luce/lanes.h"

namespace rewardfuse::REWARDFUSE_TARGET {
namespace plackett_luce {

using lists::is_there;
using lists::list_at;
using lists::Totals;
using rewardfuse::plackett_luce::chunks;
using rewardfuse::plackett_luce::saved_at;

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
        moved_(lists_.mask.data || problem.order.data),
        mover_(problem, gradients, scratch_, tile_) {
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
    if (alike()) {
      for (int64_t r = begin; r < end; r += lanes) alike_lists(r, end - r < lanes ? end - r : lanes);
      return;
    }
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
  // Short lists of which only the scores differ. Looking at each of them would cost as much as a third of its stages.
  bool alike() const {
    return !weighted && !moved_ && !lists_.cu_seqlens && !lists_.lengths && !problem_.top_k && lists_.size > 0 &&
           lists_.size <= kShort && lists_.scores.inner_stride == 1 && !lists_.weight.data && lists_.weight.value != 0;
  }

  void alike_lists(int64_t r, int64_t count) {
    const int64_t top_k = problem_.top_k_value;
    tile_.columns = lists_.size;
    tile_.all_observed = top_k > 0 && top_k < lists_.size ? top_k : lists_.size;
    tile_.observed = typename Lanes<T>::Mask{} + static_cast<typename Lanes<T>::Int>(tile_.all_observed);
    Row<const S> rows[lanes];
    for (int j = 0; j < count; ++j) rows[j] = {mover_.scores_of({r + j}), lists_.size};
    load_tile<T>(rows, tile_.columns, T(-__builtin_inf()), tile_.score);
    if (out_ == nullptr) {
      const V loss = short_forward<weighted>(tile_) * T(lists_.weight.value);
      if (loss_) store_as(loss_ + r, loss, count);
      for (int j = 0; j < count; ++j) totals_.loss += loss[j];
      totals_.valid += count;
      return;
    }
    V factors = broadcast(factor({r}));
    for (int j = 1; out_->grad_output.outer_stride != 0 && j < count; ++j) factors[j] = factor({r + j});
    short_backward<weighted>(tile_, factors);
    Row<S> to[lanes];
    for (int j = 0; j < count; ++j) to[j] = {static_cast<S*>(out_->scores) + (r + j) * lists_.size, lists_.size};
    store_tile<T>(tile_.score, tile_.columns, to);
  }

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
    mover_.load(bundle_);
    tile_.first = tile_.score[0];
    if (out_) {
      short_backward<weighted>(tile_, factors);
      mover_.store(bundle_);
    } else {
      const V loss = short_forward<weighted>(tile_);
      for (int j = 0; j < waiting_; ++j) add_loss(bundle_[j].list, loss[j]);
    }
    waiting_ = 0;
  }

  // One long list, chunk by chunk.
  void one_list(const Lane& whole) {
    const int64_t pieces = chunks(whole.count), at = saved_at(lists_, whole.list.index);
    Carry<T> carry;
    if (out_) {
      double carried = 0;
      const T scale = factor(whole.list);
      for (int64_t c = 0; c < pieces; ++c) {
        const bool last = c == pieces - 1;
        const T* const saved = static_cast<const T*>(out_->saved) + 2 * (at + c);
        cut(whole, c);
        long_backward<weighted>(tile_, last ? carry : Carry<T>{saved[0], saved[1]}, carried, scale);
        mover_.store(runs_);
      }
    } else {
      double loss = 0;
      for (int64_t c = pieces - 1; c >= 0; --c) {
        if (saved_ && c < pieces - 1) {
          saved_[2 * (at + c)] = carry.max;
          saved_[2 * (at + c) + 1] = static_cast<T>(carry.sum);
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
    mover_.load(runs_);
    const int64_t first = whole.index ? whole.index[0] : 0;
    tile_.first = broadcast(widen<T>(mover_.scores_of(whole.list) + first * lists_.scores.inner_stride));
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
  Mover<T, S, weighted> mover_;
  Lane bundle_[lanes];  // short lists that wait for company
  Lane runs_[lanes];    // of a long list
  int waiting_ = 0;
};

// Calls f(accumulation type, storage type, whether there are weights) for the problem.
template <class F>
void with_kinds(const Problem& problem, F&& f) {
  with_rewards(problem.lists.dtype, [&](auto acc, auto storage) {
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
