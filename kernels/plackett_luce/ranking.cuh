// A list as the Plackett–Luce kernels on CUDA devices see it.
#pragma once

#include "lists/cuda.cuh"
#include "plackett_luce/args.h"

namespace rewardfuse::cuda::plackett_luce {

using lists::List;
using rewardfuse::plackett_luce::Problem;

// What a permutation of the items sums to. A list of indices that is none sums to something else but for one case in
// 2^64 (SplitMix64's bijection).
__device__ __forceinline__ unsigned long long name_of(int64_t item) {
  unsigned long long x = static_cast<unsigned long long>(item) + 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A list and what it counts.
template <class T>
struct Ranking : List {
  int64_t slots = 0;   // to scan; 0 where nobody reads the list
  int64_t stages = 0;  // positions that were observed
  T weight = 0;
};

template <class T>
__device__ __forceinline__ Ranking<T> ranking_at(const Problem& problem, int64_t r) {
  Ranking<T> ranking;
  static_cast<List&>(ranking) = lists::list_at(problem.lists, r);
  int64_t stages = ranking.length;
  if (problem.top_k) {
    stages = problem.top_k[r];
    ranking.bad |= stages < 1;
  } else if (problem.top_k_value > 0) {
    stages = problem.top_k_value;
  }
  ranking.stages = stages < ranking.length ? stages : ranking.length;
  ranking.weight = lists::per_list<T>(problem.lists.weight, ranking);
  if (ranking.weight == T(0) || ranking.bad || ranking.length == 0) return ranking;
  ranking.slots = problem.lists.mask.data && !problem.order.data ? ranking.places : ranking.length;
  return ranking;
}

}  // namespace rewardfuse::cuda::plackett_luce
