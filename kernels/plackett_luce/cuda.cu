// Plackett–Luce on CUDA devices.
//
// Decomposition: one launch each way, a grid that strides over the lists. Lists of up to 128 items are taken by teams
// of lanes, 4 positions a lane, several lists a warp; a longer list by a block, in tiles of 1,024 positions, forward
// from the last to the first and backward from the first to the last, so that a list holds up nobody but its block.
// Packed lists go by their mean length: a list too long for its team is taken by the team's block afterwards.
// Traffic, float32: forward reads 4 bytes a score; backward reads 4 and writes 4, in 16-byte accesses where the rows
// allow them and nothing stands by position ("plain"). An order adds its own 8 each way, a mask 1, weights their own.
// Every gradient is written once. Launch and reduction (reduce.cuh) add no pass over memory.
// Precision: float32 maths for 16-bit and float32 scores, float64 for float64. The stages of one thread in one tile are
// added in that type, all else in float64.
#include "plackett_luce/cuda.cuh"

namespace rewardfuse::cuda {
namespace plackett_luce {

// Who takes a list: lanes, the block, or lanes where it is short enough and else the block.
enum class By { kLanes, kBlock, kEither };

template <class T, By by>
constexpr int kMinBlocks = sizeof(T) == 8 || by == By::kEither ? 2 : 3;

template <class T, class S, bool plain, class Team>
__device__ __forceinline__ void forward_list(const Problem& problem, const CudaForward& out, const Team& team,
                                             const Ranking<T>& ranking, bool mine, lists::Sums& sums) {
  Walk<T, S, plain, Team> walk{problem, ranking, team};
  const T nll = walk.forward(static_cast<Suffix<T>*>(out.saved));
  if (!mine || team.rank != 0) return;
  const T loss = ranking.weight == T(0) ? T(0) : ranking.weight * nll;
  static_cast<T*>(out.list_loss)[ranking.index] = loss;
  sums.add(loss, ranking.length > 0 || ranking.bad);
}

template <class T, class S, bool plain, class Team>
__device__ __forceinline__ void backward_list(const Problem& problem, const Gradients& out, const Team& team,
                                              Ranking<T>& ranking, bool mine, T scale) {
  T factor = 0;
  bool is_nan = false;
  if (mine) {
    const T loss = static_cast<const T*>(out.list_loss)[ranking.index];
    is_nan = loss != loss;
    factor = lists::per_list<T>(out.grad_output, ranking) * scale * ranking.weight;
  }
  if (is_nan) ranking.slots = 0;
  S* const gradient = static_cast<S*>(out.scores);
  Walk<T, S, plain, Team> walk{problem, ranking, team};
  walk.backward(static_cast<const Suffix<T>*>(out.saved), factor, gradient);
  if (mine && ranking.slots == 0) lists::fill_gradient(team, problem.lists, ranking, is_nan, gradient);
}

// Calls f(team, list, whether the list is this team's to write) for the lists of this thread. Where not, the team comes
// along with a list of no slots.
template <class T, By by, class F>
__device__ __forceinline__ void for_each_list(const Problem& problem, const Teams& teams, F&& f) {
  const int64_t count = problem.lists.count;
  if constexpr (by == By::kBlock) {
    for (int64_t r = blockIdx.x; r < count; r += gridDim.x) {
      Ranking<T> ranking = ranking_at<T>(problem, r);
      f(BlockTeam(), ranking, true);
    }
  } else {
    const LaneTeam team(teams.width);
    const int64_t capacity = static_cast<int64_t>(teams.width) * kSlots;
    for (int64_t first = blockIdx.x * teams.lists_a_block; first < count; first += gridDim.x * teams.lists_a_block) {
      const int64_t r = first + threadIdx.x / teams.width;
      Ranking<T> ranking;
      if (r < count) ranking = ranking_at<T>(problem, r);
      const bool is_long = ranking.places > capacity;
      if (is_long) ranking.slots = 0;
      f(team, ranking, r < count && !is_long);
      if constexpr (by == By::kEither) {
        if (!__syncthreads_or(is_long)) continue;
        for (int64_t i = first; i < first + teams.lists_a_block && i < count; ++i) {
          Ranking<T> long_ranking = ranking_at<T>(problem, i);
          if (long_ranking.places > capacity) f(BlockTeam(), long_ranking, true);
        }
      }
    }
  }
}

template <class T, class S, bool plain, By by>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, by>)
    forward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ CudaForward out, const Teams teams,
                   const GridScratch scratch) {
  lists::Sums sums;
  for_each_list<T, by>(problem, teams, [&](const auto& team, const Ranking<T>& ranking, bool mine) {
    forward_list<T, S, plain>(problem, out, team, ranking, mine, sums);
  });
  sums.finish<T>(out, scratch);
}

template <class T, class S, bool plain, By by>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, by>)
    backward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Gradients out, const Teams teams) {
  const T scale = static_cast<T>(lists::scale_of(out));
  for_each_list<T, by>(problem, teams, [&](const auto& team, Ranking<T>& ranking, bool mine) {
    backward_list<T, S, plain>(problem, out, team, ranking, mine, scale);
  });
  if (!plain && problem.lists.cu_seqlens) lists::clear_outside(problem.lists, static_cast<S*>(out.scores));
}

template <class S>
bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Vector<S, kSlots>) == 0;
}

// `gradient` is null in forward.
template <class S>
bool is_plain(const Problem& problem, const void* gradient) {
  const auto& lists = problem.lists;
  return lists.cu_seqlens == nullptr && lists.mask.data == nullptr && problem.order.data == nullptr &&
         problem.position_weight.data == nullptr && problem.item_weight.data == nullptr &&
         lists.scores.inner_stride == 1 && is_aligned<S>(lists.scores.data) && is_aligned<S>(gradient) &&
         (lists.count == 1 || (lists.size % kSlots == 0 && lists.scores.outer_stride % kSlots == 0));
}

// Calls f(accumulation type, storage type, whether the problem is plain, who takes a list).
template <class F>
void with_kinds(const Problem& problem, const Teams& teams, const void* gradient, F&& f) {
  with_rewards(problem.lists.dtype, [&](auto acc, auto storage) {
    const auto taken_by = [&](auto by) {
      is_plain<decltype(storage)>(problem, gradient) ? f(acc, storage, std::true_type{}, by)
                                                     : f(acc, storage, std::false_type{}, by);
    };
    if (teams.width == 0) return taken_by(std::integral_constant<By, By::kBlock>{});
    if (problem.lists.cu_seqlens == nullptr) return taken_by(std::integral_constant<By, By::kLanes>{});
    f(acc, storage, std::false_type{}, std::integral_constant<By, By::kEither>{});
  });
}

void forward(const Problem& problem, const CudaForward& out, const CudaLaunch& launch) {
  const GridScratch scratch{launch.partials, launch.flags, launch.nonce};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const Teams teams = rewardfuse::lists::plackett_luce_teams(problem.lists);
  with_kinds(problem, teams, nullptr, [&](auto acc, auto storage, auto plain, auto by) {
    const auto kernel = &forward_kernel<decltype(acc), decltype(storage), plain, by>;
    kernel<<<launch.blocks, kThreads, 0, stream>>>(problem, out, teams, scratch);
  });
}

void backward(const Problem& problem, const Gradients& out, const CudaLaunch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const Teams teams = rewardfuse::lists::plackett_luce_teams(problem.lists);
  with_kinds(problem, teams, out.scores, [&](auto acc, auto storage, auto plain, auto by) {
    const auto kernel = &backward_kernel<decltype(acc), decltype(storage), plain, by>;
    kernel<<<launch.blocks, kThreads, 0, stream>>>(problem, out, teams);
  });
}

}  // namespace plackett_luce

const PlackettLuceCuda plackett_luce_kernels = {&plackett_luce::forward, &plackett_luce::backward};

}  // namespace rewardfuse::cuda
