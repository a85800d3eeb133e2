"""Bradley–Terry with ties: Rao–Kupper and Davidson."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardfuse import _backend
from rewardfuse.ops import _checks

MODELS = {"rao_kupper": 0, "davidson": 1}


def bradley_terry_tie_loss(
    first: Tensor,
    second: Tensor,
    outcome: Tensor | float,
    *,
    log_tie: Tensor | float,
    model: str = "rao_kupper",
    mask: Tensor | None = None,
    weight: Tensor | float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Negative log-likelihood of comparisons that may end in a tie, in one pass each way.

    With :math:`d = r_1 - r_2`:

    - ``"rao_kupper"``, :math:`η = \log θ` = ``log_tie`` ≥ 0: the first wins with probability :math:`σ(d - η)`, the
      second with :math:`σ(-d - η)`, and a tie takes the rest,
      :math:`(θ^2 - 1) e^{r_1 + r_2} / [(e^{r_1} + θ e^{r_2})(θ e^{r_1} + e^{r_2})]`. At η = 0 a tie is impossible:
      its loss is inf.
    - ``"davidson"``, :math:`λ = \log ν` = ``log_tie``: the three probabilities are proportional to :math:`e^{r_1}`,
      :math:`e^{r_2}` and :math:`ν e^{(r_1 + r_2)/2}`.

    Args:
        first: rewards :math:`r_1`, ``[*]``; float16, bfloat16, float32 or float64.
        second: rewards :math:`r_2`; shape, dtype and device of ``first``.
        outcome: 1 where the first wins, 0.5 for a tie, 0 where the second wins; a number, a 0-d tensor or ``[*]``, of
            any real dtype.
        log_tie: how easily comparisons tie, in nats; a number, a 0-d tensor or ``[*]``; may want a gradient.
        model: ``"rao_kupper"`` or ``"davidson"``.
        mask, weight, reduction, normalizer: as in :func:`rewardfuse.bradley_terry_loss`.

    Returns:
        The loss in nats, float32 (float64 for float64 rewards).

    Gradients flow to ``first``, ``second`` and ``log_tie``; a second derivative raises NotImplementedError. Against
    float64 the loss of a pair is off by at most 1e-6·max(1, ℓ) for float32 rewards up to ±1e4.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that it cannot have.
        ValueError: a shape, device, option or range is wrong. Values of ``outcome`` and ``log_tie`` are checked on CPU
            always and on a GPU under ``rewardfuse.checks(True)``; unchecked, a bad one makes its pair NaN.

    Sources: Rao & Kupper 1967, J. Amer. Statist. Assoc. 62; Davidson 1970, J. Amer. Statist. Assoc. 65.

    >>> import torch, rewardfuse
    >>> first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    >>> rewardfuse.bradley_terry_tie_loss(first, second, torch.tensor([1.0, 0.5]), log_tie=0.5)
    tensor(0.9405)
    """
    _checks.check_tensors(first=first, second=second)
    first, second = _checks.promote_under_autocast(first, second)
    _checks.check_options(mask)
    for name, value in (("outcome", outcome), ("log_tie", log_tie)):
        if value is None:
            raise TypeError(f"{name}: expected a number or a tensor, got NoneType")
    outcome, outcome_value = _checks.tensor_or_number("outcome", outcome, 1.0)
    log_tie, log_tie_value = _checks.tensor_or_number("log_tie", log_tie, 0.0)
    weight, weight_value = _checks.tensor_or_number("weight", weight, 1.0)
    normalizer, normalizer_value = _checks.normalizer_or_none(normalizer)
    if not isinstance(model, str) or model not in MODELS:
        raise ValueError(f'model: expected "rao_kupper" or "davidson", got {model!r}')
    namespace = _backend.namespace_for(first)
    arguments = (
        first,
        second,
        outcome,
        log_tie,
        mask,
        weight,
        normalizer,
        outcome_value,
        log_tie_value,
        weight_value,
        normalizer_value,
        MODELS[model],
        _checks.reduction_code(reduction),
    )
    if not _backend.is_native(namespace):
        _check(*arguments)
    elif _backend.checks_enabled() and not torch.compiler.is_compiling():
        _check_values(first, outcome, log_tie, mask, weight, weight_value, MODELS[model])
        _checks.check_normalizer_value(normalizer)
    return namespace.bradley_terry_tie_loss(*arguments)


class BradleyTerryTieLoss(torch.nn.Module):
    """:func:`bradley_terry_tie_loss` as a module that learns ``log_tie`` with the rewards.

    Rao–Kupper needs log θ ≥ 0, so there the parameter is its inverse softplus.

    Args:
        model: ``"rao_kupper"`` or ``"davidson"``.
        log_tie: its first value (> 0 for Rao–Kupper).
        learn_log_tie: whether it is a parameter or stays as it is.
        reduction: as in :func:`rewardfuse.bradley_terry_loss`.

    >>> import torch, rewardfuse
    >>> criterion = rewardfuse.BradleyTerryTieLoss(model="davidson", log_tie=0.0)
    >>> criterion(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.5])).item()
    1.0986...
    """

    def __init__(
        self,
        *,
        model: str = "rao_kupper",
        log_tie: float = 1.0,
        learn_log_tie: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if model not in MODELS:
            raise ValueError(f'model: expected "rao_kupper" or "davidson", got {model!r}')
        if model == "rao_kupper" and not log_tie > 0:
            raise ValueError(f"log_tie: expected a positive number for rao_kupper, got {log_tie!r}")
        self.model = model
        self.reduction = reduction
        raw = torch.tensor(float(log_tie))
        if model == "rao_kupper":
            raw = torch.expm1(raw).log()
        self.raw_log_tie = torch.nn.Parameter(raw, requires_grad=learn_log_tie)

    @property
    def log_tie(self) -> Tensor:
        """log θ or log ν, 0-d, differentiable."""
        return torch.nn.functional.softplus(self.raw_log_tie) if self.model == "rao_kupper" else self.raw_log_tie

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        outcome: Tensor | float,
        *,
        mask: Tensor | None = None,
        weight: Tensor | float | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of a batch; arguments as in :func:`bradley_terry_tie_loss`."""
        options = {"mask": mask, "weight": weight, "normalizer": normalizer, "reduction": self.reduction}
        return bradley_terry_tie_loss(first, second, outcome, log_tie=self.log_tie, model=self.model, **options)

    def extra_repr(self) -> str:
        return f"model={self.model!r}, reduction={self.reduction!r}"


def _check(
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
) -> None:
    """What csrc/autograd/bradley_terry_tie.cpp checks, in its order."""
    _checks.check_constants(weight=weight, outcome=outcome, normalizer=normalizer)
    known = outcome_value in (0.0, 0.5, 1.0)
    _checks.check_number("outcome", known, "1 (first wins), 0.5 (tie) or 0 (second wins)", outcome_value)
    if model == MODELS["rao_kupper"]:
        _checks.check_number("log_tie", log_tie_value >= 0, "log θ ≥ 0", log_tie_value)
    _checks.check_pairs("first", first, "second", second, mask, log_tie=log_tie, outcome=outcome, weight=weight)
    _checks.check_normalizer(normalizer, normalizer_value, reduction, "first", first)
    if _checks.values_are_checked(first):
        _check_values(first, outcome, log_tie, mask, weight, weight_value, model)


def _check_values(
    first: Tensor,
    outcome: Tensor | None,
    log_tie: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    weight_value: float,
    model: int,
) -> None:
    counted = _checks.counted_items(first, mask, weight, weight_value)
    if outcome is not None:
        known = (outcome == 0) | (outcome == 0.5) | (outcome == 1)
        _checks.check_values("outcome", outcome, known, counted, "1 (first wins), 0.5 (tie) or 0 (second wins)")
    if log_tie is not None and model == MODELS["rao_kupper"]:
        _checks.check_values("log_tie", log_tie, log_tie >= 0, counted, "log θ ≥ 0")
    elif log_tie is not None:
        _checks.check_values("log_tie", log_tie, log_tie == log_tie, counted, "a number")
