// The public ops, as bindings.cpp and the dispatcher see them; ops/<op>.py documents their arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace rewardfuse {

using OptionalTensor = std::optional<at::Tensor>;
using LossAndStats = std::tuple<at::Tensor, at::Tensor>;

LossAndStats bradley_terry_loss(const at::Tensor& chosen, const at::Tensor& rejected, const OptionalTensor& margin,
                                const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& target,
                                const OptionalTensor& normalizer, double margin_value, double weight_value,
                                double target_value, double normalizer_value, double label_smoothing, double beta,
                                double center_rewards_coefficient, int64_t reduction, bool return_stats);

at::Tensor bradley_terry_tie_loss(const at::Tensor& first, const at::Tensor& second, const OptionalTensor& outcome,
                                  const OptionalTensor& log_tie, const OptionalTensor& mask,
                                  const OptionalTensor& weight, const OptionalTensor& normalizer, double outcome_value,
                                  double log_tie_value, double weight_value, double normalizer_value, int64_t model,
                                  int64_t reduction);

// Codes of estimators: KlEstimator of kernels/approx_kl/math.h.
at::Tensor approx_kl(const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
                     const OptionalTensor& importance_weight, const OptionalTensor& mask,
                     double importance_weight_value, int64_t estimator, int64_t gradient_estimator, double input_low,
                     double input_high, double output_low, double output_high);

// order and the rest by item, [*, N] or packed [total]; position_weight and item_weight: u and v of
// kernels/plackett_luce/args.h.
at::Tensor plackett_luce_loss(const at::Tensor& scores, const OptionalTensor& order, const OptionalTensor& cu_seqlens,
                              const OptionalTensor& lengths, const OptionalTensor& mask, const OptionalTensor& top_k,
                              const OptionalTensor& position_weight, const OptionalTensor& item_weight,
                              const OptionalTensor& weight, const OptionalTensor& normalizer, int64_t top_k_value,
                              double weight_value, double normalizer_value, int64_t reduction);

at::Tensor all_pairs_loss(const at::Tensor& scores, const at::Tensor& labels, const OptionalTensor& lengths,
                          const OptionalTensor& mask, const OptionalTensor& margin, const OptionalTensor& weight,
                          const OptionalTensor& normalizer, double margin_value, double weight_value,
                          double normalizer_value, int64_t reduction);

// logprobs, ref_logprobs, kl, entropy by row, [*] or, where there is none, [0]; forward also gives the log-sum-exps of
// both models, in float64. direction: of kernels/token_logprobs/args.h; softcap 0: none.
using TokenLogprobsAndKl = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using TokenLogprobsSaved = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

TokenLogprobsAndKl token_logprobs_op(const at::Tensor& logits, const OptionalTensor& ref_logits,
                                     const at::Tensor& tokens, const OptionalTensor& mask,
                                     const OptionalTensor& temperature, double temperature_value, double softcap,
                                     c10::SymInt vocab_size, int64_t direction, bool entropy);

TokenLogprobsSaved token_logprobs_forward(const at::Tensor& logits, const OptionalTensor& ref_logits,
                                          const at::Tensor& tokens, const OptionalTensor& mask,
                                          const OptionalTensor& temperature, double temperature_value, double softcap,
                                          c10::SymInt vocab_size, int64_t direction, bool entropy);

// The gradient of the logits, which may be some columns of those that `lse` is of.
at::Tensor token_logprobs_backward(const OptionalTensor& grad_logprobs, const OptionalTensor& grad_kl,
                                   const OptionalTensor& grad_entropy, const at::Tensor& logits,
                                   const OptionalTensor& ref_logits, const at::Tensor& tokens,
                                   const OptionalTensor& mask, const OptionalTensor& temperature, const at::Tensor& kl,
                                   const at::Tensor& entropy, const at::Tensor& lse, const at::Tensor& ref_lse,
                                   double temperature_value, double softcap, c10::SymInt vocab_size, int64_t direction);

// rewards [*, T], kl [*, T], sequence_kl [*], sequence_reward [*], stats [6].
using Tensors5 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
Tensors5 kl_penalized_rewards(const at::Tensor& logprobs, const at::Tensor& ref_logprobs, const OptionalTensor& mask,
                              const OptionalTensor& scores, const OptionalTensor& ended, const OptionalTensor& kl_coef,
                              double kl_coef_value, double missing_eos_penalty, double score_low, double score_high,
                              int64_t estimator, int64_t gradient_estimator, double input_low, double input_high,
                              double output_low, double output_high, bool one_past, bool replace,
                              bool differentiable_rewards);

}  // namespace rewardfuse
