// Between torch and the kernels of token_logprobs: checks, and tensors as the kernels see them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>

#include "autograd/ops.h"
#include "autograd/reduction.h"
#include "token_logprobs/args.h"

namespace rewardfuse::token_logprobs {

struct Inputs {
  const at::Tensor& logits;           // [*, V]
  const OptionalTensor& ref_logits;   // [*, V]
  const at::Tensor& tokens;           // [*] integers
  const OptionalTensor& mask;         // [*] bool
  const OptionalTensor& temperature;  // [*] or []
  double temperature_value, softcap;
  const c10::SymInt& vocab_size;
  int64_t direction;

  c10::SymIntArrayRef shape() const { return logits.sym_sizes().slice(0, logits.dim() - 1); }
};

inline void check_logits(const Inputs& in) {
  check_rewards("logits", in.logits);
  TORCH_CHECK_VALUE(in.logits.dim() > 0, "logits: expected a tensor [*, V], got a 0-d tensor");
  if (present(in.ref_logits)) {
    check_like("ref_logits", *in.ref_logits, "logits", in.logits);
    TORCH_CHECK_TYPE(in.ref_logits->scalar_type() == in.logits.scalar_type(),
                     "ref_logits: expected the dtype of logits, ", dtype_name(in.logits), ", got ",
                     dtype_name(*in.ref_logits));
    TORCH_CHECK_VALUE(in.direction == 1 || in.direction == 2,
                      "direction: expected 1 (reverse) or 2 (forward) with ref_logits, got ", in.direction);
  } else {
    TORCH_CHECK_VALUE(in.direction == 0, "direction: expected 0 (none) without ref_logits, got ", in.direction);
  }
}

inline void check(const Inputs& in) {
  check_logits(in);
  TORCH_CHECK_TYPE(at::isIntegralType(in.tokens.scalar_type(), /*includeBool=*/false),
                   "tokens: expected a tensor of an integer dtype, got ", dtype_name(in.tokens));
  TORCH_CHECK_VALUE(in.tokens.sym_sizes() == in.shape(),
                    "tokens: expected the shape of logits without its last dimension, ", in.shape(), ", got ",
                    in.tokens.sym_sizes());
  TORCH_CHECK_VALUE(in.tokens.device() == in.logits.device(), "tokens: expected the device of logits, ",
                    in.logits.device(), ", got ", in.tokens.device());
  if (present(in.mask)) {
    TORCH_CHECK_TYPE(in.mask->scalar_type() == at::kBool, "mask: expected a tensor of torch.bool, got ",
                     dtype_name(*in.mask));
    check_like("mask", *in.mask, "tokens", in.tokens);
  }
  check_constant("temperature", in.temperature);
  check_per_item("temperature", in.temperature, "tokens", in.tokens);
  TORCH_CHECK_VALUE(in.temperature_value > 0 && std::isfinite(in.temperature_value),
                    "temperature: expected positive and finite, got ", in.temperature_value);
  TORCH_CHECK_VALUE(in.softcap >= 0 && std::isfinite(in.softcap), "logit_softcap: expected positive and finite, got ",
                    in.softcap);
  const c10::SymInt size = in.logits.sym_size(-1);
  TORCH_CHECK_VALUE(in.vocab_size >= 1 && in.vocab_size <= size, "vocab_size: expected from 1 to ", size, ", got ",
                    in.vocab_size);
  TORCH_CHECK_NOT_IMPLEMENTED(!in.logits.is_cuda(),
                              "token_logprobs: there is no native CUDA kernel; Triton serves the GPU "
                              "(rewardfuse.kernels)");
}

// [*] numbers as float64, one after the other; undefined where there are none.
inline at::Tensor by_row(const OptionalTensor& t, const at::Tensor& tokens) {
  return present(t) ? t->detach().to(at::kDouble).expand(tokens.sizes()).contiguous() : at::Tensor();
}

template <class T>
const T* data_or_null(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

// The rows of a tensor [*, V]: its leading dimensions as at most two strided ones. A layout that needs more, or whose
// last stride is not 1, is made contiguous first.
inline Matrix rows_of(at::Tensor& t) {
  const auto lay = [&](Matrix& matrix) {
    int64_t groups = 0, next_stride = 0;
    matrix = {t.const_data_ptr(), 1, 0, 0};
    for (int64_t d = t.dim() - 2; d >= 0; --d) {
      if (t.size(d) == 1) continue;
      if (groups == 0 || t.stride(d) != next_stride) {
        if (++groups > 2) return false;
        (groups == 1 ? matrix.inner_stride : matrix.outer_stride) = t.stride(d);
      }
      if (groups == 1) matrix.inner *= t.size(d);
      next_stride = t.stride(d) * t.size(d);
    }
    return t.stride(-1) == 1 || t.size(-1) == 1;
  };
  Matrix matrix;
  if (lay(matrix)) return matrix;
  t = t.contiguous();
  lay(matrix);
  return matrix;
}

// The tensors as a kernel sees them; keeps what had to be copied.
struct Kernel {
  explicit Kernel(const Inputs& in)
      : tokens(in.tokens.to(at::kLong).contiguous()),
        mask(present(in.mask) ? in.mask->contiguous() : at::Tensor()),
        temperature(by_row(in.temperature, in.tokens)),
        logits(in.logits),
        rows(in.tokens.numel()) {
    problem.dtype = *kernel_dtype(logits.scalar_type());
    problem.columns = in.vocab_size.guard_int(__FILE__, __LINE__);
    problem.direction = static_cast<Direction>(in.direction);
    problem.tokens = tokens.const_data_ptr<int64_t>();
    problem.mask = data_or_null<bool>(mask);
    problem.temperature = data_or_null<double>(temperature);
    problem.temperature_value = in.temperature_value;
    problem.softcap = in.softcap;
    problem.logits = rows_of(logits);
    if (!present(in.ref_logits)) return;
    ref_logits = *in.ref_logits;
    problem.ref = rows_of(ref_logits);
  }

  void check_temperature() const {
    for (int64_t i = 0; problem.temperature && i < rows; ++i) {
      const double value = problem.temperature[i];
      TORCH_CHECK_VALUE(!problem.counts(i) || (value > 0 && std::isfinite(value)),
                        "temperature: expected positive and finite, got ", value, " at index ", i);
    }
  }

  void check_tokens() const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = problem.tokens[i];
      TORCH_CHECK_VALUE(!problem.counts(i) || (token >= 0 && token < problem.columns), "tokens: expected from 0 to ",
                        problem.columns - 1, ", got ", token, " at index ", i);
    }
  }

  // Splits the rows over threads; a row's bits do not depend on how.
  template <class F>
  void for_rows(const F& f) const {
    constexpr int64_t kSmallest = 32768;  // elements, to be worth a thread
    at::parallel_for(0, rows, std::max<int64_t>(1, kSmallest / problem.columns), f);
  }

  at::Tensor tokens, mask, temperature, logits, ref_logits;
  int64_t rows;
  Problem problem;
};

// Prepares memory that a kernel is about to write for the first time; true where it is larger than the caches. Such an
// allocation comes as fresh pages: in huge ones they take a third of the time.
inline bool prepare_large(const at::Tensor& t) {
  constexpr size_t kLarge = size_t{32} << 20;
  if (t.nbytes() < kLarge) return false;
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + t.nbytes();
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: nothing depends on it
#endif
  return true;
}

}  // namespace rewardfuse::token_logprobs
