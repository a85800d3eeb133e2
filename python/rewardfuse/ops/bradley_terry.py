"""Bradley–Terry: the likelihood of preferring one response over another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rewardfuse import _backend
from rewardfuse.ops import _checks


class BradleyTerryStats(NamedTuple):
    """Means over the pairs that count (mask true, weight not 0), as 0-d tensors on the device; 0 where none counts.

    They come out of the forward pass itself and wait for nothing; reading one with ``.item()`` does.
    """

    accuracy: Tensor  #: share of pairs with chosen > rejected, strictly
    tie_rate: Tensor  #: share of pairs with chosen == rejected
    reward_margin: Tensor  #: mean of chosen − rejected
    chosen: Tensor  #: mean reward of the chosen responses
    rejected: Tensor  #: mean reward of the rejected responses


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float | None = None,
    *,
    mask: Tensor | None = None,
    weight: Tensor | float | None = None,
    target: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    beta: float = 1.0,
    center_rewards_coefficient: float = 0.0,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BradleyTerryStats]:
    r"""Negative log-likelihood of preferences under the Bradley–Terry model, in one pass each way.

    For each pair, with :math:`z = \beta (c - r) - m` and :math:`t = y(1 - ε) + (1 - y)ε`:

    .. math:: ℓ = w \, [-t \log σ(z) - (1 - t) \log σ(-z) + κ (c + r)^2]

    Args:
        chosen: rewards :math:`c` of the chosen responses, ``[*]``; float16, bfloat16, float32 or float64.
        rejected: rewards :math:`r` of the rejected responses; shape, dtype and device of ``chosen`` (under autocast the
            two dtypes may differ).
        margin: :math:`m`, by how much the chosen response should win; may want a gradient. Like ``weight`` and
            ``target``: a number, a 0-d tensor or exactly the shape of ``chosen``, of any real dtype.
        mask: boolean ``[*]``; where it is False a pair is not read, adds nothing, is not counted, and has gradient 0.
        weight: :math:`w`. A pair of weight 0 adds nothing and has gradient 0, whatever it holds, but is counted.
        target: :math:`y` in [0, 1], the probability that the chosen response is the better one; 1 by default.
        label_smoothing: :math:`ε` in [0, 0.5].
        beta: the scale :math:`β` > 0.
        center_rewards_coefficient: :math:`κ` ≥ 0, which pulls rewards towards mean 0.
        reduction: ``"mean"`` divides the sum by the number of pairs that the mask leaves (not by their weights), or by
            ``normalizer``; ``"sum"``; or ``"none"``, which returns ``[*]``. An empty mean is 0.
        normalizer: a positive number or 0-d tensor to divide by instead, such as a global batch size.
        return_stats: also return :class:`BradleyTerryStats`.

    Returns:
        The loss in nats, float32 (float64 for float64 rewards); with ``return_stats`` a pair (loss, stats).

    Gradients flow to ``chosen``, ``rejected`` and ``margin``, in their own dtypes, and may be differentiated again.
    The maths runs in float32 (float64 for float64); against float64 the loss of a pair is off by at most
    4e-7·max(1, ℓ) and its gradient by 3e-7 for float32 rewards up to ±1e4. A sum over many pairs is off by at
    most 5e-6 of itself. Backward keeps no tensor but the inputs.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that it cannot have.
        ValueError: a shape, device, option or range is wrong. Values of ``target`` are checked on CPU always and on a
            GPU under ``rewardfuse.checks(True)``; unchecked, a bad one makes its pair NaN.

    Sources: Bradley & Terry 1952; margin: Touvron et al. 2023 (Llama 2), eq. 2; centering: Eisenstein et al. 2023.

    >>> import torch, rewardfuse
    >>> chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([0.0, 1.0])
    >>> rewardfuse.bradley_terry_loss(chosen, rejected)
    tensor(0.5505)
    >>> loss, stats = rewardfuse.bradley_terry_loss(chosen, rejected, return_stats=True)
    >>> stats.accuracy
    tensor(0.5000)
    """
    # Written out rather than looped over: on 64 pairs this layer is a tenth of the step.
    if not (isinstance(chosen, Tensor) and isinstance(rejected, Tensor)):
        _checks.check_tensors(chosen=chosen, rejected=rejected)
    if chosen.dtype is not rejected.dtype:
        chosen, rejected = _checks.promote_under_autocast(chosen, rejected)
    if mask is not None or type(label_smoothing) is not float or type(beta) is not float:
        _checks.check_options(mask, label_smoothing=label_smoothing, beta=beta)
    if type(center_rewards_coefficient) is not float:
        _checks.check_options(None, center_rewards_coefficient=center_rewards_coefficient)
    margin_value, weight_value, target_value, normalizer_value = 0.0, 1.0, 1.0, 0.0
    if margin is not None:
        margin, margin_value = _checks.tensor_or_number("margin", margin, 0.0)
    if weight is not None:
        weight, weight_value = _checks.tensor_or_number("weight", weight, 1.0)
    if target is not None:
        target, target_value = _checks.tensor_or_number("target", target, 1.0)
    if normalizer is not None:
        normalizer, normalizer_value = _checks.normalizer_or_none(normalizer)
    code = _checks.REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if code is None:
        code = _checks.reduction_code(reduction)
    namespace = _backend.namespace_for(chosen)
    arguments = (
        chosen,
        rejected,
        margin,
        mask,
        weight,
        target,
        normalizer,
        margin_value,
        weight_value,
        target_value,
        normalizer_value,
        label_smoothing,
        beta,
        center_rewards_coefficient,
        code,
        return_stats,
    )
    if namespace is not _backend._C and not _backend.is_native(namespace):
        _check(*arguments)
    elif _backend._checks and not torch.compiler.is_compiling():
        _check_values(chosen, mask, weight, weight_value, target)
        _checks.check_normalizer_value(normalizer)
    loss, stats = namespace.bradley_terry_loss(*arguments)
    return (loss, BradleyTerryStats(*stats.unbind())) if return_stats else loss


def bradley_terry_log_prob(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float | None = None,
    *,
    mask: Tensor | None = None,
    weight: Tensor | float | None = None,
    target: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    beta: float = 1.0,
) -> Tensor:
    r"""Log-likelihood of each preference, :math:`t \log σ(z) + (1 - t) \log σ(-z)`, times its weight; 0 where masked.

    Arguments, shapes, dtypes, errors and source as in :func:`bradley_terry_loss`.

    Returns:
        ``[*]`` in nats, float32 (float64 for float64 rewards), differentiable.

    >>> import torch, rewardfuse
    >>> rewardfuse.bradley_terry_log_prob(torch.tensor([0.0]), torch.tensor([0.0]))
    tensor([-0.6931])
    """
    return -bradley_terry_loss(
        chosen,
        rejected,
        margin,
        mask=mask,
        weight=weight,
        target=target,
        label_smoothing=label_smoothing,
        beta=beta,
        reduction="none",
    )


class BradleyTerryLoss(torch.nn.Module):
    """:func:`bradley_terry_loss` as a module; the options are given once, the tensors at each call.

    >>> import torch, rewardfuse
    >>> criterion = rewardfuse.BradleyTerryLoss(label_smoothing=0.1)
    >>> criterion(torch.tensor([2.0]), torch.tensor([0.0]))
    tensor(0.3269)
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        beta: float = 1.0,
        center_rewards_coefficient: float = 0.0,
        reduction: str = "mean",
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        self.options = {
            "label_smoothing": label_smoothing,
            "beta": beta,
            "center_rewards_coefficient": center_rewards_coefficient,
            "reduction": reduction,
            "return_stats": return_stats,
        }

    def forward(
        self,
        chosen: Tensor,
        rejected: Tensor,
        margin: Tensor | float | None = None,
        *,
        mask: Tensor | None = None,
        weight: Tensor | float | None = None,
        target: Tensor | float | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, BradleyTerryStats]:
        """The loss of a batch; arguments as in :func:`bradley_terry_loss`."""
        tensors = {"mask": mask, "weight": weight, "target": target, "normalizer": normalizer}
        return bradley_terry_loss(chosen, rejected, margin, **tensors, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check(
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
) -> None:
    """What csrc/autograd/bradley_terry.cpp checks, in its order."""
    _checks.check_constants(weight=weight, target=target, normalizer=normalizer)
    _checks.check_number("target", 0 <= target_value <= 1, "from 0 to 1", target_value)
    _checks.check_number("label_smoothing", 0 <= label_smoothing <= 0.5, "from 0 to 0.5", label_smoothing)
    _checks.check_number("beta", 0 < beta < float("inf"), "positive and finite", beta)
    centered = 0 <= center_rewards_coefficient < float("inf")
    _checks.check_number("center_rewards_coefficient", centered, "finite and not negative", center_rewards_coefficient)
    _checks.check_pairs("chosen", chosen, "rejected", rejected, mask, margin=margin, target=target, weight=weight)
    _checks.check_normalizer(normalizer, normalizer_value, reduction, "chosen", chosen)
    if _checks.values_are_checked(chosen):
        _check_values(chosen, mask, weight, weight_value, target)


def _check_values(
    chosen: Tensor, mask: Tensor | None, weight: Tensor | None, weight_value: float, target: Tensor | None
):
    if target is not None:
        counted = _checks.counted_items(chosen, mask, weight, weight_value)
        _checks.check_values("target", target, (target >= 0) & (target <= 1), counted, "values from 0 to 1")
