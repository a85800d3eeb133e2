"""The cases of ``rewardfuse bench kl_rewards``: rewards from log-probs, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewardfuse.bench import kl_lines as lines
from rewardfuse.bench import kl_peers as peers
from rewardfuse.bench.case import BACKWARD, BOTH, FORWARD, Aim, Case, Memory
from rewardfuse.bench.clocks import Step
from rewardfuse.bench.contestants import Settings, contestants

NOTE = (
    "torch from logits: log_softmax of both in float32, a gather, (p.exp() * (p - q)).sum(-1); for k3 logsumexp and\n"
    "a gather, expm1(-x) + x. From hidden states: the same of hidden @ weight.T. From log-probs: k3, where,\n"
    "scatter_add, sums, means. Backward is of the mean KL; a case without it keeps no graph. GEMMs alone: torch.mm of\n"
    "the same shapes and dtype, whole: 2 forward, 5 in all (both models', the policy's again, two for the gradients).\n"
    "Peers that give less than rewards, KL and log-probs are timed for what they give."
)
GEMMS = "GEMMs alone"
LINES = {"full": lines.plain_full, "full_forward": lines.plain_full_forward, "k3": lines.plain_k3}
SLOW = dict.fromkeys(("reference", "torch.compile"), "takes as many seconds a step as torch, or more")
SLOW_REFERENCE = {"reference": "takes several times torch's time; see the float32 case without a graph"}
#: vocabulary-sized tensors that a direction must read or write
LOGITS_MOVED = {("k3", FORWARD): 2, ("k3", BACKWARD): 2, ("full", FORWARD): 2, ("full", BACKWARD): 3}
BFLOAT16 = torch.bfloat16
#: Sequences in a batch: the tokens of every case stand in so many rows.
SEQUENCES = 4


class Size(NamedTuple):
    """Of a case with a vocabulary."""

    tokens: int
    vocabulary: int
    width: int = 0  #: of the hidden states


def cases(settings: Settings) -> Iterator[Case]:
    """The cases for a device; each holds its tensors only while it is measured."""
    yield from gpu_cases(settings) if settings.device.type == "cuda" else cpu_cases(settings)


def cpu_cases(settings: Settings) -> Iterator[Case]:
    """Two threads, the sizes of a small batch."""
    quick = settings.quick
    yield _shaping(settings, 8 if quick else 64, 64 if quick else 1024)
    size = Size(16, 1000) if quick else Size(256, 151936)
    alone, whole = {"torch": 1 / 28, "torch.compile": 1 / 2.5}, {"torch": 1 / 10, "torch.compile": 1 / 2}
    yield _logits(settings, size, "full", torch.float32, {FORWARD: Aim(alone)}, copy=(FORWARD,))
    alone = {"torch": 1 / 40, "torch.compile": 1 / 2.6}
    if not quick:
        yield _logits(settings, size, "full", BFLOAT16, {FORWARD: Aim(alone)}, copy=(FORWARD,))
        yield _logits(settings, size, "full", torch.float32, {BOTH: Aim(whole)}, copy=(BOTH,))
        yield _logits(settings, size, "full", BFLOAT16, {BOTH: Aim(whole)}, copy=(BOTH,))
        yield _logits(settings, size, "k3", BFLOAT16, {FORWARD: Aim(), BOTH: Aim()}, copy=(BOTH,))
    twice = {peers.TRL_TWICE: peers.trl_logits}
    yield _logits(settings, size, "k3", torch.float32, {FORWARD: Aim(), BOTH: Aim()}, copy=(BOTH,), builders=twice)
    size = Size(32, 500, 16) if quick else Size(2048, 32768, 1024)
    divergence = {peers.TRL_DIVERGENCE: peers.trl_divergence(beta=1.0)}
    forward = {FORWARD: Aim({GEMMS: 1.3}, memory=_memory(size, 0.10))}
    yield _hidden(settings, size, "full", forward, divergence, without=SLOW)
    yield _hidden(settings, size, "k3", forward, {}, without=SLOW)
    yield _hidden(settings, size, "k3", {BOTH: Aim(memory=_memory(size, None, gradients=True))}, {}, without=SLOW)


def gpu_cases(settings: Settings) -> Iterator[Case]:
    """The sizes of one training step."""
    quick = settings.quick
    yield _shaping(settings, 8 if quick else 512, 64 if quick else 4096)
    size = Size(16, 1000) if quick else Size(8192, 151936)
    rival = {peers.TRL_TWICE: 0.8}
    aims = {
        FORWARD: Aim(rival, reach_bandwidth=0.88, memory=Memory(0, {}, reach_peers=rival)),
        BACKWARD: Aim(reach_bandwidth=0.85),
        BOTH: Aim(rival, memory=Memory(0, {}, reach_peers=rival)),
    }
    twice = {peers.TRL_TWICE: peers.trl_logits}
    yield _logits(settings, size, "k3", BFLOAT16, aims, copy=tuple(aims), builders=twice)
    aims = {FORWARD: Aim(reach_bandwidth=0.85), BACKWARD: Aim(reach_bandwidth=0.80), BOTH: Aim()}
    yield _logits(settings, size, "full", BFLOAT16, aims, copy=tuple(aims))
    size = Size(32, 500, 16) if quick else Size(8192, 151936, 4096)
    for estimator, builders in _hidden_peers().items():
        rivals = dict.fromkeys(builders, 0.8)
        products = {GEMMS: 1.3} if estimator != "full_forward" else {}
        memory = _memory(size, 0.05, gradients=True, reach_peers=rivals)
        yield _hidden(settings, size, estimator, {BOTH: Aim({**products, **rivals}, memory=memory)}, builders)


def _hidden_peers() -> dict[str, dict[str, Callable[[], peers.Function]]]:
    return {
        "k3": {
            peers.TRL_TWICE: peers.trl_whole_logits,
            peers.TRL_CHUNKED: peers.trl_chunked,
            peers.TORCH_LINEAR: peers.torch_linear,
        },
        "full": {peers.TRL_DIVERGENCE: peers.trl_divergence(beta=1.0)},
        "full_forward": {peers.TRL_DIVERGENCE: peers.trl_divergence(beta=0.0), peers.LIGER: peers.liger},
    }


def _shaping(settings: Settings, rows: int, length: int) -> Case:
    """Log-probs to rewards: k3, a clipped score at the last token of right-padded responses."""
    generator = torch.Generator(settings.device).manual_seed(rows)
    options = {"generator": generator, "device": settings.device}
    logprobs = -torch.rand(rows, length, **options)
    ref_logprobs = logprobs + 0.3 * torch.randn(rows, length, **options)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), **options)
    mask = torch.arange(length, device=settings.device) < lengths
    tensors = (logprobs, ref_logprobs, mask, 4 * torch.randn(rows, **options))
    aims = {FORWARD: Aim({"torch": 1 / 6})}
    name = f"log-probs {rows} x {length}, k3, score clipped at the last token"
    return _case(settings, name, lines.fused_shaping, lines.plain_shaping, tensors, (), aims)


def _logits(
    settings: Settings,
    size: Size,
    estimator: str,
    dtype: torch.dtype,
    aims: Mapping[str, Aim],
    *,
    copy: Sequence[str] = (),
    builders: Mapping[str, Callable[[], peers.Function]] | None = None,
) -> Case:
    options = _drawn(settings, dtype)
    logits = 2 * torch.randn(SEQUENCES, size.tokens // SEQUENCES, size.vocabulary, **options)
    ref_logits = logits + 0.5 * torch.randn(logits.shape, **options)
    leaves = [logits.requires_grad_()] if BOTH in aims else []
    moved = {d: LOGITS_MOVED[estimator, d] * logits.nbytes for d in (FORWARD, BACKWARD)}
    moved[BOTH] = moved[FORWARD] + moved[BACKWARD]
    aims = {d: aim._replace(copy_bytes=moved[d] if d in copy else 0) for d, aim in aims.items()}
    return _case(
        settings,
        f"logits {size.tokens} x {size.vocabulary}, {estimator}",
        lines.fused_logits(estimator),
        LINES[estimator],
        (logits, ref_logits, _tokens(settings, size)),
        leaves,
        aims,
        builders=builders,
        without=SLOW_REFERENCE if (leaves or dtype is BFLOAT16) and not settings.quick else None,
        native_cuda=False,
        tolerance=1e-4,
        gradient_tolerance=1e-4 if dtype is torch.float32 else 1e-2,
    )


def _hidden(
    settings: Settings,
    size: Size,
    estimator: str,
    aims: Mapping[str, Aim],
    builders: Mapping[str, Callable[[], peers.Function]],
    *,
    without: Mapping[str, str] | None = None,
) -> Case:
    options = _drawn(settings, BFLOAT16)
    hidden, ref_hidden = (torch.randn(SEQUENCES, size.tokens // SEQUENCES, size.width, **options) for _ in range(2))
    weight, ref_weight = (torch.randn(size.vocabulary, size.width, **options) / size.width**0.5 for _ in range(2))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()] if BOTH in aims else []
    products = _products(hidden, weight, ref_hidden, ref_weight)
    aims = {d: aim._replace(beside={GEMMS: products[d]}) for d, aim in aims.items()}
    return _case(
        settings,
        f"hidden {size.tokens} x {size.width} to {size.vocabulary}, {estimator}",
        lines.fused_hidden(estimator),
        lines.from_hidden(LINES[estimator]),
        (hidden, weight, ref_hidden, ref_weight, _tokens(settings, size)),
        leaves,
        aims,
        builders=builders,
        without=without,
        native_cuda=False,
        tolerance=5e-2,  # some round the logits to 16 bits, some do not
    )


def _products(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> dict[str, Step]:
    """The matrix products that a direction cannot do without, alone; what they give is dropped."""
    hidden, ref_hidden = (states.detach().reshape(-1, states.shape[-1]) for states in (hidden, ref_hidden))
    weight = weight.detach()
    slope: list[Tensor] = []

    def forward() -> None:
        torch.mm(hidden, weight.t())
        torch.mm(ref_hidden, ref_weight.t())

    def both() -> None:
        forward()
        if not slope:
            slope.append(torch.mm(hidden, weight.t()))
        torch.mm(hidden, weight.t())
        torch.mm(slope[0], weight)
        torch.mm(slope[0].t(), hidden)

    return {FORWARD: forward, BOTH: both}


def _memory(
    size: Size, reach: float | None, *, gradients: bool = False, reach_peers: Mapping[str, float] | None = None
) -> Memory:
    """What a step from hidden states in bfloat16 must leave: four results a token, and with gradients those of states
    and weight, and an accumulator of the states' in float32. The weight's is written tile by tile and needs none."""
    kept = 4 * 4 * size.tokens
    if gradients:
        kept += 2 * (size.tokens + size.vocabulary) * size.width + 4 * size.tokens * size.width
    one = 2 * size.tokens * size.vocabulary
    whole = {"both models' logits": 2 * one, "one model's": one}
    return Memory(kept, whole, reach, reach_peers or {})


def _drawn(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """Options of torch.randn."""
    generator = torch.Generator(settings.device).manual_seed(0)
    return {"generator": generator, "device": settings.device, "dtype": dtype}


def _tokens(settings: Settings, size: Size) -> Tensor:
    generator = torch.Generator(settings.device).manual_seed(1)
    shape = (SEQUENCES, size.tokens // SEQUENCES)
    return torch.randint(size.vocabulary, shape, generator=generator, device=settings.device)


def _case(
    settings: Settings,
    name: str,
    ours: Callable[..., Any],
    line: Callable[..., Any],
    tensors: Sequence[Tensor],
    leaves: Sequence[Tensor],
    aims: Mapping[str, Aim],
    *,
    builders: Mapping[str, Callable[[], peers.Function]] | None = None,
    without: Mapping[str, str] | None = None,
    native_cuda: bool = True,
    **options: Any,
) -> Case:
    """A case on two threads on CPU."""
    used = None if settings.device.type == "cuda" else settings.threads or 2
    present, missing = peers.installed(builders or {})
    if leaves:
        present = {key: peer if key == peers.LIGER else lines.averaged(peer) for key, peer in present.items()}
        ours, line = lines.averaged(ours), lines.averaged(line)
    racing, left_out = contestants(
        settings.device, used, ours, line, tensors, without, peers=present, native_cuda=native_cuda
    )
    dtype = tensors[0].dtype
    place = [] if used is None else [f"{used} thread{'s' * (used > 1)}"]
    return Case(
        name=", ".join([name, *["with a graph"] * bool(leaves), str(dtype).removeprefix("torch."), *place]),
        device=settings.device,
        items=tensors[-1].numel(),
        dtype=dtype,
        threads=used,
        leaves=leaves,
        contestants=racing,
        left_out=missing | left_out,
        # What the targets were set for is two threads and the full sizes; otherwise they would say nothing.
        aims=aims if used in (None, 2) and not settings.quick else {d: _without_targets(a) for d, a in aims.items()},
        **options,
    )


def _without_targets(aim: Aim) -> Aim:
    memory = aim.memory and aim.memory._replace(reach=None, reach_peers={})
    return aim._replace(reach={}, reach_bandwidth=None, memory=memory)
