"""What the cases of ``rewardfuse bench kl_rewards`` compute: this library's calls, and plain torch written with care.

Each returns the KL of each token first, then what else comes of the same pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rewardfuse
from rewardfuse import KLRewards

KL_COEF, SCORE_CLIP = 0.05, 5.0


def averaged(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The same with the mean KL, a 0-d loss, in place of the KL of each token."""

    def loss_and_rest(*tensors: Tensor) -> tuple[Tensor, ...]:
        kl, *rest = function(*tensors)
        return (kl.mean(), *rest)

    return loss_and_rest


def fused_logits(estimator: str) -> Callable[..., tuple[Tensor, ...]]:
    """This library's call from logits."""

    def call(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        options = {"kl_coef": KL_COEF, "estimator": estimator}
        return _parts(rewardfuse.kl_penalized_rewards_from_logits(logits, ref_logits, tokens, **options))

    return call


def fused_hidden(estimator: str) -> Callable[..., tuple[Tensor, ...]]:
    """This library's call from hidden states."""

    def call(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, tokens: Tensor) -> Any:
        options = {"kl_coef": KL_COEF, "estimator": estimator}
        heads = (hidden, weight, ref_hidden, ref_weight)
        return _parts(rewardfuse.kl_penalized_rewards_from_hidden(*heads, tokens, **options))

    return call


def _parts(result: KLRewards) -> tuple[Tensor, ...]:
    return result.kl, result.rewards, result.logprobs, result.ref_logprobs


def plain_full(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """KL(π‖π_ref) over the vocabulary; its log-softmaxes serve the tokens' log-probs too."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    return kl, -KL_COEF * kl.detach(), _taken(logp, tokens), _taken(ref_logp, tokens)


def plain_full_forward(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """KL(π_ref‖π)."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    kl = (ref_logp.exp() * (ref_logp - logp)).sum(-1)
    return kl, -KL_COEF * kl.detach(), _taken(logp, tokens), _taken(ref_logp, tokens)


def plain_k3(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """k3 of the taken tokens; log-sum-exps, so that no log-softmax of the vocabulary's size is kept."""
    return k3_rewards(_logprobs(logits.float(), tokens), _logprobs(ref_logits.float(), tokens))


def k3_rewards(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, ...]:
    """What is left to do once the log-probs are there."""
    x = logprobs - ref_logprobs
    kl = torch.expm1(-x) + x
    return kl, -KL_COEF * kl.detach(), logprobs, ref_logprobs


def _taken(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return _taken(logits, tokens) - logits.logsumexp(-1)


def from_hidden(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """A function of logits as one of hidden states, by whole logits."""

    def call(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, tokens: Tensor) -> Any:
        return function(hidden @ weight.t(), ref_hidden @ ref_weight.t(), tokens)

    return call


def fused_shaping(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, scores: Tensor) -> tuple[Any, ...]:
    """This library's call from log-probs."""
    options = {"scores": scores, "kl_coef": KL_COEF, "estimator": "k3", "score_clip": SCORE_CLIP}
    result = rewardfuse.kl_penalized_rewards(logprobs, ref_logprobs, mask, **options)
    return result.kl, result.rewards, result.sequence_kl, result.sequence_reward, result.stats


def plain_shaping(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, scores: Tensor) -> tuple[Any, ...]:
    """As trainers write it: k3, the mask by selection, the clipped score at the last valid token, and the means that
    they log."""
    x = logprobs - ref_logprobs
    kl = torch.where(mask, torch.expm1(-x) + x, 0.0)
    last = torch.where(mask, torch.arange(mask.shape[-1], device=mask.device), 0).amax(-1, keepdim=True)
    scores = scores.clamp(-SCORE_CLIP, SCORE_CLIP)
    rewards = (-KL_COEF * kl).scatter_add(-1, last, scores.unsqueeze(-1))
    sequence_kl, sequence_reward = kl.sum(-1), rewards.sum(-1)
    tokens = mask.sum()
    stats = (sequence_kl.sum() / tokens, sequence_kl.mean(), scores.mean(), sequence_reward.mean(), tokens)
    return kl, rewards, sequence_kl, sequence_reward, stats
