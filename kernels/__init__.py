"""The Triton backend: the same differentiable functions as rewardfuse._C and rewardfuse.reference."""

from rewardfuse.kernels.all_pairs.launch import all_pairs_loss
from rewardfuse.kernels.approx_kl.triton import approx_kl
from rewardfuse.kernels.bradley_terry.triton import bradley_terry_loss
from rewardfuse.kernels.bradley_terry_tie.triton import bradley_terry_tie_loss
from rewardfuse.kernels.kl_penalized_rewards.launch import kl_penalized_rewards
from rewardfuse.kernels.plackett_luce.launch import plackett_luce_loss
from rewardfuse.kernels.token_logprobs.launch import (
    _token_logprobs_backward,
    _token_logprobs_forward,
    token_logprobs,
)

__all__ = [
    "_token_logprobs_backward",
    "_token_logprobs_forward",
    "all_pairs_loss",
    "approx_kl",
    "bradley_terry_loss",
    "bradley_terry_tie_loss",
    "kl_penalized_rewards",
    "plackett_luce_loss",
    "token_logprobs",
]
