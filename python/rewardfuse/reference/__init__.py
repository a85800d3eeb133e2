"""The reference backend: plain differentiable torch. The fallback where nothing faster is built, and the baseline."""

from rewardfuse.reference.all_pairs import all_pairs_loss
from rewardfuse.reference.approx_kl import approx_kl
from rewardfuse.reference.bradley_terry import bradley_terry_loss
from rewardfuse.reference.bradley_terry_tie import bradley_terry_tie_loss
from rewardfuse.reference.kl_penalized_rewards import kl_penalized_rewards
from rewardfuse.reference.plackett_luce import plackett_luce_loss
from rewardfuse.reference.token_logprobs import _token_logprobs_backward, _token_logprobs_forward, token_logprobs

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
