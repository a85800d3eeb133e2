// How many threads take a list together on a CUDA device: some lanes of a warp each of many short lists, or a block
// each long one. Torch-free; read by the launch, which sizes the grid, and by the kernels.
#pragma once

#include "lists/args.h"

namespace rewardfuse::lists {

constexpr int64_t kBlockThreads = 256;
constexpr int64_t kCudaSums = 2;        // loss and count of lists, over the grid
constexpr int64_t kSlotsPerThread = 4;  // neighbours that a thread of a plackett_luce kernel takes

struct Teams {
  int width;              // lanes a list, a power of two up to 32; 0: a block a list
  int64_t lists_a_block;  // under way at once

  int64_t blocks(int64_t lists) const { return (lists + lists_a_block - 1) / lists_a_block; }
};

// Teams of the fewest lanes that are so many; a block where a warp has not so many.
inline Teams teams_of(int64_t lanes) {
  if (lanes > 32) return {0, 1};
  int width = 1;
  while (width < lanes) width *= 2;
  return {width, kBlockThreads / width};
}

// Packed lists differ in length: their teams hold twice the mean, and the block takes a longer list together.
inline Teams plackett_luce_teams(const Lists& lists) {
  int64_t slots = lists.size;
  if (lists.cu_seqlens) slots = lists.count > 0 ? 2 * (lists.size / lists.count + 1) : 0;
  return teams_of((slots + kSlotsPerThread - 1) / kSlotsPerThread);
}

// Two items a thread before a list gets a block of its own.
inline Teams all_pairs_teams(const Lists& lists) {
  return lists.size > 64 ? Teams{0, 1} : teams_of(lists.size < 32 ? lists.size : 32);
}

}  // namespace rewardfuse::lists
