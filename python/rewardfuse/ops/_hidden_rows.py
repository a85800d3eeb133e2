"""Log-probs, entropy and exact KL from hidden states, without ever holding batch × vocabulary.

Forward goes over chunks of rows: a matrix product into a buffer of logits, then one row kernel. Backward goes over
tiles of the vocabulary: the product again, the row kernel's gradient from the saved log-sum-exps, and from that the
tile's weight gradient, whole, in one product, and a part of the hidden states' gradient, added up in float32. So the
weight's gradient is accumulated inside one product over all rows, and no accumulator of its size is read and written
for each chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewardfuse import _backend
from rewardfuse.ops import _checks
from rewardfuse.ops._kl_options import EXACT
from rewardfuse.ops.token_logprobs import Cooling, widened

#: Bytes of the buffers together: a share of one model's logits in the states' dtype, less on a GPU, and its bounds.
_SHARE, _SHARE_CUDA, _LEAST_BYTES, _MOST_BYTES = 0.09, 0.045, 1 << 22, 1 << 30
#: So many rows of a product are added to the states' gradient at a time: it would take as much memory as the gradient.
_ROWS = 1024


class Head(NamedTuple):
    """Hidden states and the head that makes logits of them."""

    hidden: Tensor  #: ``[N, H]``
    weight: Tensor  #: ``[V, H]``
    bias: Tensor | None  #: ``[V]``

    def logits(self, rows: slice, columns: slice, memory: Tensor | None) -> Tensor:
        """A block of the logits."""
        logits = _product(self.hidden[rows], self.weight[columns].t(), memory)
        return logits if self.bias is None else logits.add_(self.bias[columns])


def _memory(like: Tensor, items: int) -> Tensor | None:
    """Room for the products of a loop on the CPU, whose allocator leaves holes where blocks come and go in turn. On a
    GPU, and in a compiled graph, memory is planned by others."""
    return None if like.is_cuda or torch.compiler.is_compiling() else like.new_empty(items)


def _product(a: Tensor, b: Tensor, memory: Tensor | None) -> Tensor:
    """a·b; in float32 where torch can give it without rounding to 16 bits first."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    if memory is None:
        return torch.mm(a, b)
    rows, columns = a.shape[0], b.shape[1]
    return torch.mm(a, b, out=memory[: rows * columns].view(rows, columns))


class Plan(NamedTuple):
    """Everything of a call that is no tensor, as the ops below take it."""

    temperature_value: float
    softcap: float
    direction: int  #: of an exact KL; 0: none
    entropy: bool
    memory_budget: int  #: 0: by default

    def chunk(self, whole: int, across: int, policy: Head, buffers: int) -> int:
        """How many of `whole` rows (or columns) fit the budget, each `across` logits long in each of the buffers; a
        multiple of 16, which products like, where that many fit."""
        hidden = policy.hidden
        budget = self.memory_budget
        if budget == 0:
            share = _SHARE_CUDA if hidden.is_cuda else _SHARE
            budget = min(max(int(share * whole * across * hidden.element_size()), _LEAST_BYTES), _MOST_BYTES)
        size = hidden.element_size()
        if hidden.is_cuda and size == 2:  # logits are float32 there, and a gradient is narrowed at the end
            size, buffers = 4, buffers + 1
        fits = budget // max(1, across * size * buffers)
        return max(1, min(whole, fits - fits % 16 if fits >= 16 else fits))


class _Saved(NamedTuple):
    policy_hidden: Tensor
    policy_weight: Tensor
    policy_bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    tokens: Tensor
    mask: Tensor | None
    temperature: Tensor | None

    def policy(self) -> Head:
        return Head(self.policy_hidden, self.policy_weight, self.policy_bias)

    def ref(self) -> Head | None:
        return None if self.ref_hidden is None else Head(self.ref_hidden, self.ref_weight, self.ref_bias)


def _pick(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _is_one(policy: Head, ref: Head) -> bool:
    """Whether both models have one weight (LoRA), and no bias beside it."""
    a, b = policy.weight, ref.weight
    same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    return same and policy.bias is None and ref.bias is None


def _logits_of_both(policy: Head, ref: Head | None, rows: slice, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows of both models' logits. Of one head the weight is read once for both: a chunk is few rows, so reading the
    weight is a good part of the product's time."""
    everything = slice(None)
    if ref is None:
        return policy.logits(rows, everything, memory), None
    if _is_one(policy, ref):
        both = policy._replace(hidden=torch.cat([policy.hidden[rows], ref.hidden[rows]]))
        return both.logits(everything, everything, memory).chunk(2)
    halves = (None, None) if memory is None else memory.chunk(2)
    return policy.logits(rows, everything, halves[0]), ref.logits(rows, everything, halves[1])


class _FromHidden(torch.autograd.Function):
    """(logprobs, ref_logprobs, kl, entropy) of N tokens, absent ones of size 0."""

    @staticmethod
    def forward(ctx, plan: Plan, *tensors: Tensor | None):
        saved = _Saved(*tensors)
        results = _kernel(saved, "forward")(*saved, *plan)
        ctx.plan = plan
        ctx.save_for_backward(*saved, *results[2:])
        ctx.mark_non_differentiable(results[1])
        ctx.set_materialize_grads(False)
        return results[:4]

    @staticmethod
    def backward(ctx, grad_logprobs, _, grad_kl, grad_entropy):
        if torch.is_grad_enabled():
            raise NotImplementedError("from hidden states: a second derivative (create_graph=True) is not implemented")
        plan, tensors = ctx.plan, ctx.saved_tensors
        count = len(_Saved._fields)
        grads = (grad_logprobs, grad_kl if plan.direction else None, grad_entropy if plan.entropy else None)
        nothing = (None,) * (count + 1)
        needs = ctx.needs_input_grad[1:4]
        if not any(needs) or all(grad is None for grad in grads):
            return nothing
        found = _kernel(tensors[0], "backward")(*grads, *tensors, *plan, *needs)
        return None, *(x if need else None for x, need in zip(found, needs, strict=True)), *nothing[4:]


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """(logprobs, ref_logprobs, kl, entropy, lse, ref_lse), ``[N]`` or, absent, ``[0]``."""
    saved, plan = _Saved(*arguments[: len(_Saved._fields)]), Plan(*arguments[len(_Saved._fields) :])
    namespace = _backend.namespace_for(saved.policy_hidden, "token_logprobs")
    policy, ref = saved.policy(), saved.ref()
    count, vocab_size = len(saved.tokens), len(policy.weight)
    models = 1 if ref is None else 2
    step = plan.chunk(count, vocab_size, policy, models)
    memory = _memory(policy.hidden, models * step * vocab_size)
    parts = []
    for first in range(0, max(count, 1), step):
        rows = slice(first, first + step)
        logits, ref_logits = _logits_of_both(policy, ref, rows, memory)
        given = (saved.tokens[rows], _pick(saved.mask, rows), _pick(saved.temperature, rows))
        options = (plan.temperature_value, plan.softcap, vocab_size, plan.direction, plan.entropy)
        parts.append(namespace._token_logprobs_forward(logits, ref_logits, *given, *options))
        del logits, ref_logits
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the policy's hidden states, weight and bias, ``[0]`` where not needed, tile by tile of the
    vocabulary."""
    grads, rest = arguments[:3], arguments[3:]
    count = len(_Saved._fields)
    saved, results, plan, needs = _Saved(*rest[:count]), rest[count:-8], Plan(*rest[-8:-3]), rest[-3:]
    namespace = _backend.namespace_for(saved.policy_hidden, "token_logprobs")
    policy = saved.policy()
    ref = None if grads[1] is None else saved.ref()
    count, vocab_size = len(saved.tokens), len(policy.weight)
    step = plan.chunk(vocab_size, count, policy, 2 if ref is None else 3)
    hidden, weight, bias = (_gradient_like(tensor, need) for tensor, need in zip(policy, needs, strict=True))
    accumulated = None if hidden is None else hidden.new_zeros(hidden.shape, dtype=_accumulator(hidden.dtype))
    rows = policy.hidden
    if weight is not None and saved.mask is not None:
        rows = rows.masked_fill(~saved.mask.unsqueeze(-1), 0)  # 0 · NaN would be NaN
    direction = 0 if ref is None else plan.direction
    memory, ref_memory = (_memory(rows, count * step) if head is not None else None for head in (policy, ref))
    of_tile = None if hidden is None else _memory(rows, rows[:_ROWS].numel())
    for first in range(0, vocab_size, step):
        columns = slice(first, min(first + step, vocab_size))
        logits = policy.logits(slice(None), columns, memory)
        ref_logits = None if ref is None else ref.logits(slice(None), columns, ref_memory)
        given = (saved.tokens - first, saved.mask, saved.temperature, *results)
        options = (plan.temperature_value, plan.softcap, logits.shape[-1], direction)
        slope = namespace._token_logprobs_backward(
            grads[0], grads[1] if ref is not None else None, grads[2], logits, ref_logits, *given, *options
        ).to(rows.dtype)
        del logits, ref_logits
        if accumulated is not None:
            _add_product(accumulated, slope, policy.weight[columns], of_tile)
        if weight is not None:
            torch.mm(slope.t(), rows, out=weight[columns])
        if bias is not None:
            bias[columns] = slope.sum(0, dtype=_accumulator(slope.dtype))
        del slope  # before the next one is made
    found = (None if hidden is None else accumulated.to(hidden.dtype), weight, bias)
    return tuple(rows.new_empty(0) if x is None else x for x in found)


_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, "
    "Tensor tokens, Tensor? mask, Tensor? temperature"
)
_PLAN = "float temperature_value, float softcap, int direction, bool entropy, int memory_budget"
# Ops, so that a compiler sees one node in place of a loop whose length depends on sizes.
_forward_op = torch.library.custom_op(
    "rewardfuse::_from_hidden_forward",
    _forward,
    mutates_args=(),
    schema=f"({_TENSORS}, {_PLAN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "rewardfuse::_from_hidden_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor? grad_logprobs, Tensor? grad_kl, Tensor? grad_entropy, {_TENSORS}, Tensor kl, Tensor entropies, "
    f"Tensor lse, Tensor ref_lse, {_PLAN}, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    saved, plan = _Saved(*arguments[: len(_Saved._fields)]), Plan(*arguments[len(_Saved._fields) :])
    has_ref = saved.ref_hidden is not None
    wanted = (True, has_ref, has_ref, plan.entropy, True, has_ref)
    dtypes = [_accumulator(saved.policy_hidden.dtype)] * 4 + [torch.float64] * 2
    shape = saved.tokens.shape
    return tuple(
        saved.policy_hidden.new_empty(shape if there else (0,), dtype=dtype)
        for there, dtype in zip(wanted, dtypes, strict=True)
    )


@_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, needs = arguments[3:6], arguments[-3:]
    return tuple(
        inputs[0].new_empty(x.shape if need and x is not None else (0,)) for x, need in zip(inputs, needs, strict=True)
    )


def _kernel(like: Any, name: str) -> Any:
    """The function itself for plain tensors, the op for a compiler, for fake tensors and for those without data."""
    hidden = like if isinstance(like, Tensor) else like.policy_hidden
    plain = type(hidden) in (Tensor, torch.nn.Parameter) and hidden.device.type != "meta"
    if plain and not torch.compiler.is_compiling():
        return _forward if name == "forward" else _backward
    return getattr(torch.ops.rewardfuse, f"_from_hidden_{name}")


def _add_product(total: Tensor, a: Tensor, b: Tensor, memory: Tensor | None) -> None:
    """total += a·b, some rows at a time."""
    for rows, part in zip(a.split(_ROWS), total.split(_ROWS), strict=True):
        part += _product(rows, b, memory)


def _gradient_like(tensor: Tensor | None, needed: bool) -> Tensor | None:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed and tensor is not None else None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def from_hidden(
    policy: Head,
    ref: Head | None,
    tokens: Tensor,
    mask: Tensor | None,
    cooling: Cooling,
    exact: str | None,
    entropy: bool,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, ref_logprobs, kl, entropy) of the tokens' shape, absent ones of size 0; arguments are checked."""
    shape = tokens.shape
    cooling = cooling.beside(tokens)
    temperature = None if cooling.temperature is None else cooling.temperature.reshape(-1)
    plan = Plan(cooling.temperature_value, cooling.softcap, EXACT.get(exact, 0), entropy, memory_budget or 0)
    one_weight = ref is not None and ref.weight is policy.weight
    policy = _flat(policy)
    heads = (*policy, None, None, None)
    if ref is not None:
        # Autocast would make two of one.
        ref = _flat(ref._replace(weight=policy.weight) if one_weight else ref)
        heads = (*policy, *(None if t is None else t.detach() for t in ref))
    given = (widened(tokens).reshape(-1), None if mask is None else mask.reshape(-1), temperature)
    results = _FromHidden.apply(plan, *heads, *given)
    return tuple(result.reshape(shape) if result.numel() == shape.numel() else result for result in results)


def _flat(head: Head) -> Head:
    """With hidden states ``[N, H]``, and everything in autocast's dtype where that is on, as a linear layer would."""
    device = head.hidden.device
    if _checks.autocasts(device):
        dtype = torch.get_autocast_dtype(device.type)
        head = Head(*(t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in head))
    return head._replace(hidden=head.hidden.reshape(-1, head.hidden.shape[-1]))
