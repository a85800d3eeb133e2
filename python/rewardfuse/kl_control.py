"""Controllers of the KL coefficient."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor


class FixedKLController:
    """A KL coefficient that stays as it is; the face of :class:`AdaptiveKLController`.

    >>> import rewardfuse
    >>> rewardfuse.FixedKLController(0.05).value
    0.05
    """

    def __init__(self, kl_coef: float) -> None:
        self.value = _finite("kl_coef", kl_coef, least=0)

    def update(self, current_kl: Tensor | float, n_steps: Tensor | int) -> None:
        """Does nothing but check its arguments."""
        _finite("current_kl", current_kl)
        _finite("n_steps", n_steps, least=0)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on a saved coefficient."""
        self.value = _finite("value", _entry(state, "value"), least=0)


class AdaptiveKLController:
    r"""A KL coefficient that is raised where the KL is above its target and lowered where it is below.

    .. math:: β ← β\,\bigl(1 + \mathrm{clip}(KL / target - 1, -0.2, 0.2)\; n / horizon\bigr)

    Args:
        init_kl_coef: β to begin with, positive.
        target: the KL of a sequence in nats to hold, positive.
        horizon: over how many sequences an error is made good, positive; a step of n sequences moves β by at most
            0.2·n/horizon of itself. n ≥ 5·horizon could take it to 0 or below and is an error.

    Source: Ziegler et al. 2019, section 2.2.

    >>> import rewardfuse
    >>> controller = rewardfuse.AdaptiveKLController(init_kl_coef=0.1, target=6.0, horizon=10000)
    >>> controller.update(current_kl=9.0, n_steps=256)
    >>> round(controller.value, 6)
    0.100512
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value = _positive("init_kl_coef", init_kl_coef)
        self.target = _positive("target", target)
        self.horizon = _positive("horizon", horizon)

    def update(self, current_kl: Tensor | float, n_steps: Tensor | int) -> None:
        """Move the coefficient by one step.

        Args:
            current_kl: mean KL of a sequence in nats, a number or a 0-d tensor (reading one waits for its device).
                ``KLStats.sequence_kl`` is this mean; rows without a valid token are not in it.
            n_steps: how many sequences that mean is over: ``KLStats.sequences``. None of them: nothing changes.

        Raises:
            ValueError: the KL is not finite, or ``n_steps`` is negative or not below 5·horizon.
        """
        n_steps = _finite("n_steps", n_steps, least=0)
        if n_steps >= 5 * self.horizon:
            raise ValueError(f"n_steps: expected below 5 horizons, {5 * self.horizon:g}, got {n_steps:g}")
        if n_steps == 0:
            return
        error = _finite("current_kl", current_kl) / self.target - 1
        self.value *= 1 + min(max(error, -0.2), 0.2) * n_steps / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes."""
        return {"value": self.value, "target": self.target, "horizon": self.horizon}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved controller stood."""
        loaded = {name: _positive(name, _entry(state, name)) for name in ("value", "target", "horizon")}
        self.__dict__.update(loaded)


def _number(name: str, value: object) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a 0-d tensor, got shape {list(value.shape)}")
        return float(value.item())
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number or a 0-d tensor, got {type(value).__name__}")
    return float(value)


def _finite(name: str, value: object, least: float = -math.inf) -> float:
    number = _number(name, value)
    if not (math.isfinite(number) and number >= least):
        expected = "finite" if least == -math.inf else f"finite and at least {least:g}"
        raise ValueError(f"{name}: expected {expected}, got {number:g}")
    return number


def _positive(name: str, value: object) -> float:
    number = _number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected positive and finite, got {number:g}")
    return number


def _entry(state: dict[str, Any], name: str) -> Any:
    try:
        return state[name]
    except (KeyError, TypeError):
        raise ValueError(f"state: expected a controller's state_dict with {name!r}, got {state!r}") from None
