"""Log-probs of taken tokens, entropy and exact KL from logits in plain torch; arguments as backends take them, formulas
in ops/token_logprobs.py. The gradient is written out, so that backward saves no tensor of the vocabulary's size but the
logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NO_KL, REVERSE, FORWARD = range(3)


class _Options(NamedTuple):
    """What applies to both models' logits alike."""

    mask: Tensor | None
    temperature: Tensor | None
    temperature_value: float
    softcap: float
    vocab_size: int

    def scores(self, logits: Tensor) -> Tensor:
        """Capped, cooled logits ``[*, vocab_size]`` in the accumulation type, 0 in masked rows."""
        dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
        scores = logits[..., : self.vocab_size].to(dtype)
        if self.mask is not None:
            scores = torch.where(self.mask.unsqueeze(-1), scores, 0)
        if self.softcap != 0:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        return scores / self.cooling(dtype)

    def cooling(self, dtype: torch.dtype) -> Tensor | float:
        """The temperature, a number or ``[*, 1]``; 1 in masked rows."""
        if self.temperature is None:
            return self.temperature_value
        temperature = self.temperature.to(dtype)
        if self.mask is not None:
            temperature = torch.where(self.mask, temperature, 1)
        return temperature.unsqueeze(-1)

    def select(self, values: Tensor) -> Tensor:
        """0 in masked rows."""
        return values if self.mask is None else torch.where(self.mask, values, 0)


def _log_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs ``[*, V]``, log-sum-exp ``[*]``), NaN where the latter is not finite. In float32 the log-sum-exp would
    lose what log-probs of logits far from 0 need."""
    largest = scores.amax(-1, keepdim=True)
    total = (scores - largest).exp().sum(-1, dtype=torch.float64)
    return scores.log_softmax(-1), largest.squeeze(-1).double() + total.log()


def _minus(scores: Tensor, lse: Tensor) -> Tensor:
    """Scores ``[*, V]`` minus float64 ``[*]``, in the scores' type without rounding the latter to it."""
    high = lse.to(scores.dtype)
    low = (lse - high).to(scores.dtype)
    return (scores - high.unsqueeze(-1)) - low.unsqueeze(-1)


def _expectation(probs: Tensor, values: Tensor) -> Tensor:
    """Σ p·v where p is not 0, ``[*]``."""
    return torch.where(probs == 0, 0, probs * values).sum(-1, dtype=torch.float64).to(probs.dtype)


def _token_logprobs_forward(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
    direction: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, ref_logprobs, kl, entropy, log-sum-exps of both in float64), ``[*]`` or, absent, ``[0]``."""
    options = _Options(mask, temperature, temperature_value, softcap, vocab_size)
    known = (tokens >= 0) & (tokens < vocab_size)
    index = torch.where(known, tokens, 0).long().unsqueeze(-1)

    def taken(logp: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        lse = torch.where(known, lse, torch.nan)
        return options.select(torch.where(known, logp.gather(-1, index).squeeze(-1), torch.nan)), options.select(lse)

    logp, lse = _log_softmax(options.scores(logits))
    logprobs, saved_lse = taken(logp, lse)
    probs = logp.exp() if entropy or direction == REVERSE else None
    of_policy = options.select(-_expectation(probs, logp)) if entropy else logp.new_empty(0)
    if ref_logits is None:
        ref_logprobs, kl, ref_lse = (logp.new_empty(0) for _ in range(3))
        return logprobs, ref_logprobs, kl, of_policy, saved_lse, ref_lse
    logq, ref_lse = _log_softmax(options.scores(ref_logits))
    ref_logprobs, saved_ref_lse = taken(logq, ref_lse)
    kl = _expectation(probs, logp - logq) if direction == REVERSE else _expectation(logq.exp(), logq - logp)
    return logprobs, ref_logprobs, options.select(kl), of_policy, saved_lse, saved_ref_lse


def _token_logprobs_backward(
    grad_logprobs: Tensor | None,
    grad_kl: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    kl: Tensor,
    entropy: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
    direction: int,
) -> Tensor:
    """The gradient of the logits. Of rows wider than these logits too: `lse` is theirs, and a token elsewhere is none
    of these."""
    options = _Options(mask, temperature, temperature_value, softcap, vocab_size)
    logp = _minus(options.scores(logits), lse)
    probs = logp.exp()
    slope = torch.zeros_like(logp)
    if grad_logprobs is not None:
        index = torch.arange(vocab_size, device=tokens.device)
        chosen = (tokens.unsqueeze(-1) == index).to(logp.dtype)
        slope = slope + (chosen - probs) * _column(grad_logprobs, logp)
    if grad_entropy is not None:
        inner = torch.where(probs == 0, 0, probs * (logp + entropy.unsqueeze(-1)))
        slope = slope - _asked(grad_entropy, inner)
    if grad_kl is not None:
        logq = _minus(options.scores(ref_logits), ref_lse)
        if direction == REVERSE:
            inner = torch.where(probs == 0, 0, probs * ((logp - logq) - kl.unsqueeze(-1)))
        else:
            inner = probs - logq.exp()
        slope = slope + _asked(grad_kl, inner)
    slope = slope / options.cooling(logp.dtype)
    if softcap != 0:
        slope = slope / torch.cosh(logits[..., :vocab_size].to(logp.dtype) / softcap).square()
    if mask is not None:
        slope = torch.where(mask.unsqueeze(-1), slope, 0)
    return torch.nn.functional.pad(slope.to(logits.dtype), (0, logits.shape[-1] - vocab_size))


def _asked(grad: Tensor, inner: Tensor) -> Tensor:
    """grad · inner, and 0 in rows where nobody asks for it: there it may be infinite."""
    column = _column(grad, inner)
    return torch.where(column == 0, 0, inner * column)


def _column(grad: Tensor, like: Tensor) -> Tensor:
    return grad.to(like.dtype).unsqueeze(-1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        logits, ref_logits, tokens, mask, temperature, *numbers, wants_entropy = arguments
        logprobs, ref_logprobs, kl, entropy, lse, ref_lse = _token_logprobs_forward(*arguments)
        ctx.save_for_backward(logits, ref_logits, tokens, mask, temperature, kl, entropy, lse, ref_lse)
        ctx.numbers, ctx.wants_entropy = numbers, wants_entropy
        ctx.mark_non_differentiable(ref_logprobs)
        ctx.set_materialize_grads(False)
        return logprobs, ref_logprobs, kl, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _, grad_kl, grad_entropy):
        if torch.is_grad_enabled():
            raise NotImplementedError("token_logprobs: a second derivative (create_graph=True) is not implemented")
        has_kl = ctx.saved_tensors[1] is not None
        grads = (grad_logprobs, grad_kl if has_kl else None, grad_entropy if ctx.wants_entropy else None)
        if not ctx.needs_input_grad[0] or all(grad is None for grad in grads):
            return (None,) * 10
        return _token_logprobs_backward(*grads, *ctx.saved_tensors, *ctx.numbers), *[None] * 9


def token_logprobs(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
    direction: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, ref_logprobs, kl, entropy), ``[*]`` or, absent, ``[0]``."""
    numbers = (temperature_value, softcap, vocab_size, direction, entropy)
    return _TokenLogprobs.apply(logits, ref_logits, tokens, mask, temperature, *numbers)
