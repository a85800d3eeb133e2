"""The host side of kl_penalized_rewards in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from rewardfuse.kernels import common_launch
from rewardfuse.kernels.kl_penalized_rewards.triton import (
    NO_SCORES,
    ROW_SCORES,
    TOKEN_SCORES,
    backward_kernel,
    forward_kernel,
)
from torch import Tensor

WARPS = 4


class Tile(NamedTuple):
    """What a program takes at a time: so many rows, so many tokens of each."""

    rows: int
    block: int

    @classmethod
    def of(cls, size: int, wide: bool) -> Tile:
        """For rows of so many tokens: four a thread, with float64 (`wide`), which takes more registers, two."""
        tokens = WARPS * 32 * (2 if wide else 4)
        block = min(triton.next_power_of_2(max(size, 1)), tokens)
        return cls(tokens // block, block)


class _Problem(NamedTuple):
    """The arguments of one call, as every backend takes them."""

    logprobs: Tensor
    ref_logprobs: Tensor
    mask: Tensor | None
    scores: Tensor | None
    ended: Tensor | None
    kl_coef: Tensor | None
    kl_coef_value: float
    missing_eos_penalty: float
    score_low: float
    score_high: float
    estimator: int
    gradient_estimator: int
    input_low: float
    input_high: float
    output_low: float
    output_high: float
    one_past: bool
    replace: bool
    differentiable_rewards: bool

    @property
    def accumulated(self) -> torch.dtype:
        """The type of all outputs."""
        return torch.float64 if self.logprobs.dtype is torch.float64 else torch.float32

    @property
    def count(self) -> int:
        """Rows."""
        return self.logprobs.shape[:-1].numel()

    def scored(self) -> int:
        """What has a score."""
        if self.scores is None:
            return NO_SCORES.value
        return TOKEN_SCORES.value if self.scores.dim() == self.logprobs.dim() else ROW_SCORES.value

    def by_token(self, tensor: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        """A tensor ``[*, T]`` as ``[rows, T]`` and its two strides; the logprobs where there is none."""
        if tensor is None:
            return self.logprobs, (0, 0)
        rows = tensor.reshape(self.count, self.logprobs.shape[-1])
        return rows, rows.stride()

    def by_row(self, tensor: Tensor | None) -> tuple[Tensor, int]:
        """A tensor ``[*]`` as ``[rows]`` and its stride."""
        if tensor is None:
            return self.logprobs, 0
        rows = tensor.reshape(self.count)
        return rows, rows.stride(0)

    def tile(self) -> Tile:
        """A tile that fits the rows."""
        tile = Tile.of(self.logprobs.shape[-1], self.accumulated is torch.float64)
        if self.logprobs.is_cuda:
            return tile
        return tile._replace(rows=min(tile.rows, triton.next_power_of_2(max(self.count, 1))))  # interpreted by item

    def arguments(self, by_token: dict[str, Tensor | None], by_row: dict[str, Tensor | None]) -> dict[str, object]:
        """What both kernels take, backward also gradients by token and by row."""
        tokens = {"logprobs": self.logprobs, "ref_logprobs": self.ref_logprobs, "mask": self.mask}
        scored = self.scored()
        if scored == ROW_SCORES.value:
            scores, stride = self.by_row(self.scores)
            strides = {"scores": (stride, 0)}
        else:
            scores, pair = self.by_token(self.scores)
            strides = {"scores": pair}
        laid = {name: self.by_token(tensor) for name, tensor in (tokens | by_token).items()}
        laid |= {name: self.by_row(tensor) for name, tensor in ({"ended": self.ended} | by_row).items()}
        strides |= {name: s if isinstance(s, tuple) else (s,) for name, (_, s) in laid.items()}
        order = (*tokens, "scores", "ended", *by_token, *by_row)
        numbers = (self.kl_coef_value, self.missing_eos_penalty, self.score_low, self.score_high)
        numbers += self[self._fields.index("estimator") : self._fields.index("one_past")]
        tile = self.tile()
        return {
            **{name: tensor for name, (tensor, _) in laid.items()},
            "scores": scores,
            "kl_coef": self.logprobs if self.kl_coef is None else self.kl_coef,
            "strides": tuple(stride for name in order for stride in strides[name]),
            "numbers": common_launch.as_float32_sums(tuple(map(float, numbers))),
            "count": self.count,
            "size": self.logprobs.shape[-1],
            "HAS_MASK": self.mask is not None,
            "SCORES": scored,
            "HAS_ENDED": self.ended is not None,
            "HAS_COEF": self.kl_coef is not None,
            "ONE_PAST": self.one_past,
            "REPLACE": self.replace,
            "ACC": tl.float64 if self.accumulated is torch.float64 else tl.float32,
            "TERMS": 16 if self.accumulated is torch.float64 else 7,
            "ROWS": tile.rows,
            "BLOCK": tile.block,
            "num_warps": WARPS,
        }


def _forward(problem: _Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=problem.accumulated, device=problem.logprobs.device)

    tokens, rows = problem.logprobs.shape, problem.logprobs.shape[:-1]
    names = ("rewards", "kl", "sequence_kl", "sequence_reward", "stats")
    outputs = dict(zip(names, map(empty, (tokens, tokens, rows, rows, (6,))), strict=True))
    arguments = problem.arguments({}, {})
    grid, scratch = common_launch.grid(problem.logprobs, triton.cdiv(problem.count, arguments["ROWS"]))
    with common_launch.on_device_of(problem.logprobs):
        forward_kernel[grid](**arguments, **outputs, **scratch)
    return tuple(outputs.values())


def _backward(
    problem: _Problem, gradients: tuple[Tensor | None, ...], needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(d_logprobs, d_scores), None where not needed; gradients of rewards, kl, sequence_kl and sequence_reward."""
    wanted = zip((problem.logprobs, problem.scores), needs, strict=True)
    results = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) if need else None for t, need in wanted)
    rewards, kl, sequence_kl, sequence_reward = gradients
    by_row = {"grad_sequence_kl": sequence_kl, "grad_sequence_reward": sequence_reward}
    arguments = problem.arguments({"grad_rewards": rewards, "grad_kl": kl}, by_row)
    names = ("OF_REWARDS", "OF_KL", "OF_SEQUENCE_KL", "OF_SEQUENCE_REWARD")
    flags = {name: gradient is not None for name, gradient in zip(names, gradients, strict=True)}
    flags |= dict(zip(("NEED_LOGPROBS", "NEED_SCORES"), needs, strict=True))
    outputs = {
        name: problem.logprobs if result is None else result
        for name, result in zip(("d_logprobs", "d_scores"), results, strict=True)
    }
    programs = common_launch.programs(problem.logprobs, triton.cdiv(problem.count, arguments["ROWS"]))
    with common_launch.on_device_of(problem.logprobs):
        backward_kernel[(programs,)](**arguments, **outputs, **flags)
    return results


class _KLPenalizedRewards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.set_materialize_grads(False)
        problem = _Problem(*arguments)
        rewards, kl, sequence_kl, sequence_reward, stats = _forward(problem)
        ctx.save_for_backward(*problem[:6])
        ctx.options = problem[6:]
        constants = () if problem.differentiable_rewards else (rewards, sequence_reward)
        ctx.mark_non_differentiable(stats, *constants)
        return rewards, kl, sequence_kl, sequence_reward, stats

    @staticmethod
    def backward(ctx, grad_rewards, grad_kl, grad_sequence_kl, grad_sequence_reward, _):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "kl_penalized_rewards: a second derivative (create_graph=True) is not implemented"
            )
        problem = _Problem(*ctx.saved_tensors, *ctx.options)
        of_rewards = (grad_rewards, grad_sequence_reward) if problem.differentiable_rewards else (None, None)
        gradients = (of_rewards[0], grad_kl, grad_sequence_kl, of_rewards[1])
        any_of_rewards = any(gradient is not None for gradient in of_rewards)
        needs = (
            ctx.needs_input_grad[0] and any(gradient is not None for gradient in gradients),
            ctx.needs_input_grad[3] and any_of_rewards,
        )
        d_logprobs, d_scores = _backward(problem, gradients, needs) if any(needs) else (None, None)
        return d_logprobs, None, None, d_scores, *[None] * 15


def kl_penalized_rewards(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    scores: Tensor | None,
    ended: Tensor | None,
    kl_coef: Tensor | None,
    kl_coef_value: float,
    missing_eos_penalty: float,
    score_low: float,
    score_high: float,
    estimator: int,
    gradient_estimator: int,
    input_low: float,
    input_high: float,
    output_low: float,
    output_high: float,
    one_past: bool,
    replace: bool,
    differentiable_rewards: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rewards ``[*, T]``, kl ``[*, T]``, sequence_kl ``[*]``, sequence_reward ``[*]``, stats ``[6]``)."""
    tensors = (logprobs, ref_logprobs, mask, scores, ended, kl_coef)
    numbers = (kl_coef_value, missing_eos_penalty, score_low, score_high, estimator, gradient_estimator)
    clamps = (input_low, input_high, output_low, output_high)
    return _KLPenalizedRewards.apply(*tensors, *numbers, *clamps, one_past, replace, differentiable_rewards)
