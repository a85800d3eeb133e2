// The kernels of every op on pairs on CUDA devices, around the maths of the op's math.h.
//
// Decomposition: one launch each way; a grid that fills the device strides over the pairs.
// Where both rewards are contiguous and aligned and nothing else differs from pair to pair ("plain"), a thread takes 16
// bytes of each at a time; else single pairs. (Four pairs with four operands of any dtype each would spill.)
// Traffic, float32: forward reads 8 bytes a pair; backward reads 8 and writes 8; masks, weights and the like on top
// where they are whole tensors. Launch and reduction (reduce.cuh) add no pass over memory.
// Precision: float32 maths for 16-bit and float32 rewards, float64 for float64. A thread adds the few pairs of one
// access in that type and accesses in float64, so that long sums lose nothing.
#pragma once

#include "common/host_device.h"
#include "common/reduce.cuh"
#include "common/storage.cuh"
#include "pairwise/kernels.h"

namespace rewardfuse::cuda::pairwise {

using rewardfuse::pairwise::CudaForward;
using rewardfuse::pairwise::Gradients;
using rewardfuse::pairwise::Problem;

// Caps registers at what keeps this many blocks on a multiprocessor: left to itself ptxas spills a few bytes.
template <class T>
constexpr int kMinBlocks = sizeof(T) == 8 ? 2 : 3;

template <class T>
struct Pair {
  T a, b, p, q, weight;
  bool valid, counted;
};

// What completes a pair of rewards: read for each pair, or once where the problem is plain.
template <class T, bool plain>
struct PairSource {
  const Problem& problem;
  T p = 0, q = 0, weight = 0;

  __device__ __forceinline__ explicit PairSource(const Problem& problem) : problem(problem) {
    if constexpr (plain) {
      p = load<T>(problem.p, 0, 0);
      q = load<T>(problem.q, 0, 0);
      weight = load<T>(problem.weight, 0, 0);
    }
  }

  __device__ __forceinline__ Pair<T> operator()(int64_t row, int64_t column, T a, T b) const {
    if constexpr (plain) {
      return {a, b, p, q, weight, true, weight != T(0)};
    } else {
      Pair<T> x{a, b, load<T>(problem.p, row, column), load<T>(problem.q, row, column),
                load<T>(problem.weight, row, column)};
      x.valid = load<T>(problem.mask, row, column) != T(0);
      x.counted = x.valid && x.weight != T(0);
      return x;
    }
  }
};

// Calls f(row, column, item, a, b, width) for this thread's share of the pairs: with kWidth pairs at a time as arrays,
// or with one.
template <class T, class S, int kWidth, class F>
__device__ __forceinline__ void for_each_access(const Problem& problem, F&& f) {
  const Plane plane = problem.plane;
  const S* a = static_cast<const S*>(problem.a.data);
  const S* b = static_cast<const S*>(problem.b.data);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kWidth;
  int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if constexpr (kWidth == 1) {
    const bool one_row = plane.inner == plane.items;
    for (; item < plane.items; item += step) {
      const int64_t row = one_row ? 0 : item / plane.inner, column = one_row ? item : item % plane.inner;
      const T x[1] = {widen<T>(a[row * problem.a.outer_stride + column * problem.a.inner_stride])};
      const T y[1] = {widen<T>(b[row * problem.b.outer_stride + column * problem.b.inner_stride])};
      f(row, column, item, x, y, 1);
    }
  } else {
    for (; item < plane.items; item += step) {
      T x[kWidth] = {}, y[kWidth] = {};
      int width = kWidth;
      if (item + kWidth <= plane.items) {
        const auto va = *reinterpret_cast<const Vector<S, kWidth>*>(a + item);
        const auto vb = *reinterpret_cast<const Vector<S, kWidth>*>(b + item);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          x[j] = widen<T>(va.item[j]);
          y[j] = widen<T>(vb.item[j]);
        }
      } else {
        width = static_cast<int>(plane.items - item);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          if (j < width) {
            x[j] = widen<T>(a[item + j]);
            y[j] = widen<T>(b[item + j]);
          }
        }
      }
      f(0, item, item, x, y, width);
    }
  }
}

enum Sum { kLoss, kValid, kCounted, kCorrect, kTies, kA, kB, kSums };

__device__ __forceinline__ double normalizer_or(const Operand& normalizer, double otherwise) {
  if (normalizer.data == nullptr && normalizer.value == 0) return otherwise;
  const double value = load<double>(normalizer, 0, 0);
  return value > 0 ? value : nan("");
}

template <class T>
__device__ __forceinline__ void write_results(const Problem& problem, const CudaForward& out,
                                              const double (&sums)[kSums]) {
  const auto mean = [](double sum, double count) { return count > 0 ? sum / count : count == 0 ? 0 : count; };
  T* loss = static_cast<T*>(out.loss);
  if (out.reduction == Reduction::kSum) *loss = static_cast<T>(sums[kLoss]);
  if (out.reduction == Reduction::kMean) {
    *loss = static_cast<T>(mean(sums[kLoss], normalizer_or(out.normalizer, sums[kValid])));
  }
  if (out.denominator) *out.denominator = sums[kValid];
  if (problem.wants_stats) {
    T* stats = static_cast<T*>(out.stats);
    const double n = sums[kCounted];
    stats[0] = static_cast<T>(mean(sums[kCorrect], n));
    stats[1] = static_cast<T>(mean(sums[kTies], n));
    stats[2] = static_cast<T>(mean(sums[kA] - sums[kB], n));
    stats[3] = static_cast<T>(mean(sums[kA], n));
    stats[4] = static_cast<T>(mean(sums[kB], n));
  }
}

template <class Model, class T, class S, int kWidth>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    forward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ CudaForward out,
                   GridScratch scratch) {
  const Model model(problem.options);
  const PairSource<T, (kWidth > 1)> source(problem);
  double sums[kSums] = {};
  for_each_access<T, S, kWidth>(
      problem, [&](int64_t row, int64_t column, int64_t item, const T* a, const T* b, int width) {
        double loss = 0, sum_a = 0, sum_b = 0;
        int valid = 0, counted = 0, correct = 0, ties = 0;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          if (j >= width) break;
          const Pair<T> x = source(row, column + j, a[j], b[j]);
          T value = 0;
          if (x.counted) {
            value = model.invalid(x.p, x.q) ? T(nan("")) : x.weight * model.loss(x.a, x.b, x.p, x.q);
            correct += x.a > x.b;
            ties += x.a == x.b;
            sum_a += x.a;
            sum_b += x.b;
          }
          valid += x.valid;
          counted += x.counted;
          loss += value;
          if (out.reduction == Reduction::kNone) static_cast<T*>(out.loss)[item + j] = value;
        }
        sums[kLoss] += loss;
        sums[kValid] += valid;
        if (problem.wants_stats) {
          sums[kCounted] += counted;
          sums[kCorrect] += correct;
          sums[kTies] += ties;
          sums[kA] += sum_a;
          sums[kB] += sum_b;
        }
      });
  if (out.reduction == Reduction::kNone && !problem.wants_stats) return;
  if (grid_sum(sums, scratch)) write_results<T>(problem, out, sums);
}

template <class Model, class T, class S, int kWidth>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    backward_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Gradients out,
                    GridScratch scratch) {
  const Model model(problem.options);
  double scale = out.scale;
  if (out.denominator) scale = *out.denominator > 0 ? 1 / *out.denominator : 0;
  scale /= normalizer_or(out.normalizer, 1);
  const PairSource<T, (kWidth > 1)> source(problem);
  double sums[1] = {0};
  for_each_access<T, S, kWidth>(
      problem, [&](int64_t row, int64_t column, int64_t item, const T* a, const T* b, int width) {
        Vector<S, kWidth> grad_a, grad_b;
        double sum_p = 0;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          T d_a = 0, d_b = 0, d_p = 0;
          if (j < width) {
            const Pair<T> x = source(row, column + j, a[j], b[j]);
            if (x.counted) {
              T factor = load<T>(out.grad_output, row, column + j) * static_cast<T>(scale) * x.weight;
              if (model.invalid(x.p, x.q)) factor = T(nan(""));
              model.gradient(x.a, x.b, x.p, x.q, d_a, d_b, d_p);
              d_a *= factor;
              d_b *= factor;
              d_p *= factor;
            }
            if (out.p) store(out.p, out.p_dtype, item + j, d_p);
          }
          sum_p += d_p;
          grad_a.item[j] = narrow<S>(d_a);
          grad_b.item[j] = narrow<S>(d_b);
        }
        sums[0] += sum_p;
        S* to_a = static_cast<S*>(out.a);
        S* to_b = static_cast<S*>(out.b);
        if (width == kWidth) {
          if (to_a) *reinterpret_cast<Vector<S, kWidth>*>(to_a + item) = grad_a;
          if (to_b) *reinterpret_cast<Vector<S, kWidth>*>(to_b + item) = grad_b;
        } else {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            if (j < width && to_a) to_a[item + j] = grad_a.item[j];
            if (j < width && to_b) to_b[item + j] = grad_b.item[j];
          }
        }
      });
  if (out.sum_p && grid_sum(sums, scratch)) store(out.p_total, out.p_dtype, 0, sums[0]);
}

inline bool is_packed(const Problem& problem, const Operand& operand) {
  return problem.plane.inner == problem.plane.items && operand.inner_stride == 1 &&
         reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
}

inline bool is_number(const Operand& operand) {
  return operand.data == nullptr || (operand.outer_stride == 0 && operand.inner_stride == 0);
}

inline bool is_plain(const Problem& problem) {
  return is_packed(problem, problem.a) && is_packed(problem, problem.b) && is_number(problem.p) &&
         is_number(problem.q) && is_number(problem.weight) && problem.mask.data == nullptr;
}

template <template <class> class Model>
void forward(const Problem& problem, const CudaForward& out, const CudaLaunch& launch) {
  const GridScratch scratch{launch.partials, launch.flags, launch.nonce};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    using S = decltype(storage);
    const auto kernel =
        is_plain(problem) ? &forward_kernel<Model<T>, T, S, 16 / sizeof(S)> : &forward_kernel<Model<T>, T, S, 1>;
    kernel<<<launch.blocks, kThreads, 0, stream>>>(problem, out, scratch);
  });
}

template <template <class> class Model>
void backward(const Problem& problem, const Gradients& out, const CudaLaunch& launch) {
  const GridScratch scratch{launch.partials, launch.flags, launch.nonce};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  with_rewards(problem.dtype, [&](auto acc, auto storage) {
    using T = decltype(acc);
    using S = decltype(storage);
    const auto kernel =
        is_plain(problem) ? &backward_kernel<Model<T>, T, S, 16 / sizeof(S)> : &backward_kernel<Model<T>, T, S, 1>;
    kernel<<<launch.blocks, kThreads, 0, stream>>>(problem, out, scratch);
  });
}

}  // namespace rewardfuse::cuda::pairwise
