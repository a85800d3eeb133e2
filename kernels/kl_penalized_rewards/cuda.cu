// KL-penalized rewards on CUDA devices; the equation is in math.h.
//
// Decomposition: one launch each way, a grid that strides over the rows. A row of up to 512 tokens is taken by some
// lanes of a warp, sixteen tokens a lane, a longer one by a block. Where everything is contiguous and aligned a thread
// takes 16 bytes of float32 at a time, else single tokens. What a row adds up, and which valid token is its last, meets
// in its team; then one thread puts the score in its place.
// Traffic in float32: forward reads 8 bytes a token and 1 of mask, writes 8; backward reads 8 and 1 and the gradients
// that came, writes 4. Masked tokens are not read.
// Precision: float32 maths for 16-bit and float32 log-probs, float64 for float64; all sums in float64.
#include "common/reduce.cuh"
#include "common/scan.cuh"
#include "common/storage.cuh"
#include "kl_penalized_rewards/args.h"
#include "kl_penalized_rewards/math.h"
#include "kl_penalized_rewards/teams.h"

namespace rewardfuse::cuda {
namespace kl_rewards {

using rewardfuse::kl_rewards::Gradients;
using rewardfuse::kl_rewards::kCudaSums;
using rewardfuse::kl_rewards::Problem;
using rewardfuse::kl_rewards::Results;
using rewardfuse::kl_rewards::Teams;

// Caps registers at what keeps this many blocks on a multiprocessor.
template <class T>
constexpr int kMinBlocks = sizeof(T) == 8 ? 2 : 3;

// What does not differ from row to row.
template <class T>
struct Options {
  ApproxKl<T> model;
  ScoreShape<T> shape;
  double beta;  // NaN where the device holds none

  __device__ __forceinline__ explicit Options(const Problem& problem)
      : model(problem.options), shape(problem), beta(load<double>(problem.kl_coef, 0, 0)) {
    if (!(beta >= 0 && beta - beta == 0)) beta = nan("");
  }
};

template <class S>
__device__ __forceinline__ const S* row_of(const Operand& operand, int64_t r) {
  return static_cast<const S*>(operand.data) + r * operand.outer_stride;
}

// kWidth neighbours, widened.
template <class T, class S, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> read(const S* from) {
  const auto raw = *reinterpret_cast<const Vector<S, kWidth>*>(from);
  Vector<T, kWidth> x;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) x.item[j] = widen<T>(raw.item[j]);
  return x;
}

// Whether each of kWidth tokens is valid; and whether one is.
template <int kWidth>
__device__ __forceinline__ bool read_mask(const Problem& problem, int64_t r, int64_t column, bool (&valid)[kWidth]) {
  Vector<uint8_t, kWidth> raw;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) raw.item[j] = 1;
  if (problem.mask.data) {
    const uint8_t* const mask = row_of<uint8_t>(problem.mask, r) + column * problem.mask.inner_stride;
    raw = *reinterpret_cast<const Vector<uint8_t, kWidth>*>(mask);
  }
  bool any = false;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) any |= valid[j] = raw.item[j] != 0;
  return any;
}

template <class T, class S, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> read_x(const Problem& problem, int64_t r, int64_t column) {
  const Operand &a = problem.logprobs, &b = problem.ref_logprobs;
  auto x = read<T, S, kWidth>(row_of<S>(a, r) + column * a.inner_stride);
  const auto y = read<T, S, kWidth>(row_of<S>(b, r) + column * b.inner_stride);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) x.item[j] -= y.item[j];
  return x;
}

__device__ __forceinline__ bool is_missed(const Problem& problem, int64_t r) {
  return problem.ended.data && *row_of<uint8_t>(problem.ended, r) == 0;
}

// The last valid token of a row, for all of its team; −1 where there is none.
template <class Team>
__device__ __forceinline__ long long last_valid(const Problem& problem, const Team& team, int64_t r, bool mine) {
  long long last = -1;
  for (int64_t t = team.rank; mine && t < problem.size; t += team.width) {
    bool valid[1];
    if (read_mask(problem, r, t, valid)) last = t;
  }
  return team.reduce(last, [](long long a, long long b) { return a > b ? a : b; });
}

// What a thread, then a team, knows of its row.
struct Found {
  double kl, score;
  long long last;
};

template <class T, class S, int kWidth, class Team>
__device__ __forceinline__ void forward_row(const Problem& problem, const Results& out, const Options<T>& options,
                                            const Team& team, int64_t r, bool mine, double (&sums)[kCudaSums]) {
  const bool missed = mine && is_missed(problem, r);
  T* const rewards = static_cast<T*>(out.rewards) + r * problem.size;
  T* const kl = static_cast<T*>(out.kl) + r * problem.size;
  // Which token's score the penalty hits is found first; the condition is the same for all rows, so that the warp's
  // teams come along.
  const bool penalized = problem.token_scores && problem.ended.data;
  const long long hit = penalized ? last_valid(problem, team, r, mine) : -1;
  Found found{0, 0, -1};
  int tokens = 0;
  for (int64_t column = team.rank * kWidth; mine && column < problem.size; column += team.width * kWidth) {
    bool valid[kWidth];
    Vector<T, kWidth> x{}, reward{}, estimate{};
    if (read_mask(problem, r, column, valid)) x = read_x<T, S, kWidth>(problem, r, column);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (!valid[j]) continue;
      T score = 0;
      if (problem.token_scores) {
        score = options.shape(load<T>(problem.scores, r, column + j), missed && column + j == hit);
        found.score += score;
      }
      estimate.item[j] = options.model.value(x.item[j], T(1));
      reward.item[j] = kl_penalized(score, static_cast<T>(options.beta), estimate.item[j]);
      found.kl += estimate.item[j];
      found.last = column + j;
      ++tokens;
    }
    *reinterpret_cast<Vector<T, kWidth>*>(kl + column) = estimate;
    *reinterpret_cast<Vector<T, kWidth>*>(rewards + column) = reward;
  }
  sums[3] += tokens;
  found = team.reduce(found, [](const Found& a, const Found& b) {
    return Found{a.kl + b.kl, a.score + b.score, a.last > b.last ? a.last : b.last};
  });
  team.wait();  // whoever wrote the reward at the score's place
  if (!mine || team.rank != 0) return;
  double reward = 0;
  if (found.last >= 0) {
    if (!problem.token_scores) {
      const T score = options.shape(load<T>(problem.scores, r, 0), missed);
      rewards[problem.one_past && found.last + 1 < problem.size ? found.last + 1 : found.last] += score;
      found.score = score;
    }
    reward = kl_penalized(found.score, options.beta, found.kl);
    sums[0] += found.kl;
    sums[1] += found.score;
    sums[2] += reward;
    sums[4] += 1;
  }
  static_cast<T*>(out.sequence_kl)[r] = static_cast<T>(found.kl);
  static_cast<T*>(out.sequence_reward)[r] = static_cast<T>(reward);
}

// Gradients of kWidth neighbours; a repeated one is read once.
template <class T, int kWidth>
__device__ __forceinline__ void add_gradient(const Operand& operand, int64_t r, int64_t column, T factor,
                                             Vector<T, kWidth>& to) {
  if (operand.data == nullptr) return;
  const T* const from = row_of<T>(operand, r) + column * operand.inner_stride;
  Vector<T, kWidth> gradient;
  if (kWidth == 1 || operand.inner_stride != 0) {
    gradient = *reinterpret_cast<const Vector<T, kWidth>*>(from);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) gradient.item[j] = *from;
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) to.item[j] += factor * gradient.item[j];
}

template <class T, class S, int kWidth, class Team>
__device__ __forceinline__ void backward_row(const Problem& problem, const Gradients& out, const Options<T>& options,
                                             const Team& team, int64_t r) {
  S* const to = static_cast<S*>(out.logprobs) + r * problem.size;
  const T beta = static_cast<T>(options.beta);
  T whole = load<T>(out.sequence_kl, r, 0);
  if (beta != T(0)) whole -= beta * load<T>(out.sequence_reward, r, 0);
  for (int64_t column = team.rank * kWidth; column < problem.size; column += team.width * kWidth) {
    bool valid[kWidth];
    Vector<S, kWidth> result;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) result.item[j] = narrow<S>(T(0));
    if (read_mask(problem, r, column, valid)) {
      const auto x = read_x<T, S, kWidth>(problem, r, column);
      Vector<T, kWidth> gradient;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) gradient.item[j] = whole;
      add_gradient(out.kl, r, column, T(1), gradient);
      if (beta != T(0)) add_gradient(out.rewards, r, column, -beta, gradient);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (!valid[j] || gradient.item[j] == T(0)) continue;  // what nobody asks for may be infinite
        result.item[j] = narrow<S>(gradient.item[j] * options.model.slope(x.item[j], T(1)));
      }
    }
    *reinterpret_cast<Vector<S, kWidth>*>(to + column) = result;
  }
}

// The gradient of a row's score or scores.
template <class T, class Team>
__device__ __forceinline__ void backward_scores(const Problem& problem, const Gradients& out, const Options<T>& options,
                                                const Team& team, int64_t r, bool mine) {
  const long long last = last_valid(problem, team, r, mine);
  if (!mine) return;
  const bool missed = is_missed(problem, r);
  const T whole = load<T>(out.sequence_reward, r, 0);
  const DType dtype = problem.scores.dtype;
  if (!problem.token_scores) {
    if (team.rank != 0) return;
    const int64_t place = problem.one_past && last + 1 < problem.size ? last + 1 : last;
    T gradient = 0;
    if (last >= 0) {
      gradient = whole + load<T>(out.rewards, r, place);
      gradient *= options.shape.slope(load<T>(problem.scores, r, 0), missed);
    }
    return store(out.scores, dtype, r, gradient);
  }
  for (int64_t t = team.rank; t < problem.size; t += team.width) {
    bool valid[1];
    T gradient = 0;
    if (read_mask(problem, r, t, valid)) {
      gradient = whole + load<T>(out.rewards, r, t);
      gradient *= options.shape.slope(load<T>(problem.scores, r, t), missed && t == last);
    }
    store(out.scores, dtype, r * problem.size + t, gradient);
  }
}

// Calls f(team, row, whether there is such a row) for the rows of this thread.
template <bool blocks, class F>
__device__ __forceinline__ void for_each_row(const Problem& problem, const Teams& teams, F&& f) {
  if constexpr (blocks) {
    for (int64_t r = blockIdx.x; r < problem.rows; r += gridDim.x) f(BlockTeam(), r, true);
  } else {
    const LaneTeam team(teams.width);
    const int64_t step = gridDim.x * teams.lists_a_block;
    for (int64_t first = blockIdx.x * teams.lists_a_block; first < problem.rows; first += step) {
      const int64_t r = first + threadIdx.x / teams.width;
      f(team, r, r < problem.rows);
    }
  }
}

template <class T>
__device__ __forceinline__ void write_stats(const Results& out, const double (&sums)[kCudaSums]) {
  T* const stats = static_cast<T*>(out.stats);
  const auto mean = [](double sum, double count) { return static_cast<T>(count > 0 ? sum / count : 0); };
  stats[0] = mean(sums[0], sums[3]);
  for (int i = 0; i < 3; ++i) stats[1 + i] = mean(sums[i], sums[4]);
  stats[4] = static_cast<T>(sums[3]);
  stats[5] = static_cast<T>(sums[4]);
}

template <class T, class S, int kWidth, bool blocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    forward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Results out, const Teams teams,
                   const GridScratch scratch) {
  const Options<T> options(problem);
  double sums[kCudaSums] = {};  // KL, score, reward, tokens, rows
  for_each_row<blocks>(problem, teams, [&](const auto& team, int64_t r, bool mine) {
    forward_row<T, S, kWidth>(problem, out, options, team, r, mine, sums);
  });
  if (grid_sum(sums, scratch)) write_stats<T>(out, sums);
}

template <class T, class S, int kWidth, bool blocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    backward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Gradients out, const Teams teams) {
  const Options<T> options(problem);
  for_each_row<blocks>(problem, teams, [&](const auto& team, int64_t r, bool mine) {
    if (mine && out.logprobs) backward_row<T, S, kWidth>(problem, out, options, team, r);
    if (out.scores) backward_scores(problem, out, options, team, r, mine);
  });
}

// Whether every row of an operand is read in whole vectors of `width` items, or is one item repeated.
inline bool is_aligned(const Operand& operand, int64_t item_bytes, int width) {
  if (operand.data == nullptr) return true;
  return operand.inner_stride == 1 && operand.outer_stride % width == 0 &&
         reinterpret_cast<uintptr_t>(operand.data) % (item_bytes * width) == 0;
}

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T, class S>
bool is_plain(const Problem& problem) {
  constexpr int kWidth = kVector<T>;
  return problem.size % kWidth == 0 && is_aligned(problem.logprobs, sizeof(S), kWidth) &&
         is_aligned(problem.ref_logprobs, sizeof(S), kWidth) && is_aligned(problem.mask, 1, kWidth);
}

template <class T>
bool is_plain(const Operand& gradient) {
  return gradient.inner_stride == 0 || is_aligned(gradient, sizeof(T), 16 / sizeof(T));
}

void forward(const Problem& problem, const Results& out, const CudaLaunch& launch) {
  const GridScratch scratch{launch.partials, launch.flags, launch.nonce};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const Teams teams = rewardfuse::kl_rewards::teams(problem);
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    using S = decltype(storage);
    constexpr int kWidth = kVector<T>;
    auto kernel = teams.width == 0 ? &forward_kernel<T, S, 1, true> : &forward_kernel<T, S, 1, false>;
    if (is_plain<T, S>(problem)) {
      kernel = teams.width == 0 ? &forward_kernel<T, S, kWidth, true> : &forward_kernel<T, S, kWidth, false>;
    }
    kernel<<<launch.blocks, kThreads, 0, stream>>>(problem, out, teams, scratch);
  });
}

void backward(const Problem& problem, const Gradients& out, const CudaLaunch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const Teams teams = rewardfuse::kl_rewards::teams(problem);
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    using S = decltype(storage);
    constexpr int kWidth = kVector<T>;
    auto kernel = teams.width == 0 ? &backward_kernel<T, S, 1, true> : &backward_kernel<T, S, 1, false>;
    if (is_plain<T, S>(problem) && is_plain<T>(out.rewards) && is_plain<T>(out.kl)) {
      kernel = teams.width == 0 ? &backward_kernel<T, S, kWidth, true> : &backward_kernel<T, S, kWidth, false>;
    }
    kernel<<<launch.blocks, kThreads, 0, stream>>>(problem, out, teams);
  });
}

}  // namespace kl_rewards

const KlPenalizedRewardsCuda kl_penalized_rewards_kernels = {&kl_rewards::forward, &kl_rewards::backward};

}  // namespace rewardfuse::cuda
