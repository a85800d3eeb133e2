"""The emulated kernels as a backend: the functions of rewardfuse.kernels, with csrc/autograd's way to the kernels."""

import torch
from hypothesis import strategies as st

from pairs import strided
from rewardfuse import _backend
from simt.emulator import Strided

GRIDS = (1, 2, 5)
LAYOUTS = ("contiguous", "transposed", "every second")
NONE, MEAN = 0, 2
CHUNK = 1024  # kChunk in kernels/plackett_luce/args.h
LIST_SUMS, PAIR_SUMS, ROW_SUMS = 2, 7, 5


class _Loss(torch.autograd.Function):
    """The loss of a call that knows everything but its leaves."""

    @staticmethod
    def forward(ctx, call, *leaves):
        ctx.call = call
        return call.forward()

    @staticmethod
    def backward(ctx, grad_output):
        return None, *ctx.call.backward(grad_output, ctx.needs_input_grad[1:])


def accumulated(dtype):
    """The type that the maths is done in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def number(tensor, value):
    """An operand that is one number, on the device or not."""
    return value if tensor is None else Strided(tensor)


class _Reduced:
    """What calls on lists and pairs share: how losses become one."""

    def __init__(self, emulator, kernel, reduction, normalizer, normalizer_value):
        self.emulator, self.kernel, self.reduction = emulator, kernel, reduction
        self.has_normalizer = normalizer is not None or normalizer_value != 0
        self.normalizer = number(normalizer, normalizer_value)
        self.denominator = None  # where only the kernel knows it


class _Lists(_Reduced):
    """A call on lists. `items` come once an item; `others` are what else the kernel is given, of which whole tensors
    are contiguous int64."""

    def __init__(self, emulator, kernel, scores, cu_seqlens, lengths, mask, weight, reduced, items, others, saved):
        super().__init__(emulator, kernel, *reduced)
        self.scores, self.dtype = scores, accumulated(scores.dtype)
        self.shape = scores.shape[:-1] if cu_seqlens is None else cu_seqlens[1:].shape
        self.count = self.shape.numel()
        lengths = lengths if mask is None else mask.sum(-1)
        integers = {"cu_seqlens": cu_seqlens, "lengths": lengths}
        integers |= {name: t for name, t in others.items() if isinstance(t, torch.Tensor)}
        self.problem = {
            **others,
            "count": self.count,
            "size": scores.shape[-1],
            "weight": self.by_list(weight) if torch.is_tensor(weight) else weight,
            **{name: self.by_item(t) for name, t in {"scores": scores, "mask": mask, **items}.items()},
            **{name: None if t is None else Strided(t.long().contiguous()) for name, t in integers.items()},
        }
        memory = emulator.empty
        self.saved = memory(*saved(self))
        self.list_loss = memory((self.count,), self.dtype)
        self.loss = self.list_loss if self.reduction == NONE else memory((), self.dtype)
        if self.reduction == MEAN and not self.has_normalizer:
            self.denominator = memory((), torch.float64)

    def by_item(self, tensor):
        if tensor is None:
            return None
        if tensor.dim() == 1:
            return Strided(tensor, 0, tensor.stride(0))
        tensor = tensor.reshape(self.count, tensor.shape[-1])
        return Strided(tensor, *tensor.stride())

    def by_list(self, tensor):
        if tensor.dim() == 0:
            return Strided(tensor)
        tensor = tensor.reshape(self.count)
        return Strided(tensor, tensor.stride(0))

    def results(self):
        return {"saved": self.saved, "list_loss": self.list_loss, "denominator": self.denominator}

    def forward(self):
        self.emulator.run(
            f"{self.kernel}_forward",
            **self.problem,
            **self.results(),
            **self.emulator.scratch(LIST_SUMS),
            loss=self.loss,
            reduction=self.reduction,
            normalizer=self.normalizer,
        )
        return self.loss.tensor.clone().view(self.shape if self.reduction == NONE else ())

    def backward(self, grad_output, _):
        gradient = self.emulator.empty(self.scores.shape, self.scores.dtype)
        self.emulator.run(
            f"{self.kernel}_backward",
            **self.problem,
            **self.results(),
            blocks=self.emulator.blocks,
            gradient=gradient,
            grad_output=self.by_list(grad_output),
            normalizer=self.normalizer,
        )
        return (gradient.tensor.clone(),)


class Pairs(_Reduced):
    """A call on pairs of rewards; `numbers` are what stands for p, the weight (or a tensor), what stands for q, the
    normalizer and the model's options. `stats` and `scratch` are what forward wrote."""

    def __init__(self, emulator, kernel, a, b, p, q, mask, normalizer, numbers, reduction, wants_stats):
        p_value, weight, q_value, normalizer_value, *options = numbers
        super().__init__(emulator, kernel, reduction, normalizer, normalizer_value)
        self.a, self.b, self.p = a, b, p
        tensors = {"a": a, "b": b, "p": p, "q": q, "mask": mask}
        if torch.is_tensor(weight):
            tensors["weight"] = weight
        self.in_rows = all(t is None or t.dim() == 0 or t.is_contiguous() for t in tensors.values())
        self.problem = {
            "items": a.numel(),
            "inner": a.numel() if self.in_rows else a.shape[-1],
            "p": p_value,
            "q": q_value,
            "weight": weight,
            **{name: self.laid(t) for name, t in tensors.items() if t is not None},
            **{f"option_{i}": option for i, option in enumerate(options)},
            "wants_stats": wants_stats,
        }
        dtype, memory = accumulated(a.dtype), emulator.empty
        self.loss = memory(a.shape if reduction == NONE else (), dtype)
        self.stats = memory((5 if wants_stats else 0,), dtype)
        self.counts = reduction == MEAN and mask is not None and not self.has_normalizer
        self.denominator = memory((), torch.float64) if self.counts else None
        self.scratch = emulator.scratch(PAIR_SUMS)

    def laid(self, tensor):
        if tensor.dim() == 0:
            return Strided(tensor)
        if self.in_rows:
            return Strided(tensor, 0, 1)
        tensor = tensor.reshape(-1, tensor.shape[-1])
        return Strided(tensor, *tensor.stride())

    def forward(self):
        self.emulator.run(
            f"{self.kernel}_forward",
            **self.problem,
            **self.scratch,
            loss=self.loss,
            stats=self.stats,
            reduction=self.reduction,
            denominator=self.denominator,
            normalizer=self.normalizer,
        )
        return self.loss.tensor.clone()

    def backward(self, grad_output, needs):
        grad_a, grad_b, grad_p = (
            self.emulator.empty(t.shape, t.dtype) if need else None
            for t, need in zip((self.a, self.b, self.p), needs, strict=True)
        )
        whole_mean = self.reduction == MEAN and not self.counts and not self.has_normalizer
        self.emulator.run(
            f"{self.kernel}_backward",
            **self.problem,
            **self.emulator.scratch(1),
            scale=1 / max(self.a.numel(), 1) if whole_mean else 1,
            grad_output=self.laid(grad_output.contiguous() if self.in_rows else grad_output),
            denominator=self.denominator,
            normalizer=self.normalizer,
            grad_a=grad_a,
            grad_b=grad_b,
            **{"p_total" if needs[2] and self.p.dim() == 0 else "grad_p": grad_p},
        )
        return [None if g is None else g.tensor.clone() for g in (grad_a, grad_b, grad_p)]


class KlRewards:
    """A call of kl_penalized_rewards, with the arguments of backends; `scratch` is what forward wrote."""

    def __init__(self, emulator, logprobs, ref_logprobs, mask, scores, ended, kl_coef, *numbers):
        kl_coef_value, penalty, score_low, score_high, *options, one_past, replace, _ = numbers
        self.emulator, self.logprobs, self.scores = emulator, logprobs, scores
        self.rows, self.size = logprobs.shape[:-1].numel(), logprobs.shape[-1]
        token_scores = scores is not None and scores.dim() == logprobs.dim()
        per_token = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "mask": mask}
        per_row = {"ended": ended, **({} if token_scores else {"scores": scores})}
        if token_scores:
            per_token["scores"] = scores
        self.problem = {
            "rows": self.rows,
            "size": self.size,
            "token_scores": token_scores,
            **{name: self.by_token(t) for name, t in per_token.items()},
            **{name: self.by_row(t) for name, t in per_row.items()},
            "kl_coef": number(kl_coef, kl_coef_value),
            "missing_eos_penalty": penalty,
            "score_low": score_low,
            "score_high": score_high,
            "one_past": one_past,
            "replace": replace,
            **{f"option_{i}": option for i, option in enumerate(options)},
        }
        dtype, shape = accumulated(logprobs.dtype), logprobs.shape
        shapes = {"rewards": shape, "kl": shape, "sequence_kl": shape[:-1], "sequence_reward": shape[:-1]}
        self.results = {name: emulator.empty(shape, dtype) for name, shape in (shapes | {"stats": (6,)}).items()}
        self.scratch = emulator.scratch(ROW_SUMS)

    def by_token(self, tensor):
        if tensor is None:
            return None
        tensor = tensor.reshape(self.rows, self.size)
        return Strided(tensor, *tensor.stride())

    def by_row(self, tensor):
        if tensor is None:
            return None
        tensor = tensor.reshape(self.rows)
        return Strided(tensor, tensor.stride(0))

    def forward(self):
        self.emulator.run("kl_penalized_rewards_forward", **self.problem, **self.scratch, **self.results)
        return tuple(result.tensor.clone() for result in self.results.values())

    def backward(self, grads, needs):
        rewards, kl, sequence_kl, sequence_reward, _ = grads
        wanted = [need and t is not None for need, t in zip(needs, (self.logprobs, self.scores), strict=True)]
        found = [
            self.emulator.empty(t.shape, t.dtype) if want else None
            for t, want in zip((self.logprobs, self.scores), wanted, strict=True)
        ]
        self.emulator.run(
            "kl_penalized_rewards_backward",
            **self.problem,
            blocks=self.emulator.blocks,
            grad_rewards=self.by_token(rewards),
            grad_kl=self.by_token(kl),
            grad_sequence_kl=self.by_row(sequence_kl),
            grad_sequence_reward=self.by_row(sequence_reward),
            d_logprobs=found[0],
            d_scores=found[1],
        )
        return [None if g is None else g.tensor.clone() for g in found]


class _Rewards(torch.autograd.Function):
    """The results of a KlRewards."""

    @staticmethod
    def forward(ctx, call, differentiable, *leaves):
        ctx.call = call
        ctx.set_materialize_grads(False)
        results = call.forward()
        ctx.mark_non_differentiable(*(results[i] for i in ((4,) if differentiable else (0, 3, 4))))
        return results

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *ctx.call.backward(grads, ctx.needs_input_grad[2:])


class Kernels:
    """The backend; `name`, `device` and `interpreted` are what tests ask of one (conftest.Backend)."""

    name, device, interpreted = "simt", "cpu", False

    def __init__(self, emulator):
        self.emulator = emulator

    def plackett_luce_loss(self, *arguments):
        scores, order, cu_seqlens, lengths, mask, top_k, u, v, weight, normalizer, *numbers = arguments
        top_k_value, weight_value, normalizer_value, reduction = numbers

        def saved(call):
            chunks = -(-scores.shape[-1] // CHUNK) if scores.shape[-1] > CHUNK else 0
            packed = scores.numel() // CHUNK + call.count + 1
            return (call.count * chunks if cu_seqlens is None else packed, 2), call.dtype

        lists = (scores, cu_seqlens, lengths, mask, weight_value if weight is None else weight)
        items = {"order": order, "position_weight": u, "item_weight": v}
        others = {"top_k": top_k, "top_k_value": top_k_value}
        reduced = (reduction, normalizer, normalizer_value)
        return _Loss.apply(_Lists(self.emulator, "plackett_luce", *lists, reduced, items, others, saved), scores)

    def all_pairs_loss(self, *arguments):
        scores, labels, lengths, mask, margin, weight, normalizer, *numbers = arguments
        margin_value, weight_value, normalizer_value, reduction = numbers
        lists = (scores, None, lengths, mask, weight_value if weight is None else weight)
        items, others = {"labels": labels}, {"margin": number(margin, margin_value)}
        reduced = (reduction, normalizer, normalizer_value)
        call = _Lists(
            self.emulator, "all_pairs", *lists, reduced, items, others, lambda call: ((call.count,), torch.float64)
        )
        return _Loss.apply(call, scores)

    def bradley_terry_loss(self, *arguments):
        chosen, rejected, margin, mask, weight, target, normalizer, *numbers = arguments
        margin_value, weight_value, target_value, normalizer_value, *options, reduction, return_stats = numbers
        tensors = (chosen, rejected, margin, target, mask, normalizer)
        numbers = (margin_value, weight_value if weight is None else weight, target_value, normalizer_value, *options)
        call = Pairs(self.emulator, "bradley_terry", *tensors, numbers, reduction, return_stats)
        return _Loss.apply(call, chosen, rejected, margin), call.stats.tensor.clone()

    def bradley_terry_tie_loss(self, *arguments):
        first, second, outcome, log_tie, mask, weight, normalizer, *numbers = arguments
        outcome_value, log_tie_value, weight_value, normalizer_value, model, reduction = numbers
        tensors = (first, second, log_tie, outcome, mask, normalizer)
        weight = weight_value if weight is None else weight
        numbers = (log_tie_value, weight, outcome_value, normalizer_value, 0, 0, 0)
        call = Pairs(self.emulator, ("rao_kupper", "davidson")[model], *tensors, numbers, reduction, False)
        return _Loss.apply(call, first, second, log_tie)

    def approx_kl(self, logprobs, ref_logprobs, importance_weight, mask, importance_weight_value, *options):
        numbers = (importance_weight_value, 1, 0, 0, *options)
        tensors = (logprobs, ref_logprobs.detach(), importance_weight, None, mask, None)
        call = Pairs(self.emulator, "approx_kl", *tensors, numbers, NONE, False)
        return _Loss.apply(call, logprobs, ref_logprobs.detach(), importance_weight)

    def kl_penalized_rewards(self, logprobs, ref_logprobs, mask, scores, *others):
        scores = scores if scores is None or others[-1] else scores.detach()
        call = KlRewards(self.emulator, logprobs, ref_logprobs, mask, scores, *others)
        return _Rewards.apply(call, others[-1], logprobs, scores)


def serve(emulator, patch):
    """Lets the emulated kernels serve every op for as long as the pytest.MonkeyPatch lasts."""
    emulator.blocks, emulator.at_end = 1, True
    kernels = Kernels(emulator)
    patch.setattr(_backend, "namespace_for", lambda tensor: kernels)
    return kernels


def draw_launch(draw, kernels):
    """A grid, and which side of the arguments is fenced."""
    kernels.emulator.blocks = draw(st.sampled_from(GRIDS))
    kernels.emulator.at_end = draw(st.booleans())


def draw_layout(draw, arguments):
    """The name of a memory layout, and the arguments in it."""
    layout = draw(st.sampled_from(LAYOUTS))
    return layout, {k: strided(v, layout) if torch.is_tensor(v) and v.dim() else v for k, v in arguments.items()}
