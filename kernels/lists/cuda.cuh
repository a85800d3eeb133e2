// What the kernels on lists share on CUDA devices: where a list stands, sums over lists, and the gradient of a list
// that nobody computes.
#pragma once

#include "common/reduce.cuh"
#include "common/scan.cuh"
#include "common/storage.cuh"
#include "lists/args.h"
#include "lists/teams.h"

namespace rewardfuse::cuda::lists {

using rewardfuse::lists::CudaForward;
using rewardfuse::lists::Gradients;
using rewardfuse::lists::kCudaSums;
using rewardfuse::lists::Lists;
using rewardfuse::lists::Teams;

static_assert(kThreads == rewardfuse::lists::kBlockThreads);

// One list. Whatever the device holds, [begin, begin + places) stays inside of the row and length within places.
struct List {
  int64_t index = 0;
  int64_t row = 0, begin = 0;  // its first item in operands; packed lists stand in one row
  int64_t to = 0;              // its first item in a contiguous tensor
  int64_t places = 0;
  int64_t length = 0;  // items that are there: the first ones, or the mask says which
  bool bad = false;    // a length or bounds that cannot be
};

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

__device__ __forceinline__ List list_at(const Lists& lists, int64_t r) {
  List list;
  list.index = r;
  if (lists.cu_seqlens) {
    const int64_t begin = lists.cu_seqlens[r], end = lists.cu_seqlens[r + 1];
    list.bad = begin < 0 || end < begin || end > lists.size;
    list.begin = list.to = clamp(begin, 0, lists.size);
    list.places = list.length = clamp(end, list.begin, lists.size) - list.begin;
  } else {
    const int64_t length = lists.lengths ? lists.lengths[r] : lists.size;
    list.bad = length < 0 || length > lists.size;
    list.row = r;
    list.to = r * lists.size;
    list.places = lists.size;
    list.length = clamp(length, 0, lists.size);
  }
  return list;
}

// Whether the item is there.
__device__ __forceinline__ bool is_there(const Lists& lists, const List& list, int64_t i) {
  if (lists.mask.data == nullptr) return i < list.length;
  const int64_t at = list.row * lists.mask.outer_stride + (list.begin + i) * lists.mask.inner_stride;
  return static_cast<const uint8_t*>(lists.mask.data)[at] != 0;
}

template <class S>
__device__ __forceinline__ const S* scores_of(const Lists& lists, const List& list) {
  return static_cast<const S*>(lists.scores.data) + list.row * lists.scores.outer_stride +
         list.begin * lists.scores.inner_stride;
}

// A number that comes once a list.
template <class T>
__device__ __forceinline__ T per_list(const Operand& operand, const List& list) {
  return load<T>(operand, list.index, 0);
}

// The gradient of a list that nobody counts, 0, or of one whose loss is NaN.
template <class S, class Team>
__device__ __forceinline__ void fill_gradient(const Team& team, const Lists& lists, const List& list, bool is_nan,
                                              S* gradient) {
  for (int64_t i = team.rank; i < list.places; i += team.width) {
    gradient[list.to + i] = narrow<S>(is_nan && is_there(lists, list, i) ? nanf("") : 0.0f);
  }
}

// Zeros where bounds that do not run from 0 to the number of scores leave items to no list.
template <class S>
__device__ __forceinline__ void clear_outside(const Lists& lists, S* gradient) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t begin = clamp(lists.cu_seqlens[0], 0, lists.size);
  const int64_t end = clamp(lists.cu_seqlens[lists.count], 0, lists.size);
  for (int64_t i = first; i < begin; i += step) gradient[i] = narrow<S>(0.0f);
  for (int64_t i = end + first; i < lists.size; i += step) gradient[i] = narrow<S>(0.0f);
}

__device__ __forceinline__ bool has_normalizer(const Operand& normalizer) {
  return normalizer.data != nullptr || normalizer.value != 0;
}

// NaN where the device's number is not positive.
__device__ __forceinline__ double divisor(const Operand& normalizer, double count) {
  if (!has_normalizer(normalizer)) return count > 1 ? count : 1;
  const double value = load<double>(normalizer, 0, 0);
  return value > 0 ? value : nan("");
}

// d(loss)/d(list loss) for a grad_output of 1.
__device__ __forceinline__ double scale_of(const Gradients& out) {
  if (!has_normalizer(out.normalizer) && out.denominator == nullptr) return out.scale;
  return out.scale / divisor(out.normalizer, out.denominator ? *out.denominator : 1);
}

// Sums of a thread over its lists: loss, lists that a mean counts.
struct Sums {
  double sums[kCudaSums] = {};

  __device__ __forceinline__ void add(double loss, bool counts) {
    sums[0] += loss;
    sums[1] += counts;
  }

  template <class T>
  __device__ __forceinline__ void finish(const CudaForward& out, const GridScratch& scratch) {
    if (out.reduction == Reduction::kNone || !grid_sum(sums, scratch)) return;
    if (out.reduction == Reduction::kMean) sums[0] /= divisor(out.normalizer, sums[1]);
    *static_cast<T*>(out.loss) = static_cast<T>(sums[0]);
    if (out.denominator) *out.denominator = sums[1];
  }
};

}  // namespace rewardfuse::cuda::lists
