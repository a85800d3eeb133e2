// Rows of memory as columns of registers: column c of a tile holds the c-th item of `lanes` rows, one a lane.
//
// Rows are read and written whole and turned in registers: gathering a column item by item costs two to three times
// the arithmetic that follows (docs/decisions.md).
#pragma once

#include <utility>

#include "common/storage.h"

namespace rewardfuse::REWARDFUSE_TARGET {

// One step of a transposition: exchanges the off-diagonal blocks of width h.
template <class T, int h, int... lane>
RF_HD void exchange_blocks(typename Lanes<T>::Reg& a, typename Lanes<T>::Reg& b, std::integer_sequence<int, lane...>) {
  constexpr int n = Lanes<T>::count;
  const auto x = a, y = b;
#ifdef __clang__
  a = __builtin_shufflevector(x, y, ((lane & h) == 0 ? lane : n + lane - h)...);
  b = __builtin_shufflevector(x, y, ((lane & h) == 0 ? lane + h : n + lane)...);
#else
  using Mask = typename Lanes<T>::Mask;
  a = __builtin_shuffle(x, y, Mask{((lane & h) == 0 ? lane : n + lane - h)...});
  b = __builtin_shuffle(x, y, Mask{((lane & h) == 0 ? lane + h : n + lane)...});
#endif
}

template <class T, int h = Lanes<T>::count / 2>
RF_HD void transpose(typename Lanes<T>::Reg* x) {
  constexpr int n = Lanes<T>::count;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if ((i & h) == 0) exchange_blocks<T, h>(x[i], x[i + h], std::make_integer_sequence<int, n>{});
  }
  if constexpr (h > 1) transpose<T, h / 2>(x);
}

// A row: `count` items in memory, one after another.
template <class S>
struct Row {
  S* items = nullptr;
  int64_t count = 0;
};

RF_HD int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Fills columns [0, columns), and up to the next multiple of `lanes`; `fill` where a row has ended.
template <class T, class S>
void load_tile(const Row<const S>* rows, int64_t columns, T fill, typename Lanes<T>::Reg* tile) {
  using V = typename Lanes<T>::Reg;
  constexpr int n = Lanes<T>::count;
  for (int64_t column = 0; column < columns; column += n) {
    V x[n];
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) {
      const int64_t count = clamp(rows[j].count - column, 0, n);
      if (count == n) {
        x[j] = load_as<V>(rows[j].items + column, 1, std::integral_constant<int64_t, n>{});
      } else {
        x[j] = first_lanes<T>(count) ? load_as<V>(rows[j].items + column, 1, count) : broadcast(fill);
      }
    }
    transpose<T>(x);
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) tile[column + j] = x[j];
  }
}

template <class T, class S>
void store_tile(const typename Lanes<T>::Reg* tile, int64_t columns, const Row<S>* rows) {
  using V = typename Lanes<T>::Reg;
  constexpr int n = Lanes<T>::count;
  for (int64_t column = 0; column < columns; column += n) {
    V x[n];
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) x[j] = tile[column + j];
    transpose<T>(x);
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) {
      const int64_t count = clamp(rows[j].count - column, 0, n);
      if (count == n) {
        store_as(rows[j].items + column, x[j], std::integral_constant<int64_t, n>{});
      } else {
        store_as(rows[j].items + column, x[j], count);
      }
    }
  }
}

}  // namespace rewardfuse::REWARDFUSE_TARGET
