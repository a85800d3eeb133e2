// What the Plackett–Luce kernels are told.
#pragma once

#include "common/instruction_set.h"
#include "lists/args.h"

namespace rewardfuse::plackett_luce {

// Longer lists are taken in pieces of so many positions, from the last to the first in forward, from the first to the
// last in backward.
constexpr int64_t kChunk = 1024;

// NLL of a list: Σ over positions i < top_k of u_i·L_i − v_i·s_i, with s the scores in the order of the ranking and
// L_i = log Σ_{j ≥ i} e^{s_j}. u and v stand by position: at r·outer + i·inner, or packed at (cu_seqlens[r] + i)·inner.
struct Problem {
  lists::Lists lists;
  Operand order;                   // integers [count, size] or [size], indices within the list; no data: as they stand
  const int64_t* top_k = nullptr;  // [count]; null: top_k_value for all, where 0 means every position
  int64_t top_k_value = 0;
  Operand position_weight;  // u; no data: 1
  Operand item_weight;      // v; no data: u
};

// log Σ e^s of the positions from some place on: max + log(sum). Forward saves one for the end of each chunk but the
// last, as two numbers of the accumulation type; the one at the end of chunk c of list r (which is log Σ from position
// (c + 1)·kChunk on) stands at saved_at(lists, r) + c.
RF_HD int64_t chunks(int64_t items) { return (items + kChunk - 1) / kChunk; }

RF_HD int64_t saved_at(const lists::Lists& lists, int64_t r) {
  return lists.cu_seqlens ? lists.cu_seqlens[r] / kChunk + r : r * chunks(lists.size);
}

}  // namespace rewardfuse::plackett_luce

namespace rewardfuse {

using PlackettLuceCpu = lists::CpuKernels<plackett_luce::Problem>;
using PlackettLuceCuda = lists::CudaKernels<plackett_luce::Problem>;

RF_CPU_VARIANTS(PlackettLuceCpu, plackett_luce_kernels)

namespace cuda {
extern const PlackettLuceCuda plackett_luce_kernels;
}

}  // namespace rewardfuse
