"""KL-penalized rewards from the logits of policy and reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardfuse.ops import _checks
from rewardfuse.ops._kl_options import EXACT, Estimator, Shaping
from rewardfuse.ops.kl_penalized_rewards import KLRewards, check_shaping, shape_rewards
from rewardfuse.ops.token_logprobs import Cooling, check_tokens, vocabulary_rows


def kl_penalized_rewards_from_logits(
    policy_logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: Tensor | float,
    estimator: str = "k1",
    gradient_estimator: str | None = None,
    input_clamp: float | tuple[float | None, float | None] | None = None,
    output_clamp: float | tuple[float | None, float | None] | None = None,
    temperature: Tensor | float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    return_entropy: bool = False,
    **options: Any,
) -> KLRewards:
    r"""KL-penalized rewards from logits: one read of each model's logits, no tensor of their size.

    Alignment: ``policy_logits[b, t]`` is the distribution that ``tokens[b, t]`` was drawn from, so a causal model's
    output is shifted by one beforehand: ``logits[:, :-1]`` (no copy is made of it) with ``input_ids[:, 1:]``.

    Args:
        policy_logits: ``[*, T, V]``; float16, bfloat16, float32 or float64.
        ref_logits: of the reference, same shape and dtype; a constant.
        tokens: which token was taken, ``[*, T]``, any integer dtype.
        mask: boolean ``[*, T]``; where False no logits are read, and nothing that stands there enters.
        kl_coef: β ≥ 0, a number or a 0-d tensor.
        estimator: of the KL of a token: ``"k1"``, ``"k2"``, ``"k3"``, ``"abs"`` from the taken token, as in
            :func:`approx_kl`; or exact over the vocabulary: ``"full"``, KL(π‖π_ref) = Σ π (log π − log π_ref), or
            ``"full_forward"``, KL(π_ref‖π).
        gradient_estimator, input_clamp: as in :func:`approx_kl`; not with an exact KL, which has its own gradient.
        output_clamp: as in :func:`approx_kl`.
        temperature, logit_softcap, vocab_size: as in :func:`token_logprobs`, for both models alike.
        return_entropy: also return the policy's entropy.
        **options: ``scores``, ``score_clip``, ``terminal``, ``ended``, ``missing_eos_penalty``, ``missing_eos``,
            ``whiten_rewards``, ``whiten_shift_mean``, ``differentiable_rewards``, as in :func:`kl_penalized_rewards`.

    Returns:
        :class:`KLRewards` with ``logprobs``, ``ref_logprobs`` and, on request, ``entropy``. Gradients of ``kl``,
        ``logprobs`` and ``entropy`` flow to ``policy_logits``: those of the taken token from the policy's logits and
        one saved number a token, those of an exact KL from both models' logits.

    An exact KL is inf where one model excludes (−inf) what the other does not: ``"full"`` where the reference does,
    and the gradient row is NaN then; ``"full_forward"`` where the policy does, and the gradient stays π − π_ref.
    Against float64 it is off by at most 2e-6·max(1, KL).

    Raises:
        TypeError: an argument is no tensor, or of a dtype that it cannot have.
        ValueError: a shape, device, option or range is wrong, or a token is outside the vocabulary, before any work.
            Values on a GPU are checked under ``rewardfuse.checks(True)``; unchecked, such a token's row is NaN.

    >>> import torch, rewardfuse
    >>> policy, ref = torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1, 2)
    >>> rewardfuse.kl_penalized_rewards_from_logits(policy, ref, torch.tensor([[0]]), kl_coef=0.1, estimator="full").kl
    tensor([[0.1109]])
    """
    exact, shaping = shaping_of(estimator, gradient_estimator, input_clamp, output_clamp, kl_coef, options)
    cooling = Cooling.of(temperature, logit_softcap)
    _checks.check_tensors(policy_logits=policy_logits, ref_logits=ref_logits, tokens=tokens)
    policy_logits, ref_logits = _checks.promote_under_autocast(policy_logits, ref_logits)
    _check_models(policy_logits, ref_logits, tokens, mask, cooling)
    check_shaping(shaping, "tokens", tokens)
    shared = (tokens, mask, cooling, vocab_size)
    if exact is not None:
        logprobs, ref_logprobs, kl, entropy = vocabulary_rows(policy_logits, ref_logits, *shared, exact, return_entropy)
    else:
        kl = None
        with torch.no_grad():
            ref_logprobs = vocabulary_rows(ref_logits, None, *shared, None, False)[0]
        logprobs, _, _, entropy = vocabulary_rows(policy_logits, None, *shared, None, return_entropy)
    return rewards_of(shaping, logprobs, ref_logprobs, kl, entropy if return_entropy else None, mask)


def _check_models(
    policy_logits: Tensor, ref_logits: Tensor, tokens: Tensor, mask: Tensor | None, cooling: Cooling
) -> None:
    """Before any work, and by the names that the caller used; what is left, the backend checks."""
    _checks.check_options(mask)
    _checks.check_rewards("policy_logits", policy_logits)
    if policy_logits.dim() == 0:
        raise ValueError("policy_logits: expected a tensor [*, T, V], got a 0-d tensor")
    _checks.check_like("ref_logits", ref_logits, "policy_logits", policy_logits)
    if ref_logits.dtype is not policy_logits.dtype:
        raise TypeError(
            f"ref_logits: expected the dtype of policy_logits, {policy_logits.dtype}, got {ref_logits.dtype}"
        )
    check_tokens(tokens, "policy_logits", policy_logits, mask, cooling.beside(tokens).temperature)
    check_row(tokens)


def check_row(tokens: Tensor) -> None:
    """Rewards are of rows of tokens."""
    if tokens.dim() == 0:
        raise ValueError("tokens: expected a tensor [*, T], got a 0-d tensor")


def shaping_of(
    estimator: str,
    gradient_estimator: str | None,
    input_clamp: object,
    output_clamp: object,
    kl_coef: Tensor | float,
    options: dict[str, Any],
) -> tuple[str | None, Shaping]:
    """(the exact KL that was asked for or None, how rewards are made of the KL)."""
    known = Shaping.of.__kwdefaults__
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: expected an option of kl_penalized_rewards: {', '.join(known)}")
    if not isinstance(estimator, str) or estimator not in EXACT:
        try:
            chosen = Estimator.of(estimator, gradient_estimator, input_clamp, output_clamp)
        except ValueError as error:
            raise ValueError(str(error).replace('expected "k1"', 'expected "full", "full_forward", "k1"')) from None
        return None, Shaping.of(chosen, kl_coef=kl_coef, **options)
    for name, value in (("gradient_estimator", gradient_estimator), ("input_clamp", input_clamp)):
        if value is not None:
            raise ValueError(f'{name}: expected None with estimator="{estimator}", got {value!r}')
    # The KL is known: k1 of it and of 0 is the KL itself, so that one op shapes all rewards.
    return estimator, Shaping.of(Estimator.of("k1", None, None, output_clamp), kl_coef=kl_coef, **options)


def rewards_of(
    shaping: Shaping,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kl: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
) -> KLRewards:
    """Rewards of log-probs, or of an exact KL where there is one."""
    of_what = (logprobs, ref_logprobs) if kl is None else (kl, kl.new_zeros(()).expand(kl.shape))
    shaped = shape_rewards(shaping, *of_what, mask)
    return shaped._replace(logprobs=logprobs, ref_logprobs=ref_logprobs, entropy=entropy)
