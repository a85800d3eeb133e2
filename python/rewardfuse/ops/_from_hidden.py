"""The public ops on hidden states; how they compute: _hidden_rows.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardfuse.ops import _checks
from rewardfuse.ops._from_logits import check_row, rewards_of, shaping_of
from rewardfuse.ops._hidden_rows import Head, from_hidden
from rewardfuse.ops.kl_penalized_rewards import KLRewards, check_shaping
from rewardfuse.ops.token_logprobs import Cooling, TokenLogprobs, check_tokens, check_values, widened


def token_logprobs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    memory_budget: int | None = None,
) -> Tensor | TokenLogprobs:
    """Log-probs of the taken tokens from hidden states and the head's weight, without holding batch × vocabulary.

    What :func:`token_logprobs` gives for the logits ``hidden @ weight.T + bias``. Alignment: ``hidden[b, t]`` is the
    state that ``tokens[b, t]`` was drawn from, so a causal model's states are shifted by one beforehand:
    ``hidden[:, :-1]`` with ``input_ids[:, 1:]``.

    Args:
        hidden: last hidden states, ``[*, H]``; float16, bfloat16, float32 or float64.
        weight: of the head, ``[V, H]``, of the same dtype; e.g. ``model.lm_head.weight``. Of a padded vocabulary pass
            ``weight[:vocab_size]``.
        tokens: which token was taken, ``[*]``, any integer dtype.
        bias: of the head, ``[V]``.
        mask: boolean ``[*]``; where False results and gradients are 0, whatever stands there.
        temperature, logit_softcap, return_entropy: as in :func:`token_logprobs`.
        memory_budget: bytes that buffers of logits may take together; None: 9 % of the logits, on a GPU 4.5 %, at least
            4 MiB and at most 1 GiB. A smaller one makes more and thinner matrix products.

    Returns:
        Log-probs ``[*]`` in nats, or :class:`TokenLogprobs`; float32 (float64 for float64 states).

    Gradients flow to ``hidden``, ``weight`` and ``bias``. Backward saves the arguments and one number a token, and
    multiplies again: with V·H·N for a product, forward costs one and backward three. It goes over tiles of the
    vocabulary, so that each tile's weight gradient is one product over all rows (summed in float32 inside it) and the
    states' gradient is added up in float32. On a GPU logits of 16-bit states are kept in float32; torch's CPU products
    round them to 16 bits. Under autocast everything is cast as a linear layer would. A second derivative raises
    NotImplementedError.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that it cannot have.
        ValueError: a shape, device, option or range is wrong, or a token is outside the vocabulary. Values on a GPU are
            checked under ``rewardfuse.checks(True)``; unchecked, such a token's row is NaN.

    >>> import torch, rewardfuse
    >>> rewardfuse.token_logprobs_from_hidden(torch.ones(1, 2, 3), torch.zeros(4, 3), torch.tensor([[3, 1]]))
    tensor([[-1.3863, -1.3863]])
    """
    cooling = Cooling.of(temperature, logit_softcap)
    head = _head("", hidden, weight, bias)
    _check_rows("hidden", head, tokens, mask, cooling, memory_budget)
    logprobs, _, _, entropy = from_hidden(head, None, tokens, mask, cooling, None, return_entropy, memory_budget)
    return TokenLogprobs(logprobs, entropy) if return_entropy else logprobs


def kl_penalized_rewards_from_hidden(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: Tensor | float,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    estimator: str = "k1",
    gradient_estimator: str | None = None,
    input_clamp: float | tuple[float | None, float | None] | None = None,
    output_clamp: float | tuple[float | None, float | None] | None = None,
    temperature: Tensor | float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    memory_budget: int | None = None,
    **options: Any,
) -> KLRewards:
    """KL-penalized rewards from both models' hidden states and head weights, without holding batch × vocabulary.

    What :func:`kl_penalized_rewards_from_logits` gives for the logits ``hidden @ weight.T + bias`` of each model; see
    there for what is not said here.

    Args:
        policy_hidden, ref_hidden: last hidden states, ``[*, T, H]`` each; the widths may differ. ``hidden[b, t]`` is
            the state that ``tokens[b, t]`` was drawn from.
        policy_weight, ref_weight: of the heads, ``[V, H]`` each. Where both are one tensor (LoRA) an exact KL reads it
            once for both models.
        tokens, mask: ``[*, T]``.
        kl_coef: β ≥ 0, a number or a 0-d tensor.
        policy_bias, ref_bias: ``[V]`` each.
        memory_budget: as in :func:`token_logprobs_from_hidden`.

    Returns:
        :class:`KLRewards`. Gradients of ``kl``, ``logprobs`` and ``entropy`` flow to the policy's hidden states, weight
        and bias, never to the reference. Forward costs a matrix product a model, backward three of the policy's (with
        an exact KL the reference's once more).

    >>> import torch, rewardfuse
    >>> states, weight = torch.ones(1, 1, 2), torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    >>> zeros = torch.zeros(2, 2)
    >>> arguments = states, weight, states, zeros, torch.tensor([[0]])
    >>> rewardfuse.kl_penalized_rewards_from_hidden(*arguments, kl_coef=0.1, estimator="full").kl
    tensor([[0.1109]])
    """
    exact, shaping = shaping_of(estimator, gradient_estimator, input_clamp, output_clamp, kl_coef, options)
    cooling = Cooling.of(temperature, logit_softcap)
    policy = _head("policy_", policy_hidden, policy_weight, policy_bias)
    ref = _head("ref_", ref_hidden, ref_weight, ref_bias)
    _check_both(policy, ref)
    _check_rows("policy_hidden", policy, tokens, mask, cooling, memory_budget)
    check_row(tokens)
    check_shaping(shaping, "tokens", tokens)
    if exact is not None:
        results = from_hidden(policy, ref, tokens, mask, cooling, exact, return_entropy, memory_budget)
        logprobs, ref_logprobs, kl, entropy = results
    else:
        kl = None
        with torch.no_grad():
            ref_logprobs = from_hidden(ref, None, tokens, mask, cooling, None, False, memory_budget)[0]
        logprobs, _, _, entropy = from_hidden(policy, None, tokens, mask, cooling, None, return_entropy, memory_budget)
    return rewards_of(shaping, logprobs, ref_logprobs, kl, entropy if return_entropy else None, mask)


def _head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    """A head whose tensors fit each other; raises by the names that the caller used."""
    names = {f"{prefix}hidden": hidden, f"{prefix}weight": weight}
    if bias is not None:
        names[f"{prefix}bias"] = bias
    _checks.check_tensors(**names)
    states = f"{prefix}hidden"
    _checks.check_rewards(states, hidden)
    if hidden.dim() == 0:
        raise ValueError(f"{states}: expected a tensor [*, H], got a 0-d tensor")
    if hidden.shape[-1] == 0:
        raise ValueError(f"{states}: expected a width of at least 1, got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{prefix}weight: expected a tensor [V, {hidden.shape[-1]}] beside {states}, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias: expected one a row of {prefix}weight, [{weight.shape[0]}], got {list(bias.shape)}"
        )
    for name, tensor in list(names.items())[1:]:
        _checks.check_device(name, tensor, states, hidden)
        if not _fits(tensor, hidden):
            raise TypeError(f"{name}: expected the dtype of {states}, {hidden.dtype}, got {tensor.dtype}")
    return Head(hidden, weight, bias)


def _fits(tensor: Tensor, hidden: Tensor) -> bool:
    """Of one dtype, or under autocast of any that it casts."""
    if tensor.dtype is hidden.dtype:
        return True
    return _checks.autocasts(hidden.device) and torch.float64 not in (tensor.dtype, hidden.dtype)


def _check_both(policy: Head, ref: Head) -> None:
    expected = [*policy.hidden.shape[:-1], ref.hidden.shape[-1]]
    if list(ref.hidden.shape) != expected:
        raise ValueError(
            f"ref_hidden: expected the shape of policy_hidden but for its width, {expected}, "
            f"got {list(ref.hidden.shape)}"
        )
    if ref.weight.shape[0] != policy.weight.shape[0]:
        raise ValueError(
            f"ref_weight: expected the vocabulary of policy_weight, {policy.weight.shape[0]}, got {ref.weight.shape[0]}"
        )
    _checks.check_device("ref_hidden", ref.hidden, "policy_hidden", policy.hidden)
    if not _fits(ref.hidden, policy.hidden):
        raise TypeError(
            f"ref_hidden: expected the dtype of policy_hidden, {policy.hidden.dtype}, got {ref.hidden.dtype}"
        )


def _check_rows(
    name: str, head: Head, tokens: Tensor, mask: Tensor | None, cooling: Cooling, memory_budget: int | None
) -> None:
    """What comes once a token, and the budget."""
    _checks.check_tensors(tokens=tokens)
    _checks.check_options(mask)
    if memory_budget is not None:
        if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
            raise TypeError(f"memory_budget: expected a number of bytes, got {type(memory_budget).__name__}")
        if memory_budget < 1:
            raise ValueError(f"memory_budget: expected a positive number of bytes, got {memory_budget}")
    temperature = cooling.beside(tokens).temperature
    check_tokens(tokens, name, head.hidden, mask, temperature)
    if _checks.values_are_checked(tokens):
        check_values(widened(tokens), mask, temperature, head.weight.shape[0])
