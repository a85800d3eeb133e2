"""Bradley–Terry in plain torch; arguments as backends take them, formula in ops/bradley_terry.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewardfuse.ops._reduction import reduce
from rewardfuse.reference._pairs import Pairs, select_pairs


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    target: Tensor | None,
    normalizer: Tensor | None,
    margin_value: float,
    weight_value: float,
    target_value: float,
    normalizer_value: float,
    label_smoothing: float,
    beta: float,
    center_rewards_coefficient: float,
    reduction: int,
    return_stats: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, stats ``[5]`` or ``[0]``)."""
    pairs = select_pairs(
        chosen,
        rejected,
        margin_value if margin is None else margin,
        target_value if target is None else target,
        weight_value if weight is None else weight,
        mask,
    )
    z = (pairs.a / 2 - pairs.b / 2) * (2 * beta) - pairs.p
    t = pairs.q * (1 - 2 * label_smoothing) + label_smoothing
    t = torch.where((pairs.q >= 0) & (pairs.q <= 1), t, torch.nan)
    losses = _side(t, z) + _side(1 - t, -z)
    if center_rewards_coefficient != 0:
        half_sum = pairs.a / 2 + pairs.b / 2
        losses = losses + (half_sum * (4 * center_rewards_coefficient)) * half_sum
    losses = torch.where(pairs.counted, pairs.weight * losses, torch.zeros_like(losses))
    loss = reduce(losses, pairs.valid, reduction, normalizer, normalizer_value)
    return loss, _stats(pairs) if return_stats else loss.new_empty(0)


def _side(probability: Tensor, x: Tensor) -> Tensor:
    """−probability · log σ(x), and 0 where the probability is 0, whatever x is."""
    possible = probability != 0
    return torch.where(possible, -probability * logsigmoid(torch.where(possible, x, torch.zeros_like(x))), probability)


def _stats(pairs: Pairs) -> Tensor:
    with torch.no_grad():
        a, b, counted = pairs.a, pairs.b, pairs.counted
        sums = torch.stack(
            [
                ((a > b) & counted).sum(dtype=torch.float64),
                ((a == b) & counted).sum(dtype=torch.float64),
                a.sum(dtype=torch.float64) - b.sum(dtype=torch.float64),
                a.sum(dtype=torch.float64),
                b.sum(dtype=torch.float64),
            ]
        )
        return (sums / counted.sum().clamp(min=1)).to(a.dtype)
