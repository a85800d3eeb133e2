"""Calls every CUDA kernel of the native backend, small: what compute-sanitizer watches in `make gpu-check`.

Every storage type, the path of 16-byte accesses and the one of single pairs, one block and several, masks, weights,
repeated and whole-tensor operands, every reduction, every op, both directions; of the ops on lists also every way to
say what a list holds, and teams of lanes, of warps and of blocks. Results are held against the reference backend on the
CPU, so that a run in which the sanitizer finds nothing has also computed something.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import rewardfuse

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
REDUCTIONS = ("none", "sum", "mean")
#: one pair; a tail beside 16-byte accesses; several blocks, so that the reduction across blocks runs
SIZES = (1, 67, 5000)
#: lists and items: a lane a list, two, a warp, a block with more than a chunk
LISTS = ((3, 1), (300, 6), (9, 67), (3, 1501))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
Options = dict[str, Tensor | float | None]


def layouts(items: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Two rewards each: packed, misaligned, strided, two strided dimensions, repeated."""
    both = torch.randn(2, items + 1).to(DEVICE, dtype)
    yield both[0, :items].clone(), both[1, :items].clone()
    yield both[0, 1:], both[1, 1:]
    strided = torch.randn(items, 4).to(DEVICE, dtype)
    yield strided[:, 0], strided[:, 2]
    yield strided[:, :2], strided[:, 2:]
    yield strided[:1, 0].expand(items), strided[:, 1]


def options(shape: torch.Size, dtype: torch.dtype) -> Iterator[Options]:
    """What may come with the rewards: nothing, whole tensors (the mask in another layout), repeated ones."""
    yield {"parameter": 0.5}
    mask = torch.rand(shape[::-1]).movedim(0, -1).to(DEVICE) < 0.7
    weight = torch.rand(shape).to(DEVICE) * mask
    yield {"parameter": torch.rand(shape).to(DEVICE, dtype), "mask": mask, "weight": weight}
    yield {"parameter": torch.tensor(0.7, device=DEVICE), "mask": mask, "weight": torch.tensor(2, device=DEVICE)}


def bradley_terry(a: Tensor, b: Tensor, reduction: str, parameter: Tensor | float, **rest: Any) -> Tensor:
    """Every term of the loss, and the statistics, which are added so that they are compared as well."""
    loss, stats = rewardfuse.bradley_terry_loss(
        a,
        b,
        parameter,
        target=torch.full(a.shape, 0.75, device=a.device),
        label_smoothing=0.1,
        beta=0.5,
        center_rewards_coefficient=0.01,
        reduction=reduction,
        normalizer=torch.tensor(3.0, device=a.device) if reduction == "mean" and "mask" not in rest else None,
        return_stats=True,
        **rest,
    )
    return loss + sum(stats)


def ties(model: str) -> Callable[..., Tensor]:
    """The loss with ties of one model."""

    def loss(a: Tensor, b: Tensor, reduction: str, parameter: Tensor | float, **rest: Any) -> Tensor:
        outcome = torch.arange(a.numel(), device=a.device).reshape(a.shape) % 3 / 2
        return rewardfuse.bradley_terry_tie_loss(
            a, b, outcome, log_tie=parameter, model=model, reduction=reduction, **rest
        )

    return loss


OPS = {"bradley_terry": bradley_terry, "rao_kupper": ties("rao_kupper"), "davidson": ties("davidson")}


def run(backend: str, op: Callable[..., Tensor], a: Tensor, b: Tensor, reduction: str, chosen: Options) -> list[Tensor]:
    """Loss and gradients by one backend, in float64 on the CPU."""
    wanted = [a, b] + [chosen["parameter"]] * isinstance(chosen["parameter"], Tensor)
    wanted = [x.detach().requires_grad_() for x in wanted]
    with rewardfuse.use_backend(backend):
        loss = op(*wanted[:2], reduction, **{**chosen, **dict(zip(["parameter"], wanted[2:], strict=False))})
        gradients = torch.autograd.grad(loss, wanted, torch.full_like(loss, 0.5).expand_as(loss))
    return [x.detach().double().cpu() for x in (loss, *gradients)]


def differs(op: Callable[..., Tensor], a: Tensor, b: Tensor, reduction: str, chosen: Options) -> bool:
    """Whether the native backend on the device and the reference on the CPU disagree."""
    found = run("native", op, a, b, reduction, chosen)
    on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in chosen.items()}
    expected = run("reference", op, a.cpu(), b.cpu(), reduction, on_cpu)
    tolerance = TOLERANCE[a.dtype]
    return not all(torch.allclose(x, y, tolerance, tolerance) for x, y in zip(found, expected, strict=True))


def list_layouts(lists: int, items: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Scores of lists: rows that allow 16-byte accesses where their length does, misaligned rows, columns, repeated."""
    scores = torch.randn(lists, items + 1).to(DEVICE, dtype)
    yield scores[:, :items].contiguous()
    yield scores[:, 1:]
    yield scores[:, 1:].t().contiguous().t()
    yield scores[:1, 1:].expand(lists, items)


def flat(scores: Tensor, **rest: Any) -> Tensor:
    """The packed op on the scores of a matrix."""
    return rewardfuse.plackett_luce_loss_packed(scores.flatten(), **rest)


def list_calls(lists: int, items: int) -> Iterator[tuple[Callable[..., Tensor], dict[str, Any]]]:
    """Ops on lists and what comes with the scores."""
    lengths = torch.randint(0, items + 1, (lists,), device=DEVICE)
    mask = torch.rand(lists, items, device=DEVICE) < 0.7
    order = torch.where(mask, torch.rand(lists, items, device=DEVICE), torch.inf).argsort(-1)
    ranks = torch.randint(1, 4, (lists, items), device=DEVICE)
    weight = torch.arange(lists, device=DEVICE) % 3
    by_position = torch.randint(0, 3, (items,), device=DEVICE) / 2
    cuts = torch.randint(0, lists * items + 1, (lists - 1,), device=DEVICE).sort().values
    bounds = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), lists * items)])
    padded = rewardfuse.plackett_luce_loss
    yield padded, {}
    yield padded, {"lengths": lengths, "top_k": lengths.clamp(min=1), "weight": weight}
    yield padded, {"mask": mask, "position_weight": by_position, "top_k": 3}
    yield padded, {"order": order, "mask": mask.clone(), "weight": 0.5}
    yield padded, {"order": order.int().t().contiguous().t(), "mask": mask}
    yield padded, {"ranks": ranks, "lengths": lengths, "position_weight": by_position}
    yield padded, {"ranks": ranks, "mask": mask, "ties": "efron", "weight": weight}
    yield flat, {"cu_seqlens": bounds}
    yield flat, {"cu_seqlens": bounds, "ranks": ranks.flatten(), "top_k": 2}
    if items <= 300:
        yield rewardfuse.all_pairs_loss, {"labels": ranks, "lengths": lengths, "weight": weight}
        yield rewardfuse.all_pairs_loss, {"labels": ranks.float(), "mask": mask, "margin": weight[-1] / 2}


def run_lists(
    backend: str, op: Callable[..., Tensor], scores: Tensor, reduction: str, arguments: dict[str, Any]
) -> list[Tensor]:
    """Loss and gradient by one backend, in float64 on the CPU."""
    scores = scores.detach().requires_grad_()
    with rewardfuse.use_backend(backend):
        loss = op(scores, reduction=reduction, **arguments)
        (gradient,) = torch.autograd.grad(loss, scores, torch.full_like(loss, 0.5).expand_as(loss))
    return [x.detach().double().cpu() for x in (loss, gradient)]


def check_lists(dtype: torch.dtype, lists: int, items: int, reduction: str) -> Iterator[str | None]:
    """For every call what differs, or None."""
    for layout, scores in enumerate(list_layouts(lists, items, dtype)):
        for number, (op, arguments) in enumerate(list_calls(lists, items)):
            if reduction == "mean" and number % 2:
                arguments["normalizer"] = torch.tensor(3.0, device=DEVICE)
            found = run_lists("native", op, scores, reduction, arguments)
            on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in arguments.items()}
            expected = run_lists("reference", op, scores.cpu(), reduction, on_cpu)
            same = all(torch.allclose(x, y, *[TOLERANCE[dtype]] * 2) for x, y in zip(found, expected, strict=True))
            call = f"{op.__name__}, {dtype}, {lists} lists of {items}, {reduction}, layout {layout}, call {number}"
            yield None if same else call


def check_pairs(dtype: torch.dtype, items: int, reduction: str) -> Iterator[str | None]:
    """For every call what differs, or None."""
    for layout, (a, b) in enumerate(layouts(items, dtype)):
        for number, chosen in enumerate(options(a.shape, dtype)):
            for name, op in OPS.items():
                call = f"{name}, {dtype}, {items} items, {reduction}, layout {layout}, options {number}"
                yield call if differs(op, a, b, reduction, chosen) else None


def reward_calls(rows: int, tokens: int) -> Iterator[dict[str, Any]]:
    """What comes with the log-probs of KL-penalized rewards."""
    holes = torch.rand(rows, tokens, device=DEVICE) < 0.7
    padded = torch.arange(tokens, device=DEVICE) >= torch.randint(0, tokens + 1, (rows, 1), device=DEVICE)
    scores, ended = torch.randn(rows, device=DEVICE), torch.rand(rows, device=DEVICE) < 0.5
    yield {"kl_coef": 0.1}
    yield {"mask": holes, "kl_coef": torch.tensor(0.1, device=DEVICE), "scores": scores, "terminal": "one_past"}
    yield {"mask": padded, "kl_coef": 0.1, "scores": scores.double(), "ended": ended, "missing_eos_penalty": 1.0}
    of_tokens = torch.randn(tokens, rows, device=DEVICE).t()
    yield {"mask": holes, "kl_coef": 0.0, "scores": of_tokens, "score_clip": 0.5, "output_clamp": 2.0}


def run_rewards(backend: str, logprobs: Tensor, ref_logprobs: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    """Rewards, sums, statistics and the gradient by one backend, in float64 on the CPU."""
    logprobs = logprobs.detach().requires_grad_()
    with rewardfuse.use_backend(backend):
        shaped = rewardfuse.kl_penalized_rewards(logprobs, ref_logprobs, differentiable_rewards=True, **arguments)
        total = shaped.kl.sum() + shaped.sequence_kl.sum() + shaped.sequence_reward.sum()
        (gradient,) = torch.autograd.grad(total, logprobs)
    return [x.detach().double().cpu() for x in (shaped.rewards, shaped.kl, *shaped.stats, gradient)]


def check_rewards(dtype: torch.dtype, rows: int, tokens: int, estimator: str) -> Iterator[str | None]:
    """For every call what differs, or None."""
    for layout, logprobs in enumerate(list_layouts(rows, tokens, dtype)):
        ref_logprobs = logprobs.flip(-1)
        for number, arguments in enumerate(reward_calls(*logprobs.shape)):
            arguments["estimator"] = estimator
            found = run_rewards("native", logprobs, ref_logprobs, arguments)
            on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in arguments.items()}
            expected = run_rewards("reference", logprobs.cpu(), ref_logprobs.cpu(), on_cpu)
            same = all(torch.allclose(x, y, *[TOLERANCE[dtype]] * 2) for x, y in zip(found, expected, strict=True))
            call = (
                f"kl_penalized_rewards, {dtype}, {rows} rows of {tokens}, {estimator}, layout {layout}, call {number}"
            )
            yield None if same else call


def checks() -> Iterator[str | None]:
    """Every call of every op."""
    for dtype, estimator, (rows, tokens) in itertools.product(DTYPES, ("k1", "k3"), LISTS):
        yield from check_rewards(dtype, rows, tokens, estimator)
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        for items in SIZES:
            yield from check_pairs(dtype, items, reduction)
        for lists, items in LISTS:
            yield from check_lists(dtype, lists, items, reduction)


def main() -> int:
    """0 where the native backend agrees with the reference everywhere, 1 where not, 2 where it cannot run."""
    try:
        with rewardfuse.use_backend("native"):
            rewardfuse.backend(DEVICE)
        torch.zeros((), device=DEVICE)
    except RuntimeError as error:
        print(f"sanitize: needs the native backend and a GPU: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    results = list(checks())
    wrong = [call for call in results if call]
    print(f"sanitize: {len(results)} calls of the native kernels each way, {len(wrong)} differ from the reference")
    for line in wrong[:20]:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
