"""verl's KL functions and controllers on the fused KL, under verl's names, and a way to put them into verl.

Either set ``VERL_USE_EXTERNAL_MODULES=rewardfuse.integrations.verl.plugin`` for every process of a run (verl imports it
whenever it is itself imported), or call :func:`install`. Values and gradients are verl's, but where verl is
wrong: see each function.

Tested against verl 0.9.1, which need not be installed unless :func:`install` is called.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Protocol

import torch
from torch import Tensor

from rewardfuse import approx_kl, kl_control, presets
from rewardfuse.integrations._patching import Patches, check_alike, check_parameters, warn_if_untested
from rewardfuse.ops import _checks

__all__ = [
    "AdaptiveKLController",
    "FixedKLController",
    "apply_kl_penalty",
    "get_kl_controller",
    "install",
    "kl_penalty",
    "kl_penalty_forward",
    "uninstall",
]


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    r"""KL of the policy from the reference at each token, by verl's name of the estimator.

    With :math:`x` = ``logprob`` − ``ref_logprob``:

    =====================  ==========================================================================
    ``kl``, ``k1``         :math:`x`
    ``abs``                :math:`|x|`
    ``mse``, ``k2``        :math:`x^2 / 2`
    ``low_var_kl``, ``k3`` :math:`e^{-x} - 1 + x`, x clamped to ±20 and then the value to ±10
    =====================  ==========================================================================

    With a "+" behind it the value stays, and the gradient is that of k2 (straight-through), whatever the clamps.

    Args:
        logprob: log π of the sampled tokens in nats, any shape; float16, bfloat16, float32 or float64.
        ref_logprob: log π_ref of the same tokens, same shape; a constant.
        kl_penalty: a name from the table.

    Returns:
        The shape of ``logprob``, in nats, float32 (float64 for float64 log-probs).

    Deviations from verl 0.9.1: k3 is right near x = 0, where verl's cancels (0 at x = −1e-4, where k3 is 5e-9);
    16-bit log-probs give a float32 KL; ``ref_logprob`` gets no gradient and does not broadcast; an unknown name is a
    ValueError that lists the known ones.

    Raises:
        NotImplementedError: "full", as in verl: it needs both models' logits.
        ValueError, TypeError: another unknown name; tensors that do not fit.

    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html); the names are verl's.

    >>> kl_penalty(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), "low_var_kl")
    tensor([0.1065, 0.7183])
    """
    check_alike(logprob=logprob, ref_logprob=ref_logprob)
    return approx_kl(logprob, ref_logprob, **_options(kl_penalty))


def kl_penalty_forward(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """:func:`kl_penalty` for names without a "+".

    Raises:
        NotImplementedError: "full".
        ValueError, TypeError: another unknown name, a "+" too; tensors that do not fit.
    """
    check_alike(logprob=logprob, ref_logprob=ref_logprob)
    options = _options(kl_penalty)
    if kl_penalty.endswith("+"):
        raise ValueError(f"kl_penalty: expected a name without +, which kl_penalty takes, got {kl_penalty!r}")
    return approx_kl(logprob, ref_logprob, **options)


def _options(kl_penalty: str) -> dict[str, Any]:
    """The options of approx_kl behind one of verl's names."""
    if isinstance(kl_penalty, str) and kl_penalty.removesuffix("+") == "full":
        raise NotImplementedError(
            'kl_penalty: "full" needs both models\' logits, not log-probs of sampled tokens; '
            'rewardfuse.kl_penalized_rewards_from_logits and _from_hidden have it as estimator="full"'
        )
    return presets.verl(kl_penalty=kl_penalty).rewards


class AdaptiveKLController(kl_control.AdaptiveKLController):
    """:class:`rewardfuse.AdaptiveKLController` under verl's name of the target.

    Unlike verl's it has ``state_dict()`` and ``load_state_dict()`` for checkpoints, and refuses what would spoil the
    coefficient for good (ValueError): a KL that is not finite, an initial coefficient, target or horizon that is
    not positive, and ``n_steps`` of 5 horizons or more, which could take the coefficient to 0 or below.

    >>> controller = AdaptiveKLController(init_kl_coef=0.1, target_kl=6.0, horizon=10000)
    >>> controller.update(current_kl=9.0, n_steps=256)
    >>> round(controller.value, 6)
    0.100512
    """

    def __init__(self, init_kl_coef: float, target_kl: float, horizon: float) -> None:
        super().__init__(init_kl_coef, kl_control._positive("target_kl", target_kl), horizon)


class FixedKLController(kl_control.FixedKLController):
    """:class:`rewardfuse.FixedKLController` with verl's ``update``, which looks at nothing: a run goes on in any case.

    >>> controller = FixedKLController(kl_coef=0.1)
    >>> controller.update(current_kl=float("inf"), n_steps=4)
    >>> controller.value
    0.1
    """

    def update(self, current_kl: Any, n_steps: Any) -> None:
        """Does nothing."""


class KLControl(Protocol):
    """As much of verl's ``algorithm.kl_ctrl`` as :func:`get_kl_controller` reads."""

    type: str  #: "fixed" or "adaptive"
    kl_coef: float
    target_kl: float  #: of an adaptive one
    horizon: float  #: of an adaptive one


def get_kl_controller(kl_ctrl: KLControl) -> FixedKLController | AdaptiveKLController:
    """The controller that verl's ``algorithm.kl_ctrl`` asks for.

    A trainer asks for its controller when it is set up; a verl in which :func:`install` was called before that trainer
    was imported gets its :func:`apply_kl_penalty` now.

    Raises:
        ValueError: ``kl_ctrl.type`` is neither "fixed" nor "adaptive"; a number is out of range.
    """
    _patch_trainer()
    if kl_ctrl.type == "fixed":
        return FixedKLController(kl_coef=kl_ctrl.kl_coef)
    if kl_ctrl.type == "adaptive":
        return AdaptiveKLController(kl_ctrl.kl_coef, kl_ctrl.target_kl, kl_ctrl.horizon)
    raise ValueError(f'kl_ctrl.type: expected "fixed" or "adaptive", got {kl_ctrl.type!r}')


def apply_kl_penalty(data: Any, kl_ctrl: Any, kl_penalty: str = "kl") -> tuple[Any, dict[str, float]]:
    r"""Take β·KL from the score of each token, and tell the controller of the mean KL.

    .. math:: r_t = s_t - β\,k(x_t) \quad \text{where the mask is true, else} \quad r_t = s_t

    Args:
        data: a ``DataProto`` or what has its ``batch``: a mapping with ``response_mask`` (nonzero: valid),
            ``token_level_scores``, ``old_log_probs`` and ``ref_log_prob``, all ``[B, T]``. Gets
            ``token_level_rewards`` ``[B, T]``.
        kl_ctrl: has ``value`` (β) and ``update(current_kl, n_steps)``.
        kl_penalty: a name that :func:`kl_penalty` takes.

    Returns:
        ``data`` and the metrics ``actor/reward_kl_penalty`` (the mean over responses of the mean KL of a token) and
        ``actor/reward_kl_penalty_coeff`` (β before the update). Both are read from the device at once.

    Deviations from verl 0.9.1: masked places are selected away, so a NaN there reaches neither rewards nor mean;
    responses without a valid token are left out of the mean KL and of ``n_steps``, where verl counts them as 0 and
    dilutes the KL; sums over tokens are in float64. Scores stay where they are, also in masked places.

    Raises:
        NotImplementedError: "full".
        ValueError, TypeError: an unknown name, or tensors that do not fit.

    Source: Ziegler et al. 2019, equation 2; verl 0.9.1, ``trainer/ppo/ray_trainer.py``.
    """
    batch = data.batch
    policy, ref = batch["old_log_probs"], batch["ref_log_prob"]
    check_alike(old_log_probs=policy, ref_log_prob=ref)
    for name in ("response_mask", "token_level_scores"):
        _checks.check_tensors(**{name: batch[name]})
        _checks.check_like(name, batch[name], "old_log_probs", policy)
    mask = batch["response_mask"].bool()
    kl = approx_kl(policy, ref, mask=mask, **_options(kl_penalty))
    coefficient = kl_ctrl.value
    batch["token_level_rewards"] = batch["token_level_scores"] - coefficient * kl
    tokens = mask.sum(-1)
    of_rows = kl.detach().sum(-1, dtype=torch.float64) / tokens.clamp(min=1)
    total, rows = torch.stack([of_rows.sum(), (tokens > 0).sum().double()]).tolist()
    current_kl = total / max(rows, 1)
    kl_ctrl.update(current_kl=current_kl, n_steps=int(rows))
    return data, {"actor/reward_kl_penalty": current_kl, "actor/reward_kl_penalty_coeff": coefficient}


_CORE, _TRAINER = "verl.trainer.ppo.core_algos", "verl.trainer.ppo.ray_trainer"
# What stands in verl's modules, what takes its place, and the parameters that the original must take.
_HOOKS = {
    "kl_penalty": (kl_penalty, ("logprob", "ref_logprob", "kl_penalty")),
    "kl_penalty_forward": (kl_penalty_forward, ("logprob", "ref_logprob", "kl_penalty")),
    "AdaptiveKLController": (AdaptiveKLController, ("init_kl_coef", "target_kl", "horizon")),
    "FixedKLController": (FixedKLController, ("kl_coef",)),
    "get_kl_controller": (get_kl_controller, ("kl_ctrl",)),
}
_TRAINER_HOOK = (apply_kl_penalty, ("data", "kl_ctrl", "kl_penalty"))

_patches = Patches()


def install() -> None:
    """Put this module's functions and controllers in the place of verl's, wherever verl's modules have them.

    That is ``verl.trainer.ppo.core_algos``, every loaded module of verl that imported one of them by name
    (``workers/utils/losses.py`` and others), and every one that does so later. ``ray_trainer.apply_kl_penalty`` is
    replaced if that module is loaded, or else as soon as a trainer asks for its KL controller. Controllers that
    exist already stay verl's, and ``pickle`` refuses them until :func:`uninstall` (Ray's cloudpickle does not). Calling
    it again does no harm. Holds for this process alone.

    Raises:
        ImportError: verl is not installed.
        HookChangedError: this verl lacks one of these functions, or it takes other arguments. Nothing is replaced then.

    Warns:
        UserWarning: another verl than 0.9.
    """
    core = importlib.import_module(_CORE)
    if not _patches:
        warn_if_untested("verl", "0.9", getattr(sys.modules.get("verl"), "__version__", None))
        for name in ("AdaptiveKLController", "FixedKLController"):
            update = getattr(vars(core).get(name), "update", None)
            if update is not None:
                check_parameters(update, ("self", "current_kl", "n_steps"), f"{_CORE}.{name}.update")
    try:
        for name, (ours, parameters) in _HOOKS.items():
            _patches.take_over(core, name, ours, parameters)
        _patch_trainer()
    except Exception:
        uninstall()
        raise


def uninstall() -> None:
    """Put everything back, also in modules of verl that were imported since :func:`install`."""
    _patches.undo()


def _patch_trainer() -> None:
    """Replace apply_kl_penalty, if the rest is replaced and there is a module that has it."""
    if _patches and _TRAINER in sys.modules:
        _patches.take_over(sys.modules[_TRAINER], "apply_kl_penalty", *_TRAINER_HOOK)
