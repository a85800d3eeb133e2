// Scans and sums over the threads that take a list together: some lanes of a warp, or a block.
//
// A scan gives each thread the join of what the threads before it hold (`none` where there is no such thread) and, as
// `total`, that of all; with from_last the last thread is the first. Every order of joining is fixed, so that the same
// input gives the same bits, and every thread the same total. All threads of the warps (of the block) must come along.
#pragma once

#include <cuda_runtime.h>
#include <string.h>

#include <type_traits>

#include "common/reduce.cuh"

namespace rewardfuse::cuda {

// x of the given lane among `width` neighbours.
template <class X>
__device__ __forceinline__ X shuffle(X x, int lane, int width) {
  static_assert(std::is_trivially_copyable_v<X> && sizeof(X) % sizeof(unsigned) == 0);
  constexpr int kWords = sizeof(X) / sizeof(unsigned);
  unsigned words[kWords];
  memcpy(words, &x, sizeof(X));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_sync(0xffffffffu, words[i], lane, width);
  memcpy(&x, words, sizeof(X));
  return x;
}

// `width` lanes of a warp, a power of two; the warp's other teams run the same instructions.
struct LaneTeam {
  static constexpr bool kIsBlock = false;
  int width, rank;

  __device__ __forceinline__ explicit LaneTeam(int width) : width(width), rank(threadIdx.x & (width - 1)) {}

  template <bool from_last, class X, class Join>
  __device__ __forceinline__ X scan(X x, X none, Join join, X& total) const {
    const int towards = from_last ? 1 : -1, before = from_last ? width - 1 - rank : rank;
    for (int distance = 1; distance < width; distance *= 2) {
      const X other = shuffle(x, (rank + towards * distance) & (width - 1), width);
      if (distance <= before) x = join(other, x);
    }
    total = shuffle(x, from_last ? 0 : width - 1, width);
    const X previous = shuffle(x, (rank + towards) & (width - 1), width);
    return before == 0 ? none : previous;
  }

  // The join of all, where join(x, y) is join(y, x).
  template <class X, class Join>
  __device__ __forceinline__ X reduce(X x, Join join) const {
    for (int distance = width / 2; distance > 0; distance /= 2) x = join(x, shuffle(x, rank ^ distance, width));
    return x;
  }

  template <class X>
  __device__ __forceinline__ X sum(X x) const {
    return reduce(x, [](X a, X b) { return a + b; });
  }

  __device__ __forceinline__ void wait() const { __syncwarp(); }
};

struct BlockTeam {
  static constexpr bool kIsBlock = true;
  static constexpr int width = kThreads;
  int rank = threadIdx.x;

  template <bool from_last, class X, class Join>
  __device__ __forceinline__ X scan(X x, X none, Join join, X& total) const {
    X in_warp;
    const X inside = LaneTeam(32).scan<from_last>(x, none, join, in_warp);
    const LaneTeam warps(kWarps);
    const X outside = warps.scan<from_last>(exchange(in_warp)[warps.rank], none, join, total);
    return join(shuffle(outside, rank / 32, 32), inside);
  }

  template <class X, class Join>
  __device__ __forceinline__ X reduce(X x, Join join) const {
    const LaneTeam warps(kWarps);
    return warps.reduce(exchange(LaneTeam(32).reduce(x, join))[warps.rank], join);
  }

  template <class X>
  __device__ __forceinline__ X sum(X x) const {
    return reduce(x, [](X a, X b) { return a + b; });
  }

  __device__ __forceinline__ void wait() const { __syncthreads(); }

 private:
  static constexpr int kWarps = kThreads / 32;

  // One value of each warp, to all.
  template <class X>
  __device__ __forceinline__ const X* exchange(X x) const {
    __shared__ X of_warp[kWarps];
    __syncthreads();  // an earlier call's reads of of_warp are over
    if (rank % 32 == 0) of_warp[rank / 32] = x;
    __syncthreads();
    return of_warp;
  }
};

}  // namespace rewardfuse::cuda
