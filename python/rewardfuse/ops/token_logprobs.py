"""Log-probs of taken tokens and the entropy, from logits in one read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewardfuse import _backend
from rewardfuse.ops import _checks
from rewardfuse.ops._kl_options import EXACT


class TokenLogprobs(NamedTuple):
    """What ``token_logprobs(..., return_entropy=True)`` returns; each of the tokens' shape, with gradients."""

    logprobs: Tensor  #: log-prob of the taken token, in nats
    entropy: Tensor  #: of the distribution that it was drawn from, in nats


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    return_entropy: bool = False,
) -> Tensor | TokenLogprobs:
    r"""Log-probs of the taken tokens, without a tensor of the vocabulary's size, in one read of the logits.

    .. math:: \log π(a) = p_a - \log \sum_{j<n} e^{p_j}, \qquad p_j = \mathrm{cap}(z_j) / τ, \qquad
              \mathrm{cap}(z) = c \tanh(z / c)

    Alignment: ``logits[b, t]`` is the distribution that ``tokens[b, t]`` was drawn from, so a causal model's output is
    shifted by one beforehand: ``logits[:, :-1]`` (no copy is made of it) with ``input_ids[:, 1:]``.

    Args:
        logits: :math:`z`, ``[*, V]``; float16, bfloat16, float32 or float64.
        tokens: which token was taken, ``[*]``, any integer dtype.
        mask: boolean ``[*]``; where False neither logits nor tokens are read, results and gradients are 0.
        temperature: :math:`τ > 0`, after the cap: a number, a 0-d tensor, one a sequence (the shape of ``tokens``
            without its last dimension), or one a token.
        logit_softcap: :math:`c > 0`, as in Gemma 2. None: no cap.
        vocab_size: :math:`n`, how many of the V logits are real where a vocabulary was padded. None: all. What stands
            beyond is not read, and its gradient is 0.
        return_entropy: also return the entropy.

    Returns:
        Log-probs ``[*]`` in nats, or :class:`TokenLogprobs`; float32 (float64 for float64 logits) whatever the storage.

    Gradients flow to ``logits``; backward reads them again and saves one number a token besides. A second derivative
    raises NotImplementedError. A row of −inf, or with a NaN or +inf, is NaN, for itself alone; single logits of −inf
    are fine. Against float64 a log-prob is off by at most 2e-6·max(1, |log-prob|).

    On a GPU this op is served by Triton, whatever else is built.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that it cannot have.
        ValueError: a shape, device, option or range is wrong, or a token is outside the vocabulary. Values on a GPU are
            checked under ``rewardfuse.checks(True)``; unchecked, such a token's row is NaN.

    >>> import torch, rewardfuse
    >>> rewardfuse.token_logprobs(torch.zeros(1, 2, 4), torch.tensor([[3, 1]]))
    tensor([[-1.3863, -1.3863]])
    """
    cooling = Cooling.of(temperature, logit_softcap)
    logprobs, _, _, entropy = vocabulary_rows(logits, None, tokens, mask, cooling, vocab_size, None, return_entropy)
    return TokenLogprobs(logprobs, entropy) if return_entropy else logprobs


class Cooling(NamedTuple):
    """What logits go through before the softmax."""

    temperature: Tensor | None
    temperature_value: float
    softcap: float  #: 0 for none

    @classmethod
    def of(cls, temperature: Tensor | float, logit_softcap: float | None) -> Cooling:
        """Raises ValueError or TypeError by name."""
        if temperature is None:
            raise TypeError("temperature: expected a number or a tensor, got NoneType")
        tensor, number = _checks.tensor_or_number("temperature", temperature, 1.0)
        _checks.check_number("temperature", 0 < number < math.inf, "positive and finite", number)
        if logit_softcap is None:
            return cls(tensor, number, 0.0)
        _checks.check_options(None, logit_softcap=logit_softcap)
        _checks.check_number("logit_softcap", 0 < logit_softcap < math.inf, "positive and finite", logit_softcap)
        return cls(tensor, number, float(logit_softcap))

    def beside(self, tokens: Tensor) -> Cooling:
        """With a temperature tensor expanded to the tokens' shape."""
        temperature = self.temperature
        if temperature is None or temperature.shape == tokens.shape:
            return self
        if temperature.dim() not in (0, tokens.dim() - 1) or (
            temperature.dim() and temperature.shape != tokens.shape[:-1]
        ):
            raise ValueError(
                f"temperature: expected a number, a 0-d tensor, one a sequence, {list(tokens.shape[:-1])}, or one a "
                f"token, {list(tokens.shape)}, got {list(temperature.shape)}"
            )
        if temperature.dim():
            temperature = temperature.unsqueeze(-1)
        return self._replace(temperature=temperature.expand(tokens.shape))


def vocabulary_rows(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    cooling: Cooling,
    vocab_size: int | None,
    exact: str | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, ref_logprobs, kl, entropy), absent ones of size 0; `exact` names the KL to a reference."""
    _checks.check_tensors(logits=logits, tokens=tokens, **({} if ref_logits is None else {"ref_logits": ref_logits}))
    _checks.check_options(mask)
    if vocab_size is None:
        vocab_size = logits.shape[-1] if logits.dim() else 0
        if logits.dim() and vocab_size == 0:
            raise ValueError(f"logits: expected at least one logit a row, got {list(logits.shape)}")
    elif isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"vocab_size: expected an int, got {type(vocab_size).__name__}")
    tokens = widened(tokens)
    cooling = cooling.beside(tokens)
    namespace = _backend.namespace_for(logits, "token_logprobs")
    ref_logits = None if ref_logits is None else ref_logits.detach()
    arguments = (logits, ref_logits, tokens, mask, *cooling, vocab_size, EXACT.get(exact, 0), bool(entropy))
    if not _backend.is_native(namespace):
        _check(*arguments)
    elif _backend.checks_enabled() and not torch.compiler.is_compiling():
        check_values(tokens, mask, cooling.temperature, vocab_size)
    return namespace.token_logprobs(*arguments)


def widened(tokens: Tensor) -> Tensor:
    """Integer tokens as int64: a narrow type could not hold the vocabulary's size that they are compared with."""
    narrow = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype in (torch.bool, torch.int64))
    return tokens.long() if narrow else tokens


def _check(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
    *_: Any,
) -> None:
    """What csrc/autograd/token_logprobs.cpp checks, in its order."""
    _checks.check_rewards("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits: expected a tensor [*, V], got a 0-d tensor")
    if ref_logits is not None:
        _checks.check_like("ref_logits", ref_logits, "logits", logits)
        if ref_logits.dtype is not logits.dtype:
            raise TypeError(f"ref_logits: expected the dtype of logits, {logits.dtype}, got {ref_logits.dtype}")
    check_tokens(tokens, "logits", logits, mask, temperature)
    size = logits.shape[-1]
    if not 1 <= vocab_size <= size:
        raise ValueError(f"vocab_size: expected from 1 to {size}, got {vocab_size}")
    if _checks.values_are_checked(tokens):
        check_values(tokens, mask, temperature, vocab_size)


def check_tokens(tokens: Tensor, name: str, rows: Tensor, mask: Tensor | None, temperature: Tensor | None) -> None:
    """Tokens beside a tensor `[*, n]` of one row each, and what comes once a token."""
    if tokens.dtype is torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise TypeError(f"tokens: expected a tensor of an integer dtype, got {tokens.dtype}")
    expected = list(rows.shape[:-1])
    if list(tokens.shape) != expected:
        raise ValueError(
            f"tokens: expected the shape of {name} without its last dimension, {expected}, got {list(tokens.shape)}"
        )
    _checks.check_device("tokens", tokens, name, rows)
    _checks.check_mask(mask, "tokens", tokens)
    _checks.check_constants(temperature=temperature)
    _checks.check_per_item("temperature", temperature, "tokens", tokens)


def check_values(tokens: Tensor, mask: Tensor | None, temperature: Tensor | None, vocab_size: int) -> None:
    """Tokens in the vocabulary, temperatures positive and finite, at valid places. Waits for the device."""
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    if temperature is not None:
        good = (temperature > 0) & (temperature < torch.inf)
        _checks.check_values("temperature", temperature, good, valid, "positive and finite")
    known = (tokens >= 0) & (tokens < vocab_size)
    _checks.check_values("tokens", tokens, known, valid, f"from 0 to {vocab_size - 1}")
