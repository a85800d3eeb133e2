"""OpenRLHF's reward-model losses, KL and rewards on the fused ops, under OpenRLHF's names.

Everything takes OpenRLHF's arguments in OpenRLHF's order, so that one line changes a trainer::

    from rewardfuse.integrations.openrlhf import PairWiseLoss

    trainer.loss_fn = PairWiseLoss()  # trainer: openrlhf.trainer.RewardModelTrainer

:func:`install` puts all of it in OpenRLHF's place, in the process that calls it.

Tested against OpenRLHF 0.11.2, which need not be installed unless :func:`install` is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from rewardfuse import approx_kl, bradley_terry_loss, kl_penalized_rewards, presets
from rewardfuse.integrations._patching import Patches, check_alike, warn_if_untested
from rewardfuse.ops import _checks

__all__ = ["LogExpLoss", "PairWiseLoss", "compute_approx_kl", "compute_reward", "install", "uninstall"]

_WEIGHT_CLIP = 10.0  # OpenRLHF's KL_IS_WEIGHT_CLIP


class PairWiseLoss(nn.Module):
    r"""Mean Bradley-Terry loss of pairs, :math:`-\log\sigma(r_c - r_r - m)`.

    Call with ``(chosen_reward, reject_reward, margin=None)``: rewards of one shape and floating dtype, margin a
    number, a 0-d tensor or a tensor of the same shape, of any real dtype. Returns a 0-d tensor: float32, or float64
    for float64 rewards.

    Deviations from OpenRLHF 0.11.2 ``PairWiseLoss``: 16-bit rewards give a float32 loss instead of a 16-bit one; an
    empty batch gives 0 instead of NaN; a margin of another shape is an error and never broadcasts.

    Source: Bradley and Terry 1952; margin: Touvron et al. 2023 (Llama 2), eq. 2.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    >>> loss_fn = PairWiseLoss()
    >>> round(loss_fn(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1.0])).item(), 4)
    0.6931
    """

    def forward(
        self,
        chosen_reward: Tensor,  # [pairs]
        reject_reward: Tensor,  # [pairs]
        margin: Tensor | float | None = None,  # [pairs]
    ) -> Tensor:
        _checks.check_tensors(chosen_reward=chosen_reward, reject_reward=reject_reward)
        chosen, rejected = _checks.promote_under_autocast(chosen_reward, reject_reward)
        per_pair = margin if isinstance(margin, Tensor) else None
        _checks.check_pairs("chosen_reward", chosen, "reject_reward", rejected, None, margin=per_pair)
        return bradley_terry_loss(chosen, rejected, margin)


class LogExpLoss(PairWiseLoss):
    r"""Mean of :math:`\log(1 + e^{r_r - r_c + m})`: the same function as :class:`PairWiseLoss`, and here the same code.

    Arguments, result and errors as in :class:`PairWiseLoss`.

    Deviations from OpenRLHF 0.11.2 ``LogExpLoss``, which evaluates the formula literally: in float32 that overflows
    at a gap :math:`r_r - r_c` of about 89 (the loss is inf and the gradient NaN) and rounds to exactly 0 beyond
    :math:`r_c - r_r \approx 17`, where this one stays exact; and it ignores ``margin``, which counts here.

    Source: Bai et al. 2022, arXiv 2204.05862, section 2.3.

    >>> LogExpLoss()(torch.tensor([0.0]), torch.tensor([100.0])).item()
    100.0
    """


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    r"""KL of the policy from the reference at each token, clamped to ±10.

    With :math:`x` = ``log_probs`` − ``log_probs_base``: k1 is :math:`x`, k2 :math:`x^2/2`, k3
    :math:`e^{-x} - 1 + x` with x no lower than −10. The gradient is 0 where a clamp holds.

    Args:
        log_probs: log π of the sampled tokens in nats, any shape; float16, bfloat16, float32 or float64.
        log_probs_base: log π_ref of the same tokens, same shape; a constant.
        log_probs_old: log π_old, of the policy that sampled, same shape; a constant. Counts with
            ``unbiased_gradient`` alone. None: π itself.
        kl_estimator: "k1", "k2" or "k3": the value.
        unbiased_gradient: the gradient to ``log_probs`` is then w·x with w = min(π/π_old, 10), whatever the value and
            its clamps: that of k2, which is the gradient of KL(π‖π_ref).

    Returns:
        The shape of ``log_probs``, in nats, float32 (float64 for float64 log-probs).

    Deviations from OpenRLHF 0.11.2: k3 is right near x = 0, where OpenRLHF's cancels (1.7e-8 at x = −1e-4, where it is
    5e-9); with ``unbiased_gradient`` the value is that of the estimator to the last bit, where OpenRLHF's is rounded as
    w·x²/2 is, to which it is added and from which it is taken again; float64 stays float64; ``log_probs_base`` gets
    no gradient; shapes do not broadcast.

    Raises:
        ValueError, TypeError: an unknown estimator; tensors that do not fit.

    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

    >>> compute_approx_kl(torch.tensor([-1.0, -20.0]), torch.tensor([-1.5, -1.0]))
    tensor([  0.5000, -10.0000])
    """
    check_alike(log_probs=log_probs, log_probs_base=log_probs_base)
    kl = approx_kl(log_probs, log_probs_base, **presets.openrlhf(kl_estimator, unbiased_gradient).kl)
    if log_probs_old is None or not unbiased_gradient:
        return kl
    check_alike(log_probs=log_probs, log_probs_old=log_probs_old)
    gap = log_probs.detach().to(kl.dtype) - log_probs_old.detach().to(kl.dtype)
    weight = gap.exp().clamp(max=_WEIGHT_CLIP)
    return kl.detach() + weight * (kl - kl.detach())  # the weight is the gradient's, not the value's


def compute_reward(
    r: Tensor | float,
    kl_coef: float,
    kl: Tensor | Sequence[Tensor],
    action_mask: Tensor | Sequence[Tensor] | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor | list[Tensor]:
    r"""Rewards of tokens: −β times their KL, and the clipped score at the last valid token of each response.

    .. math:: r_t = [t = last]\,\mathrm{clamp}(r) - β\,k_t

    Args:
        r: the scores, ``[B]`` of any real dtype, or one number for all.
        kl_coef: β, a number or a 0-d tensor; 0 or less is no KL, even where it is infinite.
        kl: :math:`k`, ``[B, T]``, or a list of B tensors ``[T_i]``.
        action_mask: ``[B, T]``, nonzero on the tokens that the policy chose, padding on either side and holes
            being fine; for a list a list of ``[T_i]``. None: every token.
        reward_clip_range: (low, high) of the score; None or an empty one: no clip.

    Returns:
        The shape of ``kl`` (a list for a list), float32, float64 for float64. Gradients flow to ``kl`` and ``r``.

    Deviations from OpenRLHF 0.11.2: masked places have reward 0, whatever stands there, a NaN too, where OpenRLHF has
    −β·k; a row without a valid token is 0 everywhere, and its score not read, where OpenRLHF puts that score into the
    last column; 16-bit KL gives float32 rewards. A number as ``r``, lists, and no mask, which OpenRLHF's annotations
    promise and its code does not take (it raises), work.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; ``kl_coef`` is no number, ``reward_clip_range`` no
            pair or no range.

    Source: Ziegler et al. 2019, equation 2.

    >>> compute_reward(torch.tensor([1.0]), 0.1, torch.tensor([[0.5, 2.0, 9.0]]), torch.tensor([[1, 1, 0]]))
    tensor([[-0.0500,  0.8000,  0.0000]])
    """
    if isinstance(kl, Tensor):
        return _rewards(r, kl_coef, kl, action_mask, reward_clip_range)
    if not isinstance(kl, Sequence):
        raise TypeError(f"kl: expected a tensor or a list of tensors, got {type(kl).__name__}")
    rows = [_row("kl", row) for row in kl]
    masks = [None] * len(kl) if action_mask is None else [_row("action_mask", mask) for mask in action_mask]
    if len(masks) != len(kl):
        raise ValueError(f"action_mask: expected as many as kl, {len(kl)}, got {len(masks)}")
    scores = _scores(r, rows[0] if rows else torch.zeros(0), len(kl)).unbind()
    return [
        _rewards(score[None], kl_coef, row, mask, reward_clip_range)[0]
        for score, row, mask in zip(scores, rows, masks, strict=True)
    ]


def _row(name: str, values: Tensor) -> Tensor:
    """One response of a list as a batch of one."""
    _checks.check_tensors(**{name: values})
    return values[None]


def _rewards(
    r: Tensor | float,
    kl_coef: float,
    kl: Tensor,  # [B, T]
    action_mask: Tensor | None,  # [B, T]
    reward_clip_range: tuple[float, float] | None,
) -> Tensor:
    """:func:`compute_reward` of one tensor: kl is its own k1 from a reference of 0."""
    _checks.check_rewards("kl", kl)
    if kl.dim() != 2:
        raise ValueError(f"kl: expected [responses, tokens], or a list of [tokens], got {list(kl.shape)}")
    if action_mask is not None:
        _checks.check_tensors(action_mask=action_mask)
        _checks.check_like("action_mask", action_mask, "kl", kl)
    if not isinstance(kl_coef, Tensor):
        _checks.check_options(None, kl_coef=kl_coef)
    if reward_clip_range is not None and not isinstance(reward_clip_range, Sequence):
        raise TypeError(f"reward_clip_range: expected (low, high) or None, got {type(reward_clip_range).__name__}")
    clip = presets.openrlhf(reward_clip_range=reward_clip_range or None).rewards.get("score_clip")
    return kl_penalized_rewards(
        kl,
        kl.new_zeros(()).expand_as(kl),
        None if action_mask is None else action_mask.bool(),
        scores=_scores(r, kl, len(kl)),
        kl_coef=max(kl_coef, 0.0),
        score_clip=clip,
        differentiable_rewards=True,
    ).rewards


def _scores(r: Tensor | float, kl: Tensor, rows: int) -> Tensor:
    """One score a row, of a floating dtype: a number or an integer in that of the rewards, not in that of 16-bit KL."""
    dtype = torch.float64 if kl.dtype is torch.float64 else torch.float32
    if isinstance(r, Real):
        return torch.full((rows,), float(r), dtype=dtype, device=kl.device)
    if not isinstance(r, Tensor):
        raise TypeError(f"r: expected a tensor or a number, got {type(r).__name__}")
    if list(r.shape) != [rows]:
        raise ValueError(f"r: expected a number or as many scores as responses, [{rows}], got {list(r.shape)}")
    return r if r.is_floating_point() else r.to(dtype)


_LOSS = (("self", "chosen_reward", "reject_reward", "margin"), "openrlhf.models.loss")
# What takes the place of OpenRLHF's function or class of that name: the parameters that it must take, and its module.
_HOOKS: dict[Any, tuple[tuple[str, ...], str]] = {
    PairWiseLoss: _LOSS,
    LogExpLoss: _LOSS,
    compute_approx_kl: (
        ("log_probs", "log_probs_base", "log_probs_old", "kl_estimator", "unbiased_gradient"),
        "openrlhf.models.utils",
    ),
    compute_reward: (("r", "kl_coef", "kl", "action_mask", "reward_clip_range"), "openrlhf.models.utils"),
}

_patches = Patches()


def install() -> None:
    """Put these losses and functions in the place of OpenRLHF's, in every module of OpenRLHF that has them by name.

    That is ``openrlhf.models.utils``, ``openrlhf.models.loss``, every loaded module of OpenRLHF that imported one of
    them, and every one that does so later. Trainers that exist already keep the loss they have; such a loss is no
    instance of the class in its place, and ``pickle`` refuses it until :func:`uninstall` (Ray's cloudpickle does not).
    Calling it again does no harm. Holds for this process alone: with Ray, every worker has to call it.

    Raises:
        ImportError: OpenRLHF is not installed.
        HookChangedError: this OpenRLHF lacks one of them, or it takes other arguments. Nothing is replaced then.

    Warns:
        UserWarning: another OpenRLHF than 0.11.
    """
    modules = {ours: importlib.import_module(name) for ours, (_, name) in _HOOKS.items()}
    if not _patches:
        warn_if_untested("openrlhf", "0.11")
    try:
        for ours, (parameters, _) in _HOOKS.items():
            _patches.take_over(modules[ours], ours.__name__, ours, parameters)
    except Exception:
        uninstall()
        raise


def uninstall() -> None:
    """Put everything back, also in modules of OpenRLHF that were imported since :func:`install`."""
    _patches.undo()
