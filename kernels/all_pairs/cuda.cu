// All pairs of a list on CUDA devices.
//
// Decomposition: one launch each way, a grid that strides over the lists. Up to 32 items go one to a lane, several
// lists a warp, up to 64 two to a lane; longer lists take a block each. A thread holds one item at a time and meets all
// others, which its team lays out in shared memory, as many at a time as there are threads. Each end works out the pair
// for itself: forward the better one, backward both.
// Traffic: the items of a list once for each thread-count of items; K² pairs of arithmetic. Memory is O(K).
// Precision: float32 maths for 16-bit and float32 scores, float64 for float64; labels that float32 cannot hold are
// compared and subtracted in float64. What an item meets in one tile is added in the first type, all else in float64.
#include "all_pairs/args.h"
#include "all_pairs/math.h"
#include "lists/cuda.cuh"

namespace rewardfuse::cuda {
namespace all_pairs {

using lists::CudaForward;
using lists::Gradients;
using lists::List;
using lists::Teams;
using rewardfuse::all_pairs::Problem;

template <class T, class L>
struct Item {
  T score;
  L label;  // NaN where the item is not there: it forms no pair
  bool there;
};

// One team and one list; a team without a list comes along with one of no places.
template <class T, class S, class L, class Team>
struct Walk {
  const Problem& problem;
  const List& list;
  const bool reads_scores;
  const Team team;
  // In steps of the team: lanes go as far as the warp's other teams do.
  const int64_t rows = Team::kIsBlock ? list.places : problem.lists.size;
  const int64_t columns = Team::kIsBlock && !problem.lists.mask.data ? list.length : rows;

  __device__ __forceinline__ Item<T, L> item_at(int64_t i) const {
    Item<T, L> item{T(0), L(nan("")), i < list.places && lists::is_there(problem.lists, list, i)};
    if (!item.there) return item;
    item.label = load<L>(problem.labels, list.row, i);
    if (reads_scores) {
      item.score = widen<T>(lists::scores_of<S>(problem.lists, list)[i * problem.lists.scores.inner_stride]);
    }
    return item;
  }

  // For each item of this thread: meet(item, other, gap of the labels) for all others that it forms a pair with, after
  // a tile of them close(), after all of them leave(i, item).
  template <class Meet, class Close, class Leave>
  __device__ __forceinline__ void each_item(Meet&& meet, Close&& close, Leave&& leave) const {
    __shared__ T scores[kThreads];
    __shared__ L labels[kThreads];
    const int begin = threadIdx.x - team.rank;
    for (int64_t row = 0; row < rows; row += team.width) {
      const Item<T, L> item = item_at(row + team.rank);
      for (int64_t column = 0; column < columns && row < columns; column += team.width) {
        const Item<T, L> other = column == row ? item : item_at(column + team.rank);
        team.wait();  // the last tile's reads are over
        scores[threadIdx.x] = other.score;
        labels[threadIdx.x] = other.label;
        team.wait();
        const int count = columns - column < team.width ? static_cast<int>(columns - column) : team.width;
        for (int j = begin; j < begin + count; ++j) {
          const L gap = item.label - labels[j];
          if (gap > L(0) || gap < L(0)) meet(item.score, scores[j], static_cast<T>(gap));
        }
        close();
      }
      leave(row + team.rank, item);
    }
  }
};

template <class T, class S, class L, class Team>
__device__ __forceinline__ void forward_list(const Problem& problem, const CudaForward& out, const Team& team,
                                             const List& list, bool mine, lists::Sums& sums) {
  const T weight = mine ? lists::per_list<T>(problem.lists.weight, list) : T(0);
  const T margin = load<T>(problem.margin, 0, 0);
  const Walk<T, S, L, Team> walk{problem, list, weight != T(0), team};
  double loss = 0;
  long long pairs = 0;
  int unlabelled = 0;
  T of_tile = 0;
  walk.each_item(
      [&](T score, T other, T gap) {
        if (gap < T(0)) return;
        of_tile += PairOfItems<T>(score, gap, other, T(0), margin).loss();
        ++pairs;
      },
      [&] {
        loss += of_tile;
        of_tile = 0;
      },
      [&](int64_t, const Item<T, L>& item) { unlabelled += item.there && item.label != item.label; });
  loss = team.sum(loss);
  pairs = team.sum(pairs);
  unlabelled = team.sum(unlabelled);
  if (!mine || team.rank != 0) return;
  T value = pairs > 0 ? static_cast<T>(loss / static_cast<double>(pairs)) : T(0);
  if (unlabelled > 0 || list.bad) value = T(nan(""));
  value = weight == T(0) ? T(0) : weight * value;
  static_cast<T*>(out.list_loss)[list.index] = value;
  static_cast<double*>(out.saved)[list.index] = static_cast<double>(pairs);
  sums.add(value, pairs > 0);
}

template <class T, class S, class L, class Team>
__device__ __forceinline__ void backward_list(const Problem& problem, const Gradients& out, const Team& team, List list,
                                              bool mine, T scale) {
  T factor = 0;
  bool is_nan = false, is_read = false;
  if (mine) {
    const T loss = static_cast<const T*>(out.list_loss)[list.index];
    const T weight = lists::per_list<T>(problem.lists.weight, list);
    const double pairs = static_cast<const double*>(out.saved)[list.index];
    is_nan = loss != loss;
    is_read = weight != T(0) && pairs > 0 && !is_nan;
    factor = lists::per_list<T>(out.grad_output, list) * scale * weight / static_cast<T>(pairs);
  }
  S* const gradient = static_cast<S*>(out.scores);
  if (mine && !is_read) lists::fill_gradient(team, problem.lists, list, is_nan, gradient);
  if (!is_read) list.places = list.length = 0;
  const T margin = load<T>(problem.margin, 0, 0);
  const Walk<T, S, L, Team> walk{problem, list, true, team};
  T of_tile = 0;
  double slope = 0;
  walk.each_item([&](T score, T other, T gap) { of_tile += PairOfItems<T>(score, gap, other, T(0), margin).slope(); },
                 [&] {
                   slope += of_tile;
                   of_tile = 0;
                 },
                 [&](int64_t i, const Item<T, L>&) {
                   if (i < list.places) gradient[list.to + i] = narrow<S>(slope == 0 ? T(0) : factor * T(slope));
                   slope = 0;
                 });
}

// Calls f(team, list, whether there is such a list) for the lists of this thread.
template <bool blocks, class F>
__device__ __forceinline__ void for_each_list(const lists::Lists& lists, const Teams& teams, F&& f) {
  if constexpr (blocks) {
    for (int64_t r = blockIdx.x; r < lists.count; r += gridDim.x) f(BlockTeam(), lists::list_at(lists, r), true);
  } else {
    const LaneTeam team(teams.width);
    for (int64_t first = blockIdx.x * teams.lists_a_block; first < lists.count;
         first += gridDim.x * teams.lists_a_block) {
      const int64_t r = first + threadIdx.x / teams.width;
      f(team, r < lists.count ? lists::list_at(lists, r) : List(), r < lists.count);
    }
  }
}

template <class T>
constexpr int kMinBlocks = sizeof(T) == 8 ? 2 : 3;

template <class T, class S, class L, bool blocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    forward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ CudaForward out, const Teams teams,
                   const GridScratch scratch) {
  lists::Sums sums;
  for_each_list<blocks>(problem.lists, teams, [&](const auto& team, const List& list, bool mine) {
    forward_list<T, S, L>(problem, out, team, list, mine, sums);
  });
  sums.finish<T>(out, scratch);
}

template <class T, class S, class L, bool blocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    backward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Gradients out, const Teams teams) {
  const T scale = static_cast<T>(lists::scale_of(out));
  for_each_list<blocks>(problem.lists, teams, [&](const auto& team, const List& list, bool mine) {
    backward_list<T, S, L>(problem, out, team, list, mine, scale);
  });
}

// Calls f(accumulation type, storage type, type of the labels).
template <class F>
void with_types(const Problem& problem, F&& f) {
  const auto labels = problem.labels.dtype;
  const bool wide = labels == DType::kFloat64 || labels == DType::kInt64 || labels == DType::kInt32;
  with_rewards(problem.lists.dtype,
               [&](auto acc, auto storage) { return wide ? f(acc, storage, double{}) : f(acc, storage, float{}); });
}

void forward(const Problem& problem, const CudaForward& out, const CudaLaunch& launch) {
  const GridScratch scratch{launch.partials, launch.flags, launch.nonce};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const Teams teams = rewardfuse::lists::all_pairs_teams(problem.lists);
  with_types(problem, [&](auto acc, auto storage, auto label) {
    using T = decltype(acc);
    using S = decltype(storage);
    using L = decltype(label);
    const auto kernel = teams.width == 0 ? &forward_kernel<T, S, L, true> : &forward_kernel<T, S, L, false>;
    kernel<<<launch.blocks, kThreads, 0, stream>>>(problem, out, teams, scratch);
  });
}

void backward(const Problem& problem, const Gradients& out, const CudaLaunch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const Teams teams = rewardfuse::lists::all_pairs_teams(problem.lists);
  with_types(problem, [&](auto acc, auto storage, auto label) {
    using T = decltype(acc);
    using S = decltype(storage);
    using L = decltype(label);
    const auto kernel = teams.width == 0 ? &backward_kernel<T, S, L, true> : &backward_kernel<T, S, L, false>;
    kernel<<<launch.blocks, kThreads, 0, stream>>>(problem, out, teams);
  });
}

}  // namespace all_pairs

const AllPairsCuda all_pairs_kernels = {&all_pairs::forward, &all_pairs::backward};

}  // namespace rewardfuse::cuda
