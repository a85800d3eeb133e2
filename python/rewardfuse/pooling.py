"""Where each sequence of a batch lies among the rows of hidden states, whatever its layout.

A layout is padded, ``[B, T]`` with an ``attention_mask``, or packed: sequences end to end in rows ``[R, T]``, told
apart by ``cu_seqlens`` or by ``position_ids`` that begin again at 0. Only these say where a sequence ends: never a
token's id, so that pad may be eos or any other token.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Spans(NamedTuple):
    """Sequences among the ``R·T`` tokens of a batch, counted row by row.

    Attributes:
        start, end: int64 ``[B]``, the first and the last token of each sequence.
        nonempty: bool ``[B]``; an empty sequence has no place, and no reward.
        position_ids: int64 ``[R, T]``, counted from 0 in each sequence.
    """

    start: torch.Tensor
    end: torch.Tensor
    nonempty: torch.Tensor
    position_ids: torch.Tensor


def padded_spans(attention_mask: torch.Tensor) -> Spans:
    """Of rows ``[B, T]`` padded on either side, with or without holes. Does not synchronize with the device.

    Raises:
        ValueError: on the CPU, a row whose mask is empty.
    """
    valid = attention_mask != 0
    nonempty = valid.any(dim=1)
    if _may_look(valid) and not nonempty.all():
        raise ValueError(f"attention_mask is empty in row {int((~nonempty).nonzero()[0])}, expected at least one 1")
    rows, length = valid.shape
    columns = torch.arange(length, device=valid.device)
    offset = torch.arange(rows, device=valid.device) * length
    first = valid.int().argmax(dim=1)  # argmax takes the first of equal values
    last = (columns * valid).amax(dim=1)
    return Spans(offset + first, offset + last, nonempty, (valid.long().cumsum(dim=1) - 1).clamp(min=0))


def cu_seqlens_spans(cu_seqlens: torch.Tensor, total: int) -> Spans:
    """Of one row that holds ``total`` tokens; sequence b is tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.

    Raises:
        ValueError: no integers ``[B + 1]``; on the CPU also bounds that do not rise from 0 to ``total``.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be integers [sequences + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    bounds = cu_seqlens.long()
    if _may_look(bounds) and not (bounds[0] == 0 and bounds[-1] == total and (bounds.diff() > 0).all()):
        raise ValueError(f"cu_seqlens must rise from 0 to the {total} tokens, got {bounds.tolist()[:8]}…")
    tokens = torch.arange(total, device=bounds.device)
    sequence = torch.bucketize(tokens, bounds[1:-1], right=True)
    nonempty = bounds.diff() > 0
    ends = (bounds[1:] - 1).clamp(0, max(total - 1, 0))  # an index read from the device never leaves the batch
    return Spans(torch.minimum(bounds[:-1].clamp(min=0), ends), ends, nonempty, (tokens - bounds[sequence])[None])


def position_spans(position_ids: torch.Tensor) -> Spans:
    """Of rows ``[R, T]`` of sequences end to end, without padding: each begins where ``position_ids`` is 0.

    How many there are is known to the device alone, so this synchronizes; ``cu_seqlens`` does not.

    Raises:
        ValueError: a row that does not begin at 0.
    """
    begins = position_ids == 0
    if not begins[:, 0].all():
        raise ValueError("position_ids must begin at 0 in every row: a sequence cannot go on from the row before")
    start = begins.flatten().nonzero().squeeze(1)
    end = torch.cat([start[1:], start.new_tensor([position_ids.numel()])]) - 1
    return Spans(start, end, torch.ones_like(start, dtype=torch.bool), position_ids.long())


def _may_look(tensor: torch.Tensor) -> bool:
    """Values are checked where looking costs nothing: on the CPU, outside of a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each is back in its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def in_groups(
    run: Callable[..., torch.Tensor],
    input_ids: Sequence[torch.Tensor],
    attention_mask: Sequence[torch.Tensor] | None,
    restore: torch.Tensor | None,
    *more: Sequence[Any],
) -> torch.Tensor:
    """``run(ids, mask, …)`` on each group of rows, and the results laid end to end in the order of the batch.

    Args:
        restore: int64 ``[B]``, the place of each row of the batch in the groups laid end to end.
        more: further arguments of ``run``, one a group.

    Raises:
        ValueError: the groups of ids, masks and places do not fit.
    """
    if attention_mask is None or len(attention_mask) != len(input_ids) or restore is None:
        raise ValueError("groups of input_ids need as many of attention_mask, and restore")
    return torch.cat([run(*group) for group in zip(input_ids, attention_mask, *more, strict=True)])[restore]


class Layouts:
    """What a backbone takes beside the ids, and where the sequences lie, for each layout of
    :meth:`rewardfuse.reward_model.RewardModel.forward`."""

    def __init__(self, backbone: "PreTrainedModel"):
        self._backbone = [backbone]  # in a list: not a submodule a second time
        self._accepts = set(inspect.signature(backbone.forward).parameters)
        self._packing_checked = False

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[Spans, dict[str, Any]]:
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self._accepts else {}
        if cu_seqlens is None and (attention_mask is not None or position_ids is None):
            return self._padded(input_ids, attention_mask, position_ids, options)
        if attention_mask is not None or (cu_seqlens is not None and position_ids is not None):
            raise ValueError("packed rows take cu_seqlens or position_ids alone, without attention_mask")
        if cu_seqlens is not None:
            if input_ids.dim() != 2 or len(input_ids) != 1:
                raise ValueError(f"input_ids packed with cu_seqlens must be [1, total], got {tuple(input_ids.shape)}")
            spans = cu_seqlens_spans(cu_seqlens, input_ids.shape[1])
        else:
            if input_ids.dim() != 2 or input_ids.shape != position_ids.shape:
                shapes = f"{tuple(input_ids.shape)} and {tuple(position_ids.shape)}"
                raise ValueError(f"input_ids and position_ids must share a shape [rows, length], got {shapes}")
            spans = position_spans(position_ids)
        self._check_packing(input_ids, spans, options)
        return spans, self._packed(spans.position_ids, options)

    def _padded(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Spans, dict[str, Any]]:
        shape = None if attention_mask is None else attention_mask.shape
        if input_ids.dim() != 2 or input_ids.shape != shape or not input_ids.shape[1]:
            raise ValueError(
                "input_ids and attention_mask must share a shape [batch, length] with length >= 1, "
                f"got {tuple(input_ids.shape)} and {None if shape is None else tuple(shape)}"
            )
        spans = padded_spans(attention_mask)
        if "position_ids" in self._accepts:
            # Counted from the first column, left padding would move the rewards of models with absolute positions.
            counted = spans.position_ids if position_ids is None else position_ids
            options["position_ids"] = counted + self._first_position()
        return spans, {"attention_mask": attention_mask, **options}

    def _first_position(self) -> int:
        """RoBERTa's kin count positions from ``padding_idx + 1`` (and by themselves look for padding among the ids)."""
        embeddings = getattr(getattr(self._backbone[0], "embeddings", None), "position_embeddings", None)
        padding = getattr(embeddings, "padding_idx", None)
        return 0 if padding is None else padding + 1

    def _packed(self, position_ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Decoders of ``transformers`` tell packed sequences apart by their positions; encoders need a mask."""
        inputs = {**options, "position_ids": position_ids + self._first_position(), "attention_mask": None}
        if not any(getattr(module, "is_causal", False) for module in self._backbone[0].modules()):
            sequence = (position_ids == 0).cumsum(dim=1)
            inputs["attention_mask"] = (sequence[:, :, None] == sequence[:, None, :])[:, None]
        return inputs

    @torch.no_grad()
    def _check_packing(self, input_ids: torch.Tensor, spans: Spans, options: dict[str, Any]) -> None:
        """Once a model: two packed sequences must get the hidden states that each gets alone.

        A backbone that does not know of packing would let one sequence read the other, and say nothing.
        """
        if self._packing_checked or len(spans.start) < 2:
            return
        if torch.compiler.is_compiling():
            raise ValueError(
                "run the model on packed rows once before it is compiled: it must be seen to keep them apart"
            )
        backbone = self._backbone[0]
        tokens = input_ids.flatten()
        pair = [tokens[spans.start[row] : spans.end[row] + 1][:8] for row in range(2)]
        counted = torch.cat([torch.arange(len(ids), device=tokens.device) for ids in pair])[None]
        try:
            with evaluating(backbone), torch.autocast(tokens.device.type, enabled=False):
                together = backbone(input_ids=torch.cat(pair)[None], **self._packed(counted, options)).last_hidden_state
                alone = [backbone(input_ids=ids[None], **options).last_hidden_state for ids in pair]
            alone = torch.cat(alone, dim=1)
            tolerance = 1e-3 if alone.dtype in (torch.float32, torch.float64) else 5e-2
            apart = bool((together - alone).abs().amax() <= tolerance * alone.abs().amax())
        except (RuntimeError, TypeError, ValueError):  # it takes no such mask, or no positions
            apart = False
        # Given a whole mask, encoders drop their layers' local attention; the short sequences above do not show it.
        local = any(getattr(backbone.config, key, None) for key in ("local_attention", "sliding_window"))
        if not apart or (local and self._packed(counted, options)["attention_mask"] is not None):
            raise ValueError(f"{type(backbone).__name__} does not keep packed sequences apart: pad its rows instead")
        self._packing_checked = True
