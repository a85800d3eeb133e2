// Splitting work over torch's own threads, with sums that do not depend on how many there are.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace rewardfuse {

constexpr int64_t kMostRanges = 1024;

// f(bound(i), bound(i + 1), totals) for each range; returns the ranges' totals added in order. The bounds must not
// depend on the number of threads.
template <class Totals, class Bound, class F>
Totals sum_over_bounds(int64_t ranges, const Bound& bound, const F& f) {
  Totals total;
  if (ranges <= 1) {
    f(bound(0), bound(1), total);
    return total;
  }
  std::vector<Totals> partial(ranges);
  at::parallel_for(0, ranges, 2, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(bound(i), bound(i + 1), partial[i]);
  });
  for (const Totals& part : partial) total.add(part);
  return total;
}

// Ranges of items, all of one size. One range (no thread, no allocation) holds what a thread could not shorten by its
// own start-up time.
template <class Totals, class F>
Totals sum_over_ranges(int64_t items, const F& f) {
  constexpr int64_t kSmallest = 8192;
  const int64_t length = std::max(kSmallest, (items + kMostRanges - 1) / kMostRanges);
  const auto bound = [&](int64_t i) { return std::min(items, i * length); };
  return sum_over_bounds<Totals>((items + length - 1) / length, bound, f);
}

}  // namespace rewardfuse
