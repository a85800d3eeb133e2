"""The options of the KL ops as users write them, and as kernels take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from rewardfuse.ops import _checks

ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}
#: Estimators that need both models' whole distributions, by the direction that kernels know.
EXACT = {"full": 1, "full_forward": 2}
#: As a gradient estimator: the gradient of the value itself, through its clamps.
OF_THE_VALUE = -1


class Estimator(NamedTuple):
    """Which number stands for the KL of a token, and whose gradient goes with it; in the order that kernels take."""

    value: int
    gradient: int
    input_low: float
    input_high: float
    output_low: float
    output_high: float

    @classmethod
    def of(cls, estimator: str, gradient_estimator: str | None, input_clamp: object, output_clamp: object) -> Estimator:
        """Raises ValueError or TypeError by name."""
        value = _code("estimator", estimator)
        gradient = (
            OF_THE_VALUE if gradient_estimator is None else _code("gradient_estimator", gradient_estimator, "None, ")
        )
        return cls(value, gradient, *bounds("input_clamp", input_clamp), *bounds("output_clamp", output_clamp))


def _code(name: str, estimator: object, besides: str = "") -> int:
    code = ESTIMATORS.get(estimator) if isinstance(estimator, str) else None
    if code is None:
        raise ValueError(f'{name}: expected {besides}"k1", "k2", "k3" or "abs", got {estimator!r}')
    return code


def bounds(name: str, clamp: object) -> tuple[float, float]:
    """(low, high) of a clamp: None, a positive number c for ±c, or a pair in which None is open."""
    if clamp is None:
        return -math.inf, math.inf
    if isinstance(clamp, Real):
        if not clamp > 0:
            raise ValueError(f"{name}: expected None, a positive number or a pair (low, high), got {clamp!r}")
        return -float(clamp), float(clamp)
    if not isinstance(clamp, Sequence) or isinstance(clamp, str):
        raise TypeError(f"{name}: expected None, a number or a pair (low, high), got {type(clamp).__name__}")
    if len(clamp) != 2 or not all(end is None or isinstance(end, Real) for end in clamp):
        raise ValueError(f"{name}: expected a pair of numbers (low, high), got {clamp!r}")
    low = -math.inf if clamp[0] is None else float(clamp[0])
    high = math.inf if clamp[1] is None else float(clamp[1])
    if not low < high:
        raise ValueError(f"{name}: expected low < high, got {low:g} and {high:g}")
    return low, high


class Shaping(NamedTuple):
    """How rewards are made of the KL of each token; every option of ``kl_penalized_rewards``, checked."""

    estimator: Estimator
    kl_coef: Tensor | None
    kl_coef_value: float
    scores: Tensor | None
    score_low: float
    score_high: float
    one_past: bool
    ended: Tensor | None
    missing_eos_penalty: float
    replace: bool
    whiten: bool
    shift_mean: bool
    differentiable: bool

    @classmethod
    def of(
        cls,
        estimator: Estimator,
        *,
        kl_coef: Tensor | float,
        scores: Tensor | None = None,
        score_clip: object = None,
        terminal: str = "last",
        ended: Tensor | None = None,
        missing_eos_penalty: float | None = None,
        missing_eos: str = "subtract",
        whiten_rewards: bool = False,
        whiten_shift_mean: bool = True,
        differentiable_rewards: bool = False,
    ) -> Shaping:
        """Raises ValueError or TypeError by name; shapes are checked later, beside the log-probs."""
        given = {"scores": scores, "ended": ended}
        _checks.check_tensors(**{name: tensor for name, tensor in given.items() if tensor is not None})
        if kl_coef is None:
            raise TypeError("kl_coef: expected a number or a tensor, got NoneType")
        coefficient, number = _checks.tensor_or_number("kl_coef", kl_coef, 0.0)
        _checks.check_number("kl_coef", 0 <= number < math.inf, "finite and not negative", number)
        _one_of("terminal", terminal, ("last", "one_past"))
        _one_of("missing_eos", missing_eos, ("subtract", "replace"))
        if scores is not None and scores.requires_grad and not differentiable_rewards:
            scores = scores.detach()
        return cls(
            estimator,
            coefficient,
            number,
            scores,
            *bounds("score_clip", score_clip),
            terminal == "one_past",
            ended,
            _penalty(missing_eos_penalty, ended),
            missing_eos == "replace",
            whiten_rewards,
            whiten_shift_mean,
            differentiable_rewards,
        )

    def arguments(self, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None) -> tuple[object, ...]:
        """What a backend's ``kl_penalized_rewards`` takes."""
        return (
            logprobs,
            ref_logprobs,
            mask,
            self.scores,
            self.ended,
            self.kl_coef,
            self.kl_coef_value,
            self.missing_eos_penalty,
            self.score_low,
            self.score_high,
            *self.estimator,
            self.one_past,
            self.replace,
            self.differentiable,
        )


def _one_of(name: str, value: object, known: tuple[str, str]) -> None:
    if value not in known:
        raise ValueError(f'{name}: expected "{known[0]}" or "{known[1]}", got {value!r}')


def _penalty(value: float | None, ended: Tensor | None) -> float:
    if value is None:
        if ended is not None:
            raise ValueError("ended: expected with missing_eos_penalty, which says what it costs")
        return 0.0
    _checks.check_options(None, missing_eos_penalty=value)
    _checks.check_number("missing_eos_penalty", 0 <= value < math.inf, "finite and not negative", value)
    if ended is None:
        raise ValueError("missing_eos_penalty: expected with ended, which says whom it hits")
    return float(value)


def promoted(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes, the reference without its graph."""
    if ref_logprobs.requires_grad:
        ref_logprobs = ref_logprobs.detach()
    if logprobs.dtype is ref_logprobs.dtype or not (logprobs.is_floating_point() and ref_logprobs.is_floating_point()):
        return logprobs, ref_logprobs
    dtype = torch.promote_types(logprobs.dtype, ref_logprobs.dtype)
    return logprobs.to(dtype), ref_logprobs.to(dtype)
