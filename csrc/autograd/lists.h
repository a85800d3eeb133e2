// What the ops on lists share on torch's side: checks, how a kernel sees the tensors, threads.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <tuple>
#include <vector>

#include "autograd/reduction.h"
#include "common/check.h"
#include "common/parallel.h"
#include "lists/args.h"

namespace rewardfuse::lists {

struct Inputs {
  const at::Tensor& scores;          // [*, N], or packed [total]
  const OptionalTensor& cu_seqlens;  // [lists + 1] integers
  const OptionalTensor& lengths;     // [*] integers
  const OptionalTensor& mask;        // [*, N] bool
  const OptionalTensor& weight;      // [*] or []
  const OptionalTensor& normalizer;  // []
  double weight_value;
  double normalizer_value;
  Reduction reduction;

  // [*]: the lists' own shape.
  std::vector<c10::SymInt> shape() const;
  // The mean's denominator is the number of lists that the kernel counts.
  bool counts() const { return reduction == Reduction::kMean && !has_normalizer(normalizer, normalizer_value); }
};

// The checks of ops/_lists.py, in the same words.
void check_integers(const char* name, const at::Tensor& t);
void check_per_list(const char* name, const OptionalTensor& t, const Inputs& in, bool scalar);
void check_by_position(const char* name, const OptionalTensor& t, const at::Tensor& scores);
void check_items(const Inputs& in);
void check_weight(const Inputs& in);
void check_backward(const Inputs& in, const at::Tensor& grad_output, const at::Tensor& list_loss,
                    const at::Tensor& denominator);

// The lists as a kernel sees them. Keeps what had to be copied; checks the values of lengths and bounds on the CPU.
class View {
 public:
  explicit View(const Inputs& in);

  Lists lists;
  // An operand that comes once an item, or once a position for all lists; once a list.
  void per_item(Operand& operand, const at::Tensor& t);
  void per_list(Operand& operand, const at::Tensor& t);
  const int64_t* integers(const at::Tensor& t);  // [count], int64, contiguous

 private:
  std::vector<at::Tensor> kept_;
};

// Memory of one range. A thread keeps what lists of usual length need: given back after every range, its pages would be
// taken from the system and cleared anew each time, which cost half of the backward pass.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes <= kKept) {
      thread_local const std::unique_ptr<uint8_t[]> kept(new uint8_t[kKept]);
      data_ = kept.get();
    } else {
      own_.reset(new uint8_t[bytes]);
      data_ = own_.get();
    }
  }

  void* data() const { return data_; }

 private:
  static constexpr int64_t kKept = 1 << 18;
  std::unique_ptr<uint8_t[]> own_;
  uint8_t* data_;
};

// f(first list, end, scratch, totals) over ranges of lists of about one number of scores each.
template <class F>
Totals sum_over_lists(const Lists& lists, int64_t scratch_bytes, const F& f) {
  constexpr int64_t kSmallest = 8192, kLanes = 16;  // scores; lists that one pass takes side by side
  const auto run = [&](int64_t begin, int64_t end, Totals& totals) {
    if (begin == end) return;
    const Scratch scratch(scratch_bytes);
    f(begin, end, scratch.data(), totals);
  };
  const int64_t scores = lists.cu_seqlens ? lists.size : lists.count * lists.size;
  const int64_t ranges = std::clamp<int64_t>(scores / kSmallest, 1, kMostRanges);
  if (lists.cu_seqlens) {
    const auto bound = [&](int64_t i) {
      if (i >= ranges) return lists.count;
      const int64_t at = lists.size / ranges * i;
      return std::lower_bound(lists.cu_seqlens, lists.cu_seqlens + lists.count, at) - lists.cu_seqlens;
    };
    return sum_over_bounds<Totals>(ranges, bound, run);
  }
  int64_t length = (lists.count + ranges - 1) / ranges;
  if (lists.size <= 128) length = (length + kLanes - 1) / kLanes * kLanes;
  length = std::max<int64_t>(length, 1);
  const auto bound = [&](int64_t i) { return std::min(lists.count, i * length); };
  return sum_over_bounds<Totals>((lists.count + length - 1) / length, bound, run);
}

// What a forward returns, allocated: loss, list_loss [count] ([0] for "none"), denominator [] or [0].
struct Results {
  explicit Results(const Inputs& in);
  at::Tensor loss, list_loss, denominator;

  void* list_losses(const Inputs& in) const {
    return (in.reduction == Reduction::kNone ? loss : list_loss).mutable_data_ptr();
  }
  void write(const Inputs& in, const Totals& totals) const;  // on the CPU
  CudaForward cuda(const Inputs& in, void* saved) const;
};

// The factor of a list's gradient; on CUDA what the kernel needs to find it.
void set_scale(Gradients& out, const Inputs& in, const at::Tensor& list_loss, const at::Tensor& denominator);

// The two passes of an op on lists, whose Op has
//   Kernel(inputs)               .view and .problem: the tensors as its kernels see them
//   cpu()                        its CpuKernels
//   launch_forward, launch_backward
//   raise_invalid(inputs, problem)   names the first value that cannot be; slow, only on the way to an error
using Tensors4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// (loss, list_loss, saved, denominator); `saved` comes allocated.
template <class Op, class OpInputs>
Tensors4 forward(const OpInputs& in, const at::Tensor& saved) {
  const at::Tensor& scores = in.lists.scores;
  const Results results(in.lists);
  const Tensors4 out{results.loss, results.list_loss, saved, results.denominator};
  if (scores.is_meta()) return out;
  const typename Op::Kernel kernel(in);
  if (scores.is_cuda()) {
    Op::launch_forward(kernel.problem, results.cuda(in.lists, saved.mutable_data_ptr()), scores);
    return out;
  }
  const auto& cpu = Op::cpu();
  const Totals totals = sum_over_lists(kernel.problem.lists, cpu.scratch_bytes(kernel.problem),
                                       [&](int64_t begin, int64_t end, void* scratch, Totals& range) {
                                         cpu.forward(kernel.problem, begin, end, scratch, results.list_losses(in.lists),
                                                     saved.mutable_data_ptr(), range);
                                       });
  if (totals.invalid > 0) Op::raise_invalid(in, kernel.problem);
  results.write(in.lists, totals);
  return out;
}

// The gradient of the scores.
template <class Op, class OpInputs>
at::Tensor backward(const OpInputs& in, const at::Tensor& grad_output, const at::Tensor& list_loss,
                    const at::Tensor& saved, const at::Tensor& denominator) {
  const at::Tensor& scores = in.lists.scores;
  const at::Tensor gradient = at::empty_symint(scores.sym_sizes(), scores.options(), at::MemoryFormat::Contiguous);
  if (scores.is_meta()) return gradient;
  typename Op::Kernel kernel(in);
  Gradients out;
  out.scores = gradient.mutable_data_ptr();
  out.saved = saved.const_data_ptr();
  kernel.view.per_list(out.grad_output, grad_output);
  set_scale(out, in.lists, list_loss, denominator);
  if (scores.is_cuda()) {
    Op::launch_backward(kernel.problem, out, scores);
    return gradient;
  }
  const auto& cpu = Op::cpu();
  const Totals totals = sum_over_lists(kernel.problem.lists, cpu.scratch_bytes(kernel.problem),
                                       [&](int64_t begin, int64_t end, void* scratch, Totals& range) {
                                         cpu.backward(kernel.problem, out, begin, end, scratch, range);
                                       });
  if (totals.invalid > 0) Op::raise_invalid(in, kernel.problem);
  return gradient;
}

}  // namespace rewardfuse::lists

// The CUDA key is registered in every build: without CUDA kernels it says so by name.
#define REWARDFUSE_REGISTER_LIST_OP(name, forward_kernel, backward_kernel) \
  TORCH_LIBRARY_IMPL(rewardfuse, CPU, m) {                                 \
    m.impl(name "_forward", &forward_kernel);                              \
    m.impl(name "_backward", &backward_kernel);                            \
  }                                                                        \
  TORCH_LIBRARY_IMPL(rewardfuse, CUDA, m) {                                \
    m.impl(name "_forward", &forward_kernel);                              \
    m.impl(name "_backward", &backward_kernel);                            \
  }                                                                        \
  TORCH_LIBRARY_IMPL(rewardfuse, Meta, m) {                                \
    m.impl(name "_forward", &forward_kernel);                              \
    m.impl(name "_backward", &backward_kernel);                            \
  }
