"""The host side of token_logprobs in Triton: memory layout, tiles and launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from rewardfuse.kernels import common_launch
from rewardfuse.kernels.pairwise.launch import lay
from rewardfuse.kernels.token_logprobs.gradient import backward_kernel
from rewardfuse.kernels.token_logprobs.triton import NONE, forward_kernel
from torch import Tensor

BOUNDARY = 16  # bytes that a thread loads at once
BYTES = {"forward": 64, "backward": 32, "backward of KL": 64}  # that a thread has in flight, of both tensors together
WARPS = 8


class Tile(NamedTuple):
    """How a program reads a row: tiles [vectors, threads, width].

    Memory answers after about 0.7 µs, so an H200's 4.8 TB/s need 3.4 MB in flight, 26 KB a multiprocessor; with the
    time in which threads compute, 40 to 60. That is a thread's bytes (BYTES) times the threads that registers admit,
    for bfloat16 on sm_90: forward 64 B × 1024 (52 registers), of both tensors 64 B × 1024 (64); backward 32 B × 1536
    (40), of which as much again is written; of KL 64 B × 1024 (50). Eight warps finish a row of 151,936 in 19 tiles (of
    two tensors or backward 38), and four to six rows share a multiprocessor, so that one's beginning and end hide
    behind the others. Rows below 128 Ki 16-bit elements take fewer warps, for at least eight tiles. Rows that do not
    begin at 16-byte boundaries are loaded element by element, half as many bytes at a time. The row's length alone
    decides; nothing is measured at run time.
    """

    vectors: int
    threads: int
    width: int

    @classmethod
    def of(cls, size: int, element: int, per_thread: int, aligned: bool) -> Tile:
        """For rows of so many elements of so many bytes, of which a thread takes `per_thread` bytes at a time."""
        share = per_thread // element // (1 if aligned else 2)  # loads of single elements take a register each
        warps = min(WARPS, max(1, _power_of_two(size) // (8 * 32 * share)))
        width = BOUNDARY // element if aligned else 1
        return cls(share // width, 32 * warps, width)

    @classmethod
    def interpreted(cls, size: int, element: int, aligned: bool) -> Tile:
        """So small that most rows have two tiles and a tail."""
        width = BOUNDARY // element if aligned else 1
        return cls(2, max(1, _power_of_two(size) // (4 * width)), width)

    def constants(self) -> dict[str, int]:
        """What a kernel and the compiler are told of it."""
        shape = {"VECTORS": self.vectors, "THREADS": self.threads, "WIDTH": self.width}
        return shape | {"num_warps": max(1, self.threads // 32)}


def _power_of_two(size: int) -> int:
    """The largest that is at most the size."""
    return 1 << (max(size, 1).bit_length() - 1)


class Rows(NamedTuple):
    """The inputs of both passes; absent tensors None."""

    logits: Tensor
    ref_logits: Tensor | None
    tokens: Tensor
    mask: Tensor | None
    temperature: Tensor | None
    temperature_value: float
    softcap: float
    vocab_size: int

    @property
    def accumulated(self) -> torch.dtype:
        """The type of every output but the gradient of the logits."""
        return torch.float64 if self.logits.dtype is torch.float64 else torch.float32

    def arguments(self, per_thread: int, *gradients: Tensor | None) -> dict[str, object]:
        """What both kernels take; backward also what else is said of rows."""
        matrices = [self.logits] if self.ref_logits is None else [self.logits, self.ref_logits]
        vectors = [self.tokens, self.mask, self.temperature, *gradients]
        if any(m.stride(-1) != 1 for m in matrices):
            matrices = [m.contiguous() for m in matrices]
        matrices = [matrices[0], matrices[-1]]
        columns = [m[..., 0] for m in matrices]
        layout = lay(self.tokens.shape, *columns, *vectors)
        if any(laid is not column for laid, column in zip(layout.tensors, columns, strict=False)):
            # lay() had to copy; vectors stay as it left them.
            logits = matrices[0].contiguous()
            matrices = [logits, logits if self.ref_logits is None else matrices[1].contiguous()]
            layout = lay(self.tokens.shape, *(m[..., 0] for m in matrices), *layout.tensors[2:])
        names = ("logits", "ref_logits", "tokens", "mask", "temperature")
        names += ("grad_logprobs", "grad_kl", "grad_entropy")[: len(gradients)]
        present = [self.tokens if tensor is None else tensor for tensor in (*matrices, *layout.tensors[2:])]
        tile = self._tile(per_thread, self._aligned(matrices, layout.strides))
        return {
            **dict(zip(names, present, strict=True)),
            "strides": tuple(stride for pair in layout.strides for stride in pair),
            "numbers": common_launch.as_float32_sums((self.temperature_value, self.softcap)),
            "inner": layout.inner,
            "size": self.logits.shape[-1],
            "vocab": max(0, min(self.vocab_size, self.logits.shape[-1])),
            "HAS_MASK": self.mask is not None,
            "HAS_TEMPERATURE": self.temperature is not None,
            "CAPPED": self.softcap != 0,
            "ACC": tl.float64 if self.accumulated is torch.float64 else tl.float32,
            **tile.constants(),
        }

    def _tile(self, per_thread: int, aligned: bool) -> Tile:
        size, element = self.logits.shape[-1], self.logits.element_size()
        if self.logits.is_cuda:
            return Tile.of(size, element, per_thread, aligned)
        return Tile.interpreted(size, element, aligned)

    def _aligned(self, matrices: list[Tensor], strides: list[tuple[int, int]]) -> bool:
        """Whether every row of the logits, and of a contiguous gradient of theirs, begins at a 16-byte boundary."""
        element = self.logits.element_size()
        steps = [self.logits.shape[-1], *strides[0], *strides[1]]
        return all(m.data_ptr() % BOUNDARY == 0 for m in matrices) and all(s * element % BOUNDARY == 0 for s in steps)


def forward(rows: Rows, direction: int, entropy: bool) -> tuple[Tensor, ...]:
    """(logprobs, ref_logprobs, kl, entropy, log-sum-exps of both in float64), each ``[*]`` or, absent, ``[0]``."""
    paired = direction != NONE.value
    present = {
        "logprobs": True,
        "ref_logprobs": paired,
        "kl": paired,
        "entropy": entropy,
        "lse": True,
        "ref_lse": paired,
    }
    outputs = {
        name: torch.empty(
            rows.tokens.shape if there else 0,
            # In float32 an lse would lose what log-probabilities of logits far from 0 need.
            dtype=torch.float64 if name.endswith("lse") else rows.accumulated,
            device=rows.logits.device,
        )
        for name, there in present.items()
    }
    if rows.tokens.numel():
        arguments = rows.arguments(BYTES["forward"] // (2 if paired else 1))
        with common_launch.on_device_of(rows.logits):
            forward_kernel[(rows.tokens.numel(),)](**arguments, **outputs, DIRECTION=direction, ENTROPY=entropy)
    return tuple(outputs.values())


def backward(rows: Rows, direction: int, gradients: tuple[Tensor | None, ...], saved: dict[str, Tensor]) -> Tensor:
    """The gradient of the logits; gradients are those of logprobs, kl and entropy, None where nobody asks."""
    of_logprobs, of_kl, of_entropy = gradients
    if of_kl is None:
        direction = NONE.value
    gradient = torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)
    if gradient.numel():
        paired = direction != NONE.value
        rows = rows if paired else rows._replace(ref_logits=None)
        arguments = rows.arguments(BYTES["backward of KL"] // 2 if paired else BYTES["backward"], *gradients)
        flags = {"HAS_LOGPROB": of_logprobs is not None, "HAS_ENTROPY": of_entropy is not None, "DIRECTION": direction}
        with common_launch.on_device_of(rows.logits):
            backward_kernel[(rows.tokens.numel(),)](**arguments, **saved, **flags, gradient=gradient)
    return gradient


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
    """(logprobs, ref_logprobs, kl, entropy, lse, ref_lse); arguments as every backend takes them."""
    rows = Rows(logits, ref_logits, tokens, mask, temperature, float(temperature_value), float(softcap), vocab_size)
    return forward(rows, direction if ref_logits is not None else NONE.value, entropy)


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
    """The gradient of the logits ``[*, V]``, or of those columns of theirs that are given."""
    rows = Rows(logits, ref_logits, tokens, mask, temperature, float(temperature_value), float(softcap), vocab_size)
    saved = {"kl": kl, "entropy": entropy, "lse": lse, "ref_lse": ref_lse}
    saved = {name: tensor.contiguous() for name, tensor in saved.items()}
    return backward(rows, direction, (grad_logprobs, grad_kl, grad_entropy), saved)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, tokens, mask, temperature, *options):
        ctx.set_materialize_grads(False)
        outputs = _token_logprobs_forward(logits, ref_logits, tokens, mask, temperature, *options)
        logprobs, ref_logprobs, kl, entropy, lse, ref_lse = outputs
        ctx.save_for_backward(logits, ref_logits, tokens, mask, temperature, kl, entropy, lse, ref_lse)
        ctx.options = options[:-1]
        absent = [output for output, present in ((kl, ref_logits is not None), (entropy, options[-1])) if not present]
        ctx.mark_non_differentiable(ref_logprobs, *absent)
        return logprobs, ref_logprobs, kl, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _, grad_kl, grad_entropy):
        if torch.is_grad_enabled():
            raise NotImplementedError("token_logprobs: a second derivative (create_graph=True) is not implemented")
        gradients = (grad_logprobs, grad_kl, grad_entropy)
        if not ctx.needs_input_grad[0] or all(gradient is None for gradient in gradients):
            return (None,) * 10
        return _token_logprobs_backward(*gradients, *ctx.saved_tensors, *ctx.options), *[None] * 9


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
    """(logprobs, ref_logprobs, kl, entropy), each ``[*]`` or ``[0]``; arguments as every backend takes them."""
    tensors = (logits, ref_logits, tokens, mask, temperature)
    return _TokenLogprobs.apply(*tensors, temperature_value, softcap, vocab_size, direction, entropy)
