// Splitting items over torch's own threads, with sums that do not depend on how many there are.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace rewardfuse {

// f(begin, end, totals) for ranges whose bounds follow from `items` alone; returns the ranges' totals added in order.
// One range (no thread, no allocation) holds what a thread could not shorten by its own start-up time.
template <class Totals, class F>
Totals sum_over_ranges(int64_t items, const F& f) {
  constexpr int64_t kSmallest = 8192, kMost = 1024;
  const int64_t length = std::max(kSmallest, (items + kMost - 1) / kMost);
  const int64_t ranges = (items + length - 1) / length;
  Totals total;
  if (ranges <= 1) {
    f(0, items, total);
    return total;
  }
  std::vector<Totals> partial(ranges);
  at::parallel_for(0, ranges, 2, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i * length, std::min(items, (i + 1) * length), partial[i]);
  });
  for (const Totals& part : partial) total.add(part);
  return total;
}

}  // namespace rewardfuse
