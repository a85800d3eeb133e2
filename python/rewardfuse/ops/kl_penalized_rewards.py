"""Rewards of an RL step: the score of a response minus β times the KL of each of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rewardfuse import _backend
from rewardfuse.ops import _checks
from rewardfuse.ops._kl_options import Estimator, Shaping, promoted
from rewardfuse.whitening import masked_whiten


class KLStats(NamedTuple):
    """Batch statistics, 0-d tensors on the device without gradients; rows without a valid token count for nothing."""

    kl: Tensor  #: mean over valid tokens
    sequence_kl: Tensor  #: mean over sequences of the sum over tokens
    score: Tensor  #: mean over sequences, after clip and penalty
    sequence_reward: Tensor  #: mean over sequences of the sum over tokens, before whitening
    tokens: Tensor  #: how many valid tokens
    sequences: Tensor  #: how many sequences with a valid token


class KLRewards(NamedTuple):
    """Rewards and what they were made of; what was not asked for is None."""

    rewards: Tensor  #: ``[*, T]``, 0 where nothing counts; constants unless ``differentiable_rewards``
    kl: Tensor  #: ``[*, T]``, 0 where masked, with gradients to the policy
    logprobs: Tensor  #: ``[*, T]`` of the policy
    ref_logprobs: Tensor  #: ``[*, T]``, a constant
    entropy: Tensor | None  #: ``[*, T]``, of the policy, with gradients to it
    sequence_kl: Tensor  #: ``[*]``, sum over tokens, with gradients to the policy
    sequence_reward: Tensor  #: ``[*]``, sum over tokens, before whitening
    stats: KLStats


def kl_penalized_rewards(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: Tensor | float,
    scores: Tensor | None = None,
    estimator: str = "k1",
    gradient_estimator: str | None = None,
    input_clamp: float | tuple[float | None, float | None] | None = None,
    output_clamp: float | tuple[float | None, float | None] | None = None,
    score_clip: float | tuple[float | None, float | None] | None = None,
    terminal: str = "last",
    ended: Tensor | None = None,
    missing_eos_penalty: float | None = None,
    missing_eos: str = "subtract",
    whiten_rewards: bool = False,
    whiten_shift_mean: bool = True,
    differentiable_rewards: bool = False,
) -> KLRewards:
    r"""KL-penalized rewards of sampled tokens, in one pass.

    .. math:: r_t = s_t - β\, k(x_t), \qquad x_t = \log π(a_t) - \log π_{ref}(a_t)

    where k is an estimator of :func:`approx_kl` and :math:`s_t` the score: a sequence's score stands at its last valid
    token, or one past it.

    Args:
        logprobs: log π of the sampled tokens in nats, ``[*, T]``; float16, bfloat16, float32 or float64.
        ref_logprobs: log π_ref of the same tokens, same shape; a constant. Where dtypes differ, the wider one rules.
        mask: boolean ``[*, T]``, True on the tokens that the policy chose; padding on either side and holes (tool
            output) are fine. What stands where it is False never enters. None: every token.
        kl_coef: β ≥ 0, a number or a 0-d tensor. With 0 there is no KL term, even where the KL is infinite.
        scores: one a sequence, ``[*]``, or one a token, ``[*, T]``; any of the float dtypes. None: no score.
        estimator, gradient_estimator, input_clamp, output_clamp: as in :func:`approx_kl`.
        score_clip: scores are clamped to ±c, or to a pair (low, high) in which None is open.
        terminal: ``"last"``: a sequence's score stands at its last valid token; ``"one_past"``: one position further,
            if there is one. There the reward is the score alone, even though the mask is False.
        ended: boolean ``[*]``, whether a response ended by itself.
        missing_eos_penalty: a number ≥ 0 for responses that did not; never clipped.
        missing_eos: ``"subtract"`` takes the penalty from the clipped score; ``"replace"`` puts −penalty in its place.
            Where scores come once a token both happen at the last valid one.
        whiten_rewards: whiten the rewards (:func:`masked_whiten`), over the valid tokens and the places of scores.
        whiten_shift_mean: False keeps the mean.
        differentiable_rewards: let gradients flow through ``rewards`` and ``sequence_reward`` to ``logprobs`` and
            ``scores``. Off by default: a policy gradient takes rewards as constants, and with their graph kept
            REINFORCE follows another objective.

    Returns:
        :class:`KLRewards`; float32, float64 for float64 log-probs. A row without a valid token is 0 everywhere.

    Sums over tokens are in float64. Backward saves the arguments, nothing else; a second derivative raises
    NotImplementedError. Accuracy and saturation of the estimators as in :func:`approx_kl`.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that it cannot have.
        ValueError: a shape, device, option or range is wrong. The value of a ``kl_coef`` on a GPU is checked under
            ``rewardfuse.checks(True)``.

    Source: Ziegler et al. 2019, equation 2; Stiennon et al. 2020, section 3.4.

    >>> import torch, rewardfuse
    >>> logprobs, ref = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -1.0, 0.0]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> rewardfuse.kl_penalized_rewards(logprobs, ref, mask, scores=torch.tensor([1.0]), kl_coef=0.1).rewards
    tensor([[-0.0500,  1.1000,  0.0000]])
    """
    _checks.check_tensors(logprobs=logprobs, ref_logprobs=ref_logprobs)
    _checks.check_options(mask)
    shaping = Shaping.of(
        Estimator.of(estimator, gradient_estimator, input_clamp, output_clamp),
        kl_coef=kl_coef,
        scores=scores,
        score_clip=score_clip,
        terminal=terminal,
        ended=ended,
        missing_eos_penalty=missing_eos_penalty,
        missing_eos=missing_eos,
        whiten_rewards=whiten_rewards,
        whiten_shift_mean=whiten_shift_mean,
        differentiable_rewards=differentiable_rewards,
    )
    return shape_rewards(shaping, *promoted(logprobs, ref_logprobs), mask)


def shape_rewards(
    shaping: Shaping,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
) -> KLRewards:
    """The rewards from two tensors of one dtype."""
    namespace = _backend.namespace_for(logprobs)
    arguments = shaping.arguments(logprobs, ref_logprobs, mask)
    if not _backend.is_native(namespace):
        check_rows(logprobs, ref_logprobs, mask, shaping)
    elif _backend.checks_enabled() and not torch.compiler.is_compiling():
        _check_coefficient(shaping.kl_coef)
    rewards, kl, sequence_kl, sequence_reward, stats = namespace.kl_penalized_rewards(*arguments)
    if shaping.whiten:
        rewards = masked_whiten(rewards, _places(mask, shaping), shaping.shift_mean)
    stats = KLStats(*stats.unbind())
    return KLRewards(rewards, kl, logprobs, ref_logprobs, None, sequence_kl, sequence_reward, stats)


def _places(mask: Tensor | None, shaping: Shaping) -> Tensor | None:
    """Where a reward may stand: valid tokens, and the place of a score one past the last of them."""
    if mask is None or not shaping.one_past:
        return mask
    after = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(mask, after, -2).amax(-1, keepdim=True) if mask.shape[-1] else after
    return mask | (after == last + 1)


def check_rows(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, shaping: Shaping) -> None:
    """What csrc/autograd/kl_penalized_rewards.cpp checks, in its order."""
    _checks.check_rewards("logprobs", logprobs)
    if logprobs.dim() == 0:
        raise ValueError("logprobs: expected a tensor [*, T], got a 0-d tensor")
    _checks.check_like("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    if ref_logprobs.dtype is not logprobs.dtype:
        raise TypeError(f"ref_logprobs: expected the dtype of logprobs, {logprobs.dtype}, got {ref_logprobs.dtype}")
    _checks.check_mask(mask, "logprobs", logprobs)
    check_shaping(shaping, "logprobs", logprobs)


def check_shaping(shaping: Shaping, name: str, tokens: Tensor) -> None:
    """The tensors of a shaping beside a tensor `[*, T]` that has one item a token."""
    per_row, per_token = list(tokens.shape[:-1]), list(tokens.shape)
    scores, ended, kl_coef = shaping.scores, shaping.ended, shaping.kl_coef
    if scores is not None:
        _checks.check_rewards("scores", scores)
        if list(scores.shape) not in (per_row, per_token):
            raise ValueError(
                f"scores: expected one a sequence, {per_row}, or one a token, {per_token}, got {list(scores.shape)}"
            )
        _checks.check_device("scores", scores, name, tokens)
        if shaping.one_past and scores.dim() == tokens.dim():
            raise ValueError('terminal: expected "last" with scores a token')
    if ended is not None:
        if ended.dtype is not torch.bool:
            raise TypeError(f"ended: expected a tensor of torch.bool, got {ended.dtype}")
        if list(ended.shape) != per_row:
            raise ValueError(f"ended: expected one a sequence, {per_row}, got {list(ended.shape)}")
        _checks.check_device("ended", ended, name, tokens)
    if kl_coef is not None:
        _checks.check_constants(kl_coef=kl_coef)
        if kl_coef.dim() != 0:
            raise ValueError(f"kl_coef: expected a number or a 0-d tensor, got shape {list(kl_coef.shape)}")
        _checks.check_per_item("kl_coef", kl_coef, name, tokens)
        if _checks.values_are_checked(tokens):
            _check_coefficient(kl_coef)


def _check_coefficient(kl_coef: Tensor | None) -> None:
    if kl_coef is not None:
        value = kl_coef.item()
        _checks.check_number("kl_coef", 0 <= value < float("inf"), "finite and not negative", value)
