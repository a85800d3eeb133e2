// How lists come into the lanes of a tile and their gradients back to memory.
#pragma once

#include "lists/cpu.h"
#include "lists/tile.h"
#include "plackett_luce/args.h"
#include "plackett_luce/stages.h"

namespace rewardfuse::REWARDFUSE_TARGET::plackett_luce {

using lists::Gradients;
using lists::List;
using lists::widen;
using rewardfuse::plackett_luce::kChunk;
using rewardfuse::plackett_luce::Problem;

// Lists of at most so many items share a tile.
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

// Reads scores and weights into a tile; writes gradients from it.
template <class T, class S, bool weighted>
class Mover {
  using V = typename Lanes<T>::Reg;
  static constexpr int lanes = Lanes<T>::count;

 public:
  Mover(const Problem& problem, const Gradients* out, const Scratch<T>& scratch, Tile<T>& tile)
      : problem_(problem), lists_(problem.lists), out_(out), scratch_(scratch), tile_(tile) {}

  const S* scores_of(const List& list) const {
    return static_cast<const S*>(lists_.scores.data) + offset_of(lists_, list, lists_.scores);
  }

  // The lanes' scores and weights as columns.
  void load(const Lane (&lane)[lanes]) {
    const int64_t stride = lists_.scores.inner_stride;
    const T fill = -__builtin_inf();
    if (!moved() && stride == 1) {
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

  // The gradient's columns to where the items stand.
  void store(const Lane (&lane)[lanes]) {
    S* const to = static_cast<S*>(out_->scores);
    if (!moved()) {
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

 private:
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

  bool moved() const { return lists_.mask.data || problem_.order.data; }

  const Problem& problem_;
  const lists::Lists& lists_;
  const Gradients* const out_;
  const Scratch<T>& scratch_;
  Tile<T>& tile_;
};

}  // namespace rewardfuse::REWARDFUSE_TARGET::plackett_luce
