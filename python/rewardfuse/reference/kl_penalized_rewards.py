"""KL-penalized rewards in plain torch; arguments as backends take them, formulas in ops/kl_penalized_rewards.py."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardfuse.reference.approx_kl import approx_kl, select


def kl_penalized_rewards(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    scores: Tensor | None,
    ended: Tensor | None,
    kl_coef: Tensor | None,
    kl_coef_value: float,
    missing_eos_penalty: float,
    score_low: float,
    score_high: float,
    estimator: int,
    gradient_estimator: int,
    input_low: float,
    input_high: float,
    output_low: float,
    output_high: float,
    one_past: bool,
    replace: bool,
    differentiable_rewards: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rewards ``[*, T]``, kl ``[*, T]``, sequence_kl ``[*]``, sequence_reward ``[*]``, stats ``[6]``)."""
    clamps = (input_low, input_high, output_low, output_high)
    kl = approx_kl(logprobs, ref_logprobs, None, mask, 1.0, estimator, gradient_estimator, *clamps)
    valid = torch.ones_like(kl, dtype=torch.bool) if mask is None else mask
    counted = valid.any(-1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and differentiable_rewards):
        last = _last(valid)
        place = _one_past(last) if one_past else last
        score = _token_scores(scores, kl, valid, place, counted, score_low, score_high)
        if ended is not None:
            missed = place & (counted & ~ended).unsqueeze(-1)
            score = torch.where(missed, (0 if replace else score) - missing_eos_penalty, score)
        beta = kl_coef_value if kl_coef is None else kl_coef.to(kl.dtype)
        penalty = beta * torch.where(valid & torch.as_tensor(beta != 0, device=kl.device), kl, 0)
        rewards = score - penalty
        sequence_reward = rewards.sum(-1, dtype=torch.float64).to(kl.dtype)
    sequence_kl = kl.sum(-1, dtype=torch.float64).to(kl.dtype)
    with torch.no_grad():
        tokens, sequences = valid.sum(), counted.sum()
        by_row = (sequence_kl, score.sum(-1), sequence_reward)
        means = [x.sum(dtype=torch.float64) / sequences.clamp(min=1) for x in by_row]
        mean_kl = kl.sum(dtype=torch.float64) / tokens.clamp(min=1)
        stats = torch.stack([mean_kl, *means, tokens.double(), sequences.double()]).to(kl.dtype)
    return rewards, kl, sequence_kl, sequence_reward, stats


def _last(valid: Tensor) -> Tensor:
    """Boolean ``[*, T]``: the last valid position of each row that has one."""
    later = valid.flip(-1).cumsum(-1).flip(-1)
    return valid & (later == 1)


def _one_past(last: Tensor) -> Tensor:
    """The position after the last one, or the last one where there is none after it."""
    moved = torch.nn.functional.pad(last, (1, 0))[..., : last.shape[-1]]
    return moved | (last & ~moved.any(-1, keepdim=True))


def _token_scores(
    scores: Tensor | None, kl: Tensor, valid: Tensor, place: Tensor, counted: Tensor, low: float, high: float
) -> Tensor:
    """Clamped scores in the kl's dtype, ``[*, T]``, each at its place and 0 elsewhere."""
    if scores is None:
        return torch.zeros_like(kl)
    if scores.dim() < kl.dim():
        scores = torch.where(counted, scores, 0).unsqueeze(-1)
        valid = place
    scores = select(valid, scores.to(kl.dtype).expand(kl.shape))
    return torch.where(valid, scores.clamp(low, high), 0)
