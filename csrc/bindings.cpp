// The Python module rewardfuse._C: every public op and what the build knows of itself.
#include <torch/csrc/utils/pybind.h>

#include "autograd/ops.h"
#include "common/instruction_set.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  // As torch's own functions, ops let other Python threads run.
  using no_gil = py::call_guard<py::gil_scoped_release>;
  m.def("all_pairs_loss", &rewardfuse::all_pairs_loss, no_gil());
  m.def("approx_kl", &rewardfuse::approx_kl, no_gil());
  m.def("bradley_terry_loss", &rewardfuse::bradley_terry_loss, no_gil());
  m.def("bradley_terry_tie_loss", &rewardfuse::bradley_terry_tie_loss, no_gil());
  m.def("kl_penalized_rewards", &rewardfuse::kl_penalized_rewards, no_gil());
  m.def("plackett_luce_loss", &rewardfuse::plackett_luce_loss, no_gil());
  m.def("token_logprobs", &rewardfuse::token_logprobs_op, no_gil());
  m.def("_token_logprobs_forward", &rewardfuse::token_logprobs_forward, no_gil());
  m.def("_token_logprobs_backward", &rewardfuse::token_logprobs_backward, no_gil());

  m.attr("torch_version") = REWARDFUSE_TORCH_VERSION;
  m.attr("has_cuda") = static_cast<bool>(REWARDFUSE_WITH_CUDA);
  m.def("instruction_set", &rewardfuse::instruction_set_name);
  m.def("set_instruction_set", &rewardfuse::set_instruction_set);
}
