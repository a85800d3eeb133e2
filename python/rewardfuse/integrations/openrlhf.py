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
from typing import Any

import torch
from torch import Tensor, nn

from rewardfuse import approx_kl, bradley_terry_loss, kl_penalized_rewards, presets
from rewardfuse.integrations._patching import Patches, warn_if_untested

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
        ValueError, TypeError: shapes or dtypes that do not fit, see :func:`rewardfuse.bradley_terry_loss`.

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
        return bradley_terry_loss(chosen_reward, reject_reward, margin)


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
        ValueError, TypeError: an unknown estimator; tensors that do not fit, see :func:`rewardfuse.approx_kl`.

    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

    >>> compute_approx_kl(torch.tensor([-1.0, -20.0]), torch.tensor([-1.5, -1.0]))
    tensor([  0.5000, -10.0000])
    """
    kl = approx_kl(log_probs, log_probs_base, **presets.openrlhf(kl_estimator, unbiased_gradient).kl)
    if log_probs_old is None or not unbiased_gradient:
        return kl
    if log_probs_old.shape != log_probs.shape:
        raise ValueError(
            f"log_probs_old: expected the shape of log_probs, {list(log_probs.shape)}, got {list(log_probs_old.shape)}"
        )
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
        r: the scores, ``[B]`` of any dtype, or one number for all.
        kl_coef: β; 0 or less is no KL, even where it is infinite.
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
        ValueError, TypeError: shapes or dtypes that do not fit; ``reward_clip_range`` is no range.

    Source: Ziegler et al. 2019, equation 2.

    >>> compute_reward(torch.tensor([1.0]), 0.1, torch.tensor([[0.5, 2.0, 9.0]]), torch.tensor([[1, 1, 0]]))
    tensor([[-0.0500,  0.8000,  0.0000]])
    """
    if isinstance(kl, Tensor):
        return _rewards(r, kl_coef, kl, action_mask, reward_clip_range)
    masks = [None] * len(kl) if action_mask is None else action_mask
    scores = _scores(r, len(kl), kl[0]).unbind() if len(kl) else ()
    if not len(masks) == len(scores) == len(kl):
        raise ValueError(f"kl: expected as many as r and action_mask, {len(scores)} and {len(masks)}, got {len(kl)}")
    return [
        _rewards(score[None], kl_coef, row[None], None if mask is None else mask[None], reward_clip_range)[0]
        for score, row, mask in zip(scores, kl, masks, strict=True)
    ]


def _rewards(
    r: Tensor | float,
    kl_coef: float,
    kl: Tensor,  # [B, T]
    action_mask: Tensor | None,  # [B, T]
    reward_clip_range: tuple[float, float] | None,
) -> Tensor:
    """:func:`compute_reward` of one tensor: kl is its own k1 from a reference of 0."""
    clip = presets.openrlhf(reward_clip_range=reward_clip_range or None).rewards.get("score_clip")
    return kl_penalized_rewards(
        kl,
        kl.new_zeros(()).expand_as(kl),
        None if action_mask is None else action_mask.bool(),
        scores=_scores(r, len(kl), kl),
        kl_coef=max(kl_coef, 0.0),
        score_clip=clip,
        differentiable_rewards=True,
    ).rewards


def _scores(r: Tensor | float, rows: int, kl: Tensor) -> Tensor:
    """One score a row, of a floating dtype."""
    if not isinstance(r, Tensor):
        return torch.full((rows,), float(r), dtype=kl.dtype, device=kl.device)
    return r if r.is_floating_point() else r.to(kl.dtype)


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
    them, and every one that does so later. Trainers that exist already keep the loss they have. Calling it again does
    no harm. Holds for this process alone: with Ray, every worker has to call it.

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
