// How a CPU kernel finds a list's items.
#pragma once

#include "common/storage.h"
#include "lists/args.h"

namespace rewardfuse::REWARDFUSE_TARGET::lists {

using rewardfuse::lists::Gradients;
using rewardfuse::lists::Lists;
using rewardfuse::lists::Totals;

// One list: where its items begin, how many places it has, and how many of the first are there.
struct List {
  int64_t index = 0;
  int64_t begin = 0;  // packed: of the first item, in items
  int64_t places = 0;
  int64_t length = 0;  // places before the list's length; the mask is looked at apart
};

RF_HD List list_at(const Lists& lists, int64_t r) {
  if (lists.cu_seqlens) {
    const int64_t begin = lists.cu_seqlens[r], count = lists.cu_seqlens[r + 1] - begin;
    return {r, begin, count, count};
  }
  return {r, 0, lists.size, lists.lengths ? lists.lengths[r] : lists.size};
}

// Where the list's part of an operand [count, size] (packed: [size]) begins.
RF_HD int64_t offset_of(const Lists& lists, const List& list, const Operand& operand) {
  return lists.cu_seqlens ? list.begin * operand.inner_stride : list.index * operand.outer_stride;
}

// Where the list's part of a contiguous tensor in the shape of the scores begins.
RF_HD int64_t contiguous_offset(const Lists& lists, const List& list) {
  return lists.cu_seqlens ? list.begin : list.index * lists.size;
}

// A number that comes once a list.
template <class T>
RF_HD T per_list(const Operand& operand, int64_t r) {
  if (operand.data == nullptr) return static_cast<T>(operand.value);
  return load<typename Lanes<T>::Reg>(operand, r, 0, 1)[0];
}

RF_HD bool is_there(const Operand& mask, int64_t offset, int64_t i) {
  return static_cast<const uint8_t*>(mask.data)[offset + i * mask.inner_stride] != 0;
}

// One value widened, or narrowed.
template <class T, class S>
RF_HD T widen(const S* p) {
  if constexpr (std::is_same_v<S, T>) return *p;
  return load_as<typename Lanes<T>::Reg>(p, 1, 1)[0];
}

}  // namespace rewardfuse::REWARDFUSE_TARGET::lists
