// rewardfuse::token_logprobs; the maths is in kernels/token_logprobs/math.h. CPU alone: Triton serves the GPU.
#include "autograd/token_logprobs.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace rewardfuse::token_logprobs {
namespace {

TokenLogprobsSaved forward(const Inputs& in, bool entropy) {
  check(in);
  const auto options = loss_options(in.logits);
  const auto make = [&](bool wanted, const at::TensorOptions& like) {
    return wanted ? at::empty_symint(in.shape(), like) : at::empty({0}, like);
  };
  const bool ref = present(in.ref_logits);
  const at::Tensor logprobs = make(true, options), ref_logprobs = make(ref, options), kl = make(ref, options);
  const at::Tensor entropies = make(entropy, options);
  // In float32 a log-sum-exp far from 0 would lose what the gradient needs.
  const at::Tensor lse = make(true, options.dtype(at::kDouble)), ref_lse = make(ref, options.dtype(at::kDouble));
  const TokenLogprobsSaved out{logprobs, ref_logprobs, kl, entropies, lse, ref_lse};
  if (in.logits.is_meta()) return out;
  const Kernel kernel(in);
  kernel.check_temperature();
  kernel.check_tokens();
  const auto data = [](const at::Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr() : nullptr; };
  const auto numbers = [](const at::Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr<double>() : nullptr; };
  const Results results{data(logprobs, true),     data(ref_logprobs, ref), data(kl, ref),
                        data(entropies, entropy), numbers(lse, true),      numbers(ref_lse, ref)};
  kernel.for_rows(
      [&](int64_t begin, int64_t end) { token_logprobs_kernels_cpu().forward(kernel.problem, results, begin, end); });
  return out;
}

struct Saved {
  const at::Tensor &kl, &entropy, &lse, &ref_lse;  // [*], or [0] where forward had none
};

struct Incoming {
  const OptionalTensor &logprobs, &kl, &entropy;  // [*] each
};

void check_saved(const char* name, const at::Tensor& t, const Inputs& in) {
  TORCH_CHECK_VALUE(
      t.sym_sizes() == in.shape() && at::isFloatingType(t.scalar_type()) && t.device() == in.logits.device(), name,
      ": expected the tensor that forward returned");
}

void check_backward(const Inputs& in, const Incoming& incoming, const Saved& saved) {
  const auto check_gradient = [&](const char* name, const OptionalTensor& t) {
    if (present(t)) check_like(name, *t, "tokens", in.tokens);
  };
  check_gradient("grad_logprobs", incoming.logprobs);
  check_gradient("grad_kl", incoming.kl);
  check_gradient("grad_entropy", incoming.entropy);
  check_saved("lse", saved.lse, in);
  if (present(incoming.entropy)) check_saved("entropy", saved.entropy, in);
  if (!present(incoming.kl)) return;
  TORCH_CHECK_VALUE(present(in.ref_logits), "grad_kl: expected ref_logits with it");
  check_saved("kl", saved.kl, in);
  check_saved("ref_lse", saved.ref_lse, in);
}

at::Tensor backward(const Inputs& in, const Incoming& incoming, const Saved& saved) {
  check(in);
  check_backward(in, incoming, saved);
  const at::Tensor gradient =
      at::empty_symint(in.logits.sym_sizes(), in.logits.options(), at::MemoryFormat::Contiguous);
  if (in.logits.is_meta()) return gradient;
  const Kernel kernel(in);
  kernel.check_temperature();
  const auto rows = [&](const OptionalTensor& t) { return by_row(t, in.tokens); };
  const auto saved_rows = [&](const at::Tensor& t, bool wanted) { return wanted ? rows(t) : at::Tensor(); };
  const bool by_kl = present(incoming.kl), by_entropy = present(incoming.entropy);
  const at::Tensor tensors[] = {rows(incoming.logprobs),
                                rows(incoming.kl),
                                rows(incoming.entropy),
                                saved_rows(saved.kl, by_kl),
                                saved_rows(saved.entropy, by_entropy),
                                rows(saved.lse),
                                saved_rows(saved.ref_lse, by_kl)};
  const auto data = [&](int i) { return data_or_null<double>(tensors[i]); };
  Gradients out{data(0), data(1), data(2), data(3), data(4), data(5), data(6)};
  out.logits = gradient.mutable_data_ptr();
  out.width = in.logits.size(-1);
  out.streams = prepare_large(gradient);
  kernel.for_rows(
      [&](int64_t begin, int64_t end) { token_logprobs_kernels_cpu().backward(kernel.problem, out, begin, end); });
  return gradient;
}

#define RF_INPUTS                                                                                    \
  token_logprobs::Inputs {                                                                           \
    logits, ref_logits, tokens, mask, temperature, temperature_value, softcap, vocab_size, direction \
  }

class TokenLogprobs : public torch::autograd::Function<TokenLogprobs> {
 public:
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;
  static constexpr int kArguments = 10, kTensors = 5;

  static Variables forward(Context* ctx, const at::Tensor& logits, const OptionalTensor& ref_logits,
                           const at::Tensor& tokens, const OptionalTensor& mask, const OptionalTensor& temperature,
                           double temperature_value, double softcap, const c10::SymInt& vocab_size, int64_t direction,
                           bool wants_entropy) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rewardfuse::_token_logprobs_forward", "")
                               .typed<decltype(token_logprobs_forward)>();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [logprobs, ref_logprobs, kl, entropy, lse, ref_lse] =
        op.call(logits, ref_logits, tokens, mask, temperature, temperature_value, softcap, vocab_size, direction,
                wants_entropy);
    const auto keep = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    ctx->save_for_backward(
        {logits, keep(ref_logits), tokens, keep(mask), keep(temperature), kl, entropy, lse, ref_lse});
    ctx->saved_data["temperature_value"] = temperature_value;
    ctx->saved_data["softcap"] = softcap;
    ctx->saved_data["vocab_size"] = vocab_size;
    ctx->saved_data["direction"] = direction;
    ctx->saved_data["wants_entropy"] = wants_entropy;
    ctx->set_materialize_grads(false);
    Variables constants{ref_logprobs};
    if (!present(ref_logits)) constants.push_back(kl);
    if (!wants_entropy) constants.push_back(entropy);
    ctx->mark_non_differentiable(constants);
    return {logprobs, ref_logprobs, kl, entropy};
  }

  static Variables backward(Context* ctx, Variables grad_outputs) {
    Variables gradients(kArguments);
    const auto given = [&](int i) {
      return grad_outputs[i].defined() ? OptionalTensor(grad_outputs[i]) : std::nullopt;
    };
    const OptionalTensor grad_logprobs = given(0), grad_kl = given(2), grad_entropy = given(3);
    if (!grad_logprobs && !grad_kl && !grad_entropy) return gradients;
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                                "token_logprobs: a second derivative (create_graph=True) is not implemented");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rewardfuse::_token_logprobs_backward", "")
                               .typed<decltype(token_logprobs_backward)>();
    const auto t = ctx->get_saved_variables();
    const auto optional = [&](int i) { return t[i].defined() ? OptionalTensor(t[i]) : std::nullopt; };
    at::AutoDispatchBelowADInplaceOrView guard;
    gradients[0] = op.call(grad_logprobs, grad_kl, grad_entropy, t[0], optional(1), t[2], optional(3), optional(4),
                           t[kTensors], t[kTensors + 1], t[kTensors + 2], t[kTensors + 3],
                           ctx->saved_data["temperature_value"].toDouble(), ctx->saved_data["softcap"].toDouble(),
                           ctx->saved_data["vocab_size"].toSymInt(), ctx->saved_data["direction"].toInt());
    return gradients;
  }
};

}  // namespace
}  // namespace rewardfuse::token_logprobs

namespace rewardfuse {

TokenLogprobsAndKl token_logprobs_op(const at::Tensor& logits, const OptionalTensor& ref_logits,
                                     const at::Tensor& tokens, const OptionalTensor& mask,
                                     const OptionalTensor& temperature, double temperature_value, double softcap,
                                     c10::SymInt vocab_size, int64_t direction, bool entropy) {
  const auto out = token_logprobs::TokenLogprobs::apply(logits, ref_logits, tokens, mask, temperature,
                                                        temperature_value, softcap, vocab_size, direction, entropy);
  return {out[0], out[1], out[2], out[3]};
}

TokenLogprobsSaved token_logprobs_forward(const at::Tensor& logits, const OptionalTensor& ref_logits,
                                          const at::Tensor& tokens, const OptionalTensor& mask,
                                          const OptionalTensor& temperature, double temperature_value, double softcap,
                                          c10::SymInt vocab_size, int64_t direction, bool entropy) {
  return token_logprobs::forward(RF_INPUTS, entropy);
}

at::Tensor token_logprobs_backward(const OptionalTensor& grad_logprobs, const OptionalTensor& grad_kl,
                                   const OptionalTensor& grad_entropy, const at::Tensor& logits,
                                   const OptionalTensor& ref_logits, const at::Tensor& tokens,
                                   const OptionalTensor& mask, const OptionalTensor& temperature, const at::Tensor& kl,
                                   const at::Tensor& entropy, const at::Tensor& lse, const at::Tensor& ref_lse,
                                   double temperature_value, double softcap, c10::SymInt vocab_size,
                                   int64_t direction) {
  return token_logprobs::backward(RF_INPUTS, {grad_logprobs, grad_kl, grad_entropy}, {kl, entropy, lse, ref_lse});
}

TORCH_LIBRARY_FRAGMENT(rewardfuse, m) {
  m.def(
      "token_logprobs(Tensor logits, Tensor? ref_logits, Tensor tokens, Tensor? mask, Tensor? temperature, "
      "float temperature_value, float softcap, SymInt vocab_size, int direction, bool entropy) "
      "-> (Tensor logprobs, Tensor ref_logprobs, Tensor kl, Tensor entropy)",
      &token_logprobs_op);
  m.def(
      "_token_logprobs_forward(Tensor logits, Tensor? ref_logits, Tensor tokens, Tensor? mask, Tensor? temperature, "
      "float temperature_value, float softcap, SymInt vocab_size, int direction, bool entropy) "
      "-> (Tensor logprobs, Tensor ref_logprobs, Tensor kl, Tensor entropy, Tensor lse, Tensor ref_lse)");
  m.def(
      "_token_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_kl, Tensor? grad_entropy, Tensor logits, "
      "Tensor? ref_logits, Tensor tokens, Tensor? mask, Tensor? temperature, Tensor kl, Tensor entropy, Tensor lse, "
      "Tensor ref_lse, float temperature_value, float softcap, SymInt vocab_size, int direction) -> Tensor");
}

// The CUDA key says by name that there is no kernel.
#define RF_REGISTER(key)                                          \
  TORCH_LIBRARY_IMPL(rewardfuse, key, m) {                        \
    m.impl("_token_logprobs_forward", &token_logprobs_forward);   \
    m.impl("_token_logprobs_backward", &token_logprobs_backward); \
  }
RF_REGISTER(CPU)
RF_REGISTER(CUDA)
RF_REGISTER(Meta)
#undef RF_REGISTER

}  // namespace rewardfuse
