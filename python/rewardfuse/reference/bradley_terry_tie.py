"""Rao–Kupper and Davidson in plain torch; arguments as backends take them, formulas in ops/bradley_terry_tie.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewardfuse.ops._reduction import reduce
from rewardfuse.reference._pairs import select_pairs


def bradley_terry_tie_loss(
    first: Tensor,
    second: Tensor,
    outcome: Tensor | None,
    log_tie: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    normalizer: Tensor | None,
    outcome_value: float,
    log_tie_value: float,
    weight_value: float,
    normalizer_value: float,
    model: int,
    reduction: int,
) -> Tensor:
    """The loss."""
    pairs = select_pairs(
        first,
        second,
        log_tie_value if log_tie is None else log_tie,
        outcome_value if outcome is None else outcome,
        weight_value if weight is None else weight,
        mask,
    )
    losses = (_davidson if model == 1 else _rao_kupper)(pairs.a / 2 - pairs.b / 2, pairs.p, pairs.q)
    known = (pairs.q == 0) | (pairs.q == 0.5) | (pairs.q == 1)
    losses = torch.where(known | ~pairs.counted, losses, torch.nan)
    losses = torch.where(pairs.counted, pairs.weight * losses, torch.zeros_like(losses))
    return reduce(losses, pairs.valid, reduction, normalizer, normalizer_value)


def _rao_kupper(half: Tensor, log_tie: Tensor, outcome: Tensor) -> Tensor:
    above, below = log_tie + half * 2, log_tie - half * 2
    # −log(1 − e^{−2η}) is formed on ties alone: at η = 0 its gradient is infinite, and 0·inf would reach the others.
    is_tie = outcome == 0.5
    eta = torch.where(is_tie, log_tie, torch.ones_like(log_tie))
    rest = -torch.log(-torch.expm1(-2 * eta))
    tie = rest - logsigmoid(above) - logsigmoid(below)
    losses = torch.where(is_tie, tie, -logsigmoid(torch.where(outcome == 1, -below, -above)))
    return torch.where(log_tie >= 0, losses, torch.nan)


def _davidson(half: Tensor, log_tie: Tensor, outcome: Tensor) -> Tensor:
    weights = torch.stack([half, -half, log_tie])
    seen = torch.where(outcome == 1, half, torch.where(outcome == 0, -half, log_tie))
    return torch.logsumexp(weights - seen, 0)
