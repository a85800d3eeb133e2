// The kernels behind a C interface: simt_set names the arguments of a call one by one, simt_run makes the call.
#include "all_pairs/args.h"
#include "arguments.h"
#include "kl_penalized_rewards/args.h"
#include "pairwise/kernels.h"
#include "plackett_luce/args.h"

#define SIMT_API extern "C" __attribute__((visibility("default")))

using namespace rewardfuse;

namespace {

Arguments arguments;
std::string error;

lists::Lists lists_of(Arguments& from) {
  lists::Lists lists;
  lists.count = from.integer("count");
  lists.size = from.integer("size");
  lists.scores = from.operand("scores");
  lists.dtype = lists.scores.dtype;
  lists.cu_seqlens = from.data<int64_t>("cu_seqlens");
  lists.lengths = from.data<int64_t>("lengths");
  lists.mask = from.operand("mask", 1);
  lists.weight = from.operand("weight", 1);
  return lists;
}

plackett_luce::Problem plackett_luce_of(Arguments& from) {
  plackett_luce::Problem problem;
  problem.lists = lists_of(from);
  problem.order = from.operand("order");
  problem.top_k = from.data<int64_t>("top_k");
  problem.top_k_value = from.integer("top_k_value");
  problem.position_weight = from.operand("position_weight", 1);
  problem.item_weight = from.operand("item_weight", 1);
  return problem;
}

all_pairs::Problem all_pairs_of(Arguments& from) {
  all_pairs::Problem problem;
  problem.lists = lists_of(from);
  problem.labels = from.operand("labels");
  problem.margin = from.operand("margin");
  return problem;
}

template <size_t count>
void options_of(Arguments& from, double (&options)[count]) {
  for (size_t i = 0; i < count; ++i) options[i] = from.number(("option_" + std::to_string(i)).c_str());
}

kl_rewards::Problem kl_rewards_of(Arguments& from) {
  kl_rewards::Problem problem;
  problem.rows = from.integer("rows");
  problem.size = from.integer("size");
  problem.logprobs = from.operand("logprobs");
  problem.dtype = problem.logprobs.dtype;
  problem.ref_logprobs = from.operand("ref_logprobs");
  problem.mask = from.operand("mask", 1);
  problem.scores = from.operand("scores");
  problem.ended = from.operand("ended", 1);
  problem.kl_coef = from.operand("kl_coef");
  problem.token_scores = from.number("token_scores") != 0;
  problem.one_past = from.number("one_past") != 0;
  problem.replace = from.number("replace") != 0;
  problem.missing_eos_penalty = from.number("missing_eos_penalty");
  problem.score_low = from.number("score_low");
  problem.score_high = from.number("score_high");
  options_of(from, problem.options);
  return problem;
}

pairwise::Problem pairs_of(Arguments& from) {
  pairwise::Problem problem;
  problem.plane = {from.integer("items"), from.integer("inner")};
  problem.a = from.operand("a");
  problem.b = from.operand("b");
  problem.dtype = problem.a.dtype;
  problem.p = from.operand("p");
  problem.q = from.operand("q");
  problem.weight = from.operand("weight", 1);
  problem.mask = from.operand("mask", 1);
  options_of(from, problem.options);
  problem.wants_stats = from.number("wants_stats") != 0;
  return problem;
}

// What both kinds of ops have; `Out` is the CudaForward or the Gradients of either.
template <class Out>
Out forward_of(Arguments& from) {
  Out out;
  out.reduction = static_cast<Reduction>(from.integer("reduction"));
  out.loss = from.data<void>("loss");
  out.denominator = from.data<double>("denominator");
  out.normalizer = from.operand("normalizer");
  return out;
}

template <class Out>
Out gradients_of(Arguments& from) {
  Out out;
  out.grad_output = from.operand("grad_output");
  out.denominator = from.data<double>("denominator");
  out.normalizer = from.operand("normalizer");
  return out;
}

template <const auto& kernels, auto problem_of>
void forward_lists(Arguments& from) {
  const auto problem = problem_of(from);
  auto out = forward_of<lists::CudaForward>(from);
  out.list_loss = from.data<void>("list_loss");
  out.saved = from.data<void>("saved");
  const CudaLaunch launch = from.launch();
  from.expect_none_left();
  kernels.forward(problem, out, launch);
}

template <const auto& kernels, auto problem_of>
void backward_lists(Arguments& from) {
  const auto problem = problem_of(from);
  auto out = gradients_of<lists::Gradients>(from);
  out.scores = from.data<void>("gradient");
  out.saved = from.data<void>("saved");
  out.list_loss = from.data<void>("list_loss");
  const CudaLaunch launch = from.launch();
  from.expect_none_left();
  kernels.backward(problem, out, launch);
}

template <const auto& kernels>
void forward_pairs(Arguments& from) {
  const auto problem = pairs_of(from);
  auto out = forward_of<pairwise::CudaForward>(from);
  out.stats = from.data<void>("stats");
  const CudaLaunch launch = from.launch();
  from.expect_none_left();
  kernels.forward(problem, out, launch);
}

template <const auto& kernels>
void backward_pairs(Arguments& from) {
  const auto problem = pairs_of(from);
  auto out = gradients_of<pairwise::Gradients>(from);
  out.scale = from.number("scale");
  out.a = from.data<void>("grad_a");
  out.b = from.data<void>("grad_b");
  const Operand p = from.operand("grad_p"), total = from.operand("p_total");
  out.sum_p = total.data != nullptr;
  out.p = const_cast<void*>(p.data);
  out.p_total = const_cast<void*>(total.data);
  out.p_dtype = out.sum_p ? total.dtype : p.dtype;
  const CudaLaunch launch = from.launch();
  from.expect_none_left();
  kernels.backward(problem, out, launch);
}

void forward_kl_rewards(Arguments& from) {
  const auto problem = kl_rewards_of(from);
  const kl_rewards::Results out{from.data<void>("rewards"), from.data<void>("kl"), from.data<void>("sequence_kl"),
                                from.data<void>("sequence_reward"), from.data<void>("stats")};
  const CudaLaunch launch = from.launch();
  from.expect_none_left();
  cuda::kl_penalized_rewards_kernels.forward(problem, out, launch);
}

void backward_kl_rewards(Arguments& from) {
  const auto problem = kl_rewards_of(from);
  kl_rewards::Gradients out;
  out.rewards = from.operand("grad_rewards");
  out.kl = from.operand("grad_kl");
  out.sequence_kl = from.operand("grad_sequence_kl");
  out.sequence_reward = from.operand("grad_sequence_reward");
  out.logprobs = from.data<void>("d_logprobs");
  out.scores = from.data<void>("d_scores");
  const CudaLaunch launch = from.launch();
  from.expect_none_left();
  cuda::kl_penalized_rewards_kernels.backward(problem, out, launch);
}

Call find(const std::string& name) {
  static const std::map<std::string, Call> calls = {
      {"plackett_luce_forward", &forward_lists<cuda::plackett_luce_kernels, &plackett_luce_of>},
      {"plackett_luce_backward", &backward_lists<cuda::plackett_luce_kernels, &plackett_luce_of>},
      {"all_pairs_forward", &forward_lists<cuda::all_pairs_kernels, &all_pairs_of>},
      {"all_pairs_backward", &backward_lists<cuda::all_pairs_kernels, &all_pairs_of>},
      {"kl_penalized_rewards_forward", &forward_kl_rewards},
      {"kl_penalized_rewards_backward", &backward_kl_rewards},
      {"approx_kl_forward", &forward_pairs<cuda::approx_kl>},
      {"approx_kl_backward", &backward_pairs<cuda::approx_kl>},
      {"bradley_terry_forward", &forward_pairs<cuda::bradley_terry>},
      {"bradley_terry_backward", &backward_pairs<cuda::bradley_terry>},
      {"rao_kupper_forward", &forward_pairs<cuda::rao_kupper>},
      {"rao_kupper_backward", &backward_pairs<cuda::rao_kupper>},
      {"davidson_forward", &forward_pairs<cuda::davidson>},
      {"davidson_backward", &backward_pairs<cuda::davidson>},
  };
  const auto found = calls.find(name);
  return found == calls.end() ? find_probe(name) : found->second;
}

}  // namespace

// A tensor with its two strides, as common/operand.h has it; or a number, where `data` is null.
SIMT_API void simt_set(const char* name, const void* data, int dtype, int64_t outer_stride, int64_t inner_stride,
                       double value) {
  arguments.set(name, {data, outer_stride, inner_stride, value, static_cast<DType>(dtype)});
}

// Makes the call with what was set since the last one. Returns null, or what went wrong.
SIMT_API const char* simt_run(const char* name) {
  error.clear();
  try {
    const Call call = find(name);
    if (!call) throw std::invalid_argument(std::string("unknown kernel ") + name);
    call(arguments);
  } catch (const std::exception& e) {
    error = e.what();
  }
  arguments.clear();
  return error.empty() ? nullptr : error.c_str();
}
