"""TRL's RLOO and GRPO trainers with log-probs, entropy and the KL term from this library.

The KL terms are lines within long methods of TRL's. Those methods are TRL's own here too, with the statements below
replaced by calls of the methods that follow; a TRL in which one reads otherwise raises HookChangedError at import.
Log-probs and entropy: ``_trl_head.py``.
"""

import types
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import trl
import trl.trainer.grpo_trainer
import trl.trainer.rloo_trainer
from torch import Tensor

from rewardfuse import approx_kl
from rewardfuse.integrations._patching import Patches, with_statements
from rewardfuse.integrations._trl_head import PARAMETERS, head_adder
from rewardfuse.ops._kl_options import ESTIMATORS, bounds

__all__ = ["GRPOConfig", "GRPOTrainer", "RLOOConfig", "RLOOTrainer"]

_ESTIMATOR_HELP = "Estimator of the KL to the reference model: k1, k2, k3 or abs."
_INPUT_CLAMP_HELP = "Bound c > 0: log(pi / pi_ref) of a token is clamped to +-c in the KL term. None: no bound."
_OUTPUT_CLAMP_HELP = "Bound c > 0: the KL of a token is clamped to +-c. None: no bound."


class KLOptions(NamedTuple):
    """The KL options of a configuration, or TRL's own where it is a plain TRL configuration without them."""

    kl_estimator: str
    kl_gradient_estimator: str | None = None
    kl_input_clamp: float | None = None
    kl_output_clamp: float | None = None

    @classmethod
    def of(cls, config: Any, defaults: "KLOptions") -> "KLOptions":
        """Of a configuration."""
        return cls(*(getattr(config, name, default) for name, default in defaults._asdict().items()))

    def check(self) -> None:
        """Raises ValueError or TypeError by name."""
        known = ", ".join(f'"{name}"' for name in ESTIMATORS)
        if self.kl_estimator not in ESTIMATORS:
            raise ValueError(f"kl_estimator: expected one of {known}, got {self.kl_estimator!r}")
        if self.kl_gradient_estimator is not None and self.kl_gradient_estimator not in ESTIMATORS:
            raise ValueError(
                f"kl_gradient_estimator: expected None or one of {known}, got {self.kl_gradient_estimator!r}"
            )
        bounds("kl_input_clamp", self.kl_input_clamp)
        bounds("kl_output_clamp", self.kl_output_clamp)

    @property
    def clamped(self) -> bool:
        """Whether the value is clamped anywhere."""
        return self.kl_input_clamp is not None or self.kl_output_clamp is not None

    def value(self) -> dict[str, Any]:
        """For :func:`rewardfuse.approx_kl`, all but the gradient's estimator."""
        return {
            "estimator": self.kl_estimator,
            "input_clamp": self.kl_input_clamp,
            "output_clamp": self.kl_output_clamp,
        }


RLOO_DEFAULTS = KLOptions("k1")
GRPO_DEFAULTS = KLOptions("k3")


def _check_config(config: Any, defaults: KLOptions) -> None:
    """Check the KL options; warn where they are set and there is no KL."""
    options = KLOptions.of(config, defaults)
    options.check()
    changed = [name for name in options._fields if getattr(options, name) != getattr(defaults, name)]
    if changed and config.beta == 0:
        warnings.warn(f"no KL term with beta=0: {', '.join(changed)} has no effect, set beta", stacklevel=4)


@dataclass
class RLOOConfig(trl.RLOOConfig):
    r"""TRL's ``RLOOConfig`` with options of the KL in the reward, :math:`R - β \sum_t k(x_t)`.

    Parameters (beside all of TRL's; x = log π − log π_ref of a token):
        kl_estimator (str, default "k1"): "k1", "k2", "k3" or "abs", as in :func:`rewardfuse.approx_kl`. Only k1 makes
            this penalty's policy gradient that of KL(π‖π_ref).
        kl_input_clamp, kl_output_clamp (float, default None): bounds ±c of x and of a token's KL (from Python also
            pairs, as in :func:`rewardfuse.approx_kl`).

    With ``beta=0`` they have no effect, and setting one warns.

    Raises:
        ValueError, TypeError: an option is none of these.
    """

    kl_estimator: str = field(
        default="k1", metadata={"help": f"{_ESTIMATOR_HELP} TRL's own is k1.", "choices": list(ESTIMATORS)}
    )
    kl_input_clamp: float | None = field(default=None, metadata={"help": _INPUT_CLAMP_HELP})
    kl_output_clamp: float | None = field(default=None, metadata={"help": _OUTPUT_CLAMP_HELP})

    def __post_init__(self):
        super().__post_init__()
        _check_config(self, RLOO_DEFAULTS)


@dataclass
class GRPOConfig(trl.GRPOConfig):
    r"""TRL's ``GRPOConfig`` with options of the KL in the loss, β times w·k(x) a token.

    w is the policy ratio with ``use_bias_correction_kl``, TRL's default, and 1 without.

    Parameters (beside all of TRL's; x = log π − log π_ref of a token):
        kl_estimator (str, default "k3"): of the value: "k1", "k2", "k3" or "abs", as in :func:`rewardfuse.approx_kl`.
        kl_gradient_estimator (str, default None): None takes the gradient of w·k(x) through both factors, as TRL does,
            exactly 0 where ``kl_output_clamp`` holds. Given, it is w·k'(x) of this estimator, whatever the clamps do to
            the value. "k2" gives w·x: that of KL(π‖π_ref), and TRL's own with the ratio of a token and no clamps.
        kl_input_clamp, kl_output_clamp (float, default None): bounds ±c of x and of w·k(x) (from Python also pairs).

    With ``beta=0``, TRL's default, they have no effect, and setting one warns.

    Raises:
        ValueError, TypeError: an option is none of these.
    """

    kl_estimator: str = field(
        default="k3", metadata={"help": f"{_ESTIMATOR_HELP} TRL's own is k3.", "choices": list(ESTIMATORS)}
    )
    kl_gradient_estimator: str | None = field(
        default=None,
        metadata={
            "help": "Estimator whose gradient goes with the KL's value. None: the value's own, as in TRL.",
            "choices": list(ESTIMATORS),
        },
    )
    kl_input_clamp: float | None = field(default=None, metadata={"help": _INPUT_CLAMP_HELP})
    kl_output_clamp: float | None = field(default=None, metadata={"help": _OUTPUT_CLAMP_HELP})

    def __post_init__(self):
        super().__post_init__()
        _check_config(self, GRPO_DEFAULTS)


class _FusedPolicy:
    """What both trainers share."""

    _trl_module: types.ModuleType

    def __init__(self, *args: Any, **kwargs: Any):
        with Patches() as patches:
            patches.replace(self._trl_module, "add_fused_lm_head", head_adder(), PARAMETERS)
            super().__init__(*args, **kwargs)

    @staticmethod
    def _select(mask: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """0 where the mask is, whatever stands there; TRL multiplies by the mask, which keeps a NaN."""
        return tuple(value.masked_fill(mask == 0, 0) for value in values)


_BASE_RLOO, _BASE_GRPO = trl.RLOOTrainer, trl.GRPOTrainer


RLOO_SCORING = {
    "prompt_inputs = super()._prepare_inputs(prompt_inputs)": "prompt_inputs = self._to_device(prompt_inputs)",
    "old_logps = (old_per_token_logps * completion_mask).sum(1)": (
        "(old_per_token_logps,) = self._select(completion_mask, old_per_token_logps)\n"
        "old_logps = old_per_token_logps.sum(1)"
    ),
    "per_token_kl = old_per_token_logps - ref_per_token_logps": (
        "per_token_kl = self._token_kl(old_per_token_logps, ref_per_token_logps, completion_mask)"
    ),
}
RLOO_LOSS = {
    "logps = (per_token_logps * completion_mask).sum(1)": (
        "per_token_logps, entropies = self._select(completion_mask, per_token_logps, entropies)\n"
        "logps = per_token_logps.sum(1)"
    ),
}
_OLD = "old_per_token_logps = per_token_logps.detach() if old_per_token_logps is None else old_per_token_logps"
GRPO_LOSS = {
    _OLD: (
        f"{_OLD}\n"
        "per_token_logps, old_per_token_logps, entropies = "
        "self._select(mask, per_token_logps, old_per_token_logps, entropies)"
    ),
    (
        "per_token_kl = torch.exp(ref_per_token_logps - per_token_logps) - (ref_per_token_logps - per_token_logps) - 1"
    ): "per_token_kl = self._token_kl(per_token_logps, ref_per_token_logps, coef_1, mask)",
    "if self.args.use_bias_correction_kl:\n    per_token_kl = per_token_kl * coef_1": "pass",
}


class RLOOTrainer(_FusedPolicy, _BASE_RLOO):
    r"""TRL's ``RLOOTrainer`` with log-probs, entropy and the KL of the reward from this library.

    .. math:: R = \mathrm{clamp}(s) - β \sum_{t\,\text{valid}} k(x_t), \qquad x = \log π - \log π_{ref}

    The log-probs come from :func:`rewardfuse.token_logprobs_from_hidden`, k from :func:`rewardfuse.approx_kl` with the
    options of :class:`RLOOConfig`; a ``trl.RLOOConfig`` works as well and means the defaults, TRL's k1. Everything else
    is TRL's. A head that this library cannot compute (a softcap or scale that is not positive, DeepSpeed ZeRO-3) is
    computed by TRL's own code, with a warning.

    Deviation from TRL: what stands at masked tokens is never looked at; there a NaN makes the reward NaN, which then
    silently becomes an advantage of 0, and the loss NaN.

    Source: TRL 1.16.0 ``RLOOTrainer``; Ahmadian et al. 2024, arXiv:2402.14740.

    Raises:
        HookChangedError: TRL's module has another ``add_fused_lm_head``.
    """

    _trl_module = trl.trainer.rloo_trainer
    _compute_loss = with_statements(_BASE_RLOO._compute_loss, RLOO_LOSS)
    _generate_and_score_completions = with_statements(_BASE_RLOO._generate_and_score_completions, RLOO_SCORING)

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What ``super()._prepare_inputs`` is in TRL's class."""
        return super(_BASE_RLOO, self)._prepare_inputs(inputs)

    def _token_kl(self, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        """KL of each token for the reward, [B, T]; 0 where masked."""
        options = KLOptions.of(self.args, RLOO_DEFAULTS)
        return approx_kl(logprobs, ref_logprobs, mask=mask != 0, **options.value())


class GRPOTrainer(_FusedPolicy, _BASE_GRPO):
    r"""TRL's ``GRPOTrainer`` with log-probs, entropy and the KL of the loss from this library.

    .. math:: \ell_t = \ell_t^{policy} + β\,w_t\,k(x_t), \qquad x = \log π - \log π_{ref}

    with the policy ratio w under ``use_bias_correction_kl`` (of a token or a sequence, as
    ``importance_sampling_level`` says), else 1. The log-probs come from :func:`rewardfuse.token_logprobs_from_hidden`,
    k from :func:`rewardfuse.approx_kl` with the options of :class:`GRPOConfig`; a ``trl.GRPOConfig`` works as well and
    means the defaults, TRL's k3. Everything else is TRL's. A head that this library cannot compute (a softcap or scale
    that is not positive, DeepSpeed ZeRO-3) is computed by TRL's own code, with a warning.

    Deviations from TRL: what stands at masked tokens is never looked at; there a NaN makes the loss NaN. k3 saturates
    below x = −80 instead of becoming inf at −88.7. The gradient of w·k3 is taken as w·x, which it is for a token's w;
    TRL adds up two numbers of size :math:`e^{-x}` for it and is off by half its size at x = −20, by all of it at −24.

    Source: TRL 1.16.0 ``GRPOTrainer``; Shao et al. 2024, arXiv:2402.03300.

    Raises:
        HookChangedError: TRL's module has another ``add_fused_lm_head``.
    """

    _trl_module = trl.trainer.grpo_trainer
    _compute_loss = with_statements(_BASE_GRPO._compute_loss, GRPO_LOSS)

    def _token_kl(self, logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
        """KL of each token for the loss, [B, T], its ratio within; 0 where masked. ``ratio`` is [B, T] or [B, 1]."""
        options = KLOptions.of(self.args, GRPO_DEFAULTS)
        gradient, weight = options.kl_gradient_estimator, None
        if self.args.use_bias_correction_kl:
            weight = ratio.expand_as(logprobs)
            of_token = self.importance_sampling_level == "token"
            if gradient is None and options.kl_estimator == "k3" and of_token and not options.clamped:
                gradient = "k2"  # d(w k3) = w k3 + w (1 - exp(-x)) = w x, without the difference
            if gradient is not None:
                weight = weight.detach()
        return approx_kl(
            logprobs,
            ref_logprobs,
            mask=mask != 0,
            gradient_estimator=gradient,
            importance_weight=weight,
            **options.value(),
        )
