"""Calls every CUDA kernel of the native backend, small: what compute-sanitizer watches in `make gpu-check`.

Every storage type, the path of 16-byte accesses and the one of single pairs, one block and several, masks, weights,
repeated and whole-tensor operands, every reduction, both ops, both directions. Results are held against the reference
backend on the CPU, so that a run in which the sanitizer finds nothing has also computed something.
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
    calls, wrong = 0, []
    for (name, op), dtype, items, reduction in itertools.product(OPS.items(), DTYPES, SIZES, REDUCTIONS):
        for layout, (a, b) in enumerate(layouts(items, dtype)):
            for number, chosen in enumerate(options(a.shape, dtype)):
                calls += 1
                if differs(op, a, b, reduction, chosen):
                    wrong.append(f"{name}, {dtype}, {items} items, {reduction}, layout {layout}, options {number}")
    print(f"sanitize: {calls} calls of the native kernels each way, {len(wrong)} differ from the reference")
    for line in wrong[:20]:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
