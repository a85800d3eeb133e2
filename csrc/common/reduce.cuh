// Sums over a grid in one launch, in a fixed order: no floating-point atomics, no second kernel, no memset.
//
// Every block but the last writes its partial sums, then its flag; the last block waits for the flags and adds the
// partials in block order. A flag is "up" when it holds this launch's nonce, a 64-bit number of the caller's that no
// other launch has, so the scratch needs no initialization; it is lowered after reading, so a replayed CUDA graph,
// whose nonce is the captured one, waits again. Waiting cannot starve: one block waits, and none waits for it.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace rewardfuse::cuda {

constexpr int kThreads = 256;

// Memory of one launch, shared with no other.
struct GridScratch {
  double* partials = nullptr;           // [blocks, kSums]
  unsigned long long* flags = nullptr;  // [blocks]
  unsigned long long nonce = 0;
};

// Thread 0 leaves with the sums over the block; a barrier for all threads.
template <int kSums>
__device__ __forceinline__ void block_sum(double (&sums)[kSums]) {
  __shared__ double of_warp[kSums][kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sums[k] += __shfl_down_sync(0xffffffffu, sums[k], offset);
  }
  __syncthreads();  // an earlier call's reads of of_warp are over
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) of_warp[k][warp] = sums[k];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      for (int w = 1; w < kThreads / 32; ++w) sums[k] += of_warp[k][w];
    }
  }
}

// True in the one thread that leaves with the sums over the grid.
template <int kSums>
__device__ __forceinline__ bool grid_sum(double (&sums)[kSums], const GridScratch& scratch) {
  block_sum(sums);
  if (gridDim.x == 1) return threadIdx.x == 0;
  const unsigned last = gridDim.x - 1;
  if (blockIdx.x != last) {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) __stcg(&scratch.partials[blockIdx.x * kSums + k], sums[k]);
      __threadfence();  // partials before flag
      atomicExch(&scratch.flags[blockIdx.x], scratch.nonce);
    }
    return false;
  }
  double others[kSums] = {};
  for (unsigned block = threadIdx.x; block < last; block += kThreads) {
    while (atomicAdd(&scratch.flags[block], 0ull) != scratch.nonce) __nanosleep(64);
    __threadfence();  // flag before partials
#pragma unroll
    for (int k = 0; k < kSums; ++k) others[k] += __ldcg(&scratch.partials[block * kSums + k]);
    atomicExch(&scratch.flags[block], 0ull);
  }
  block_sum(others);
#pragma unroll
  for (int k = 0; k < kSums; ++k) sums[k] += others[k];
  return threadIdx.x == 0;
}

}  // namespace rewardfuse::cuda
