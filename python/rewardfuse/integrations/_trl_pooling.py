"""Where the reward of a row is read, and rows without padding, for the trainers of ``rewardfuse.integrations.trl``.

TRL trains ``AutoModelForSequenceClassification``. Its decoders read the reward at the last token that is not the pad
token, which is one token early where pad is eos, and run their head on every token. Here the attention mask says where
a row ends (:mod:`rewardfuse.pooling`), and the head runs on the last tokens alone.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from rewardfuse.batching import Collator, Rows
from rewardfuse.packing import GroupedCollator, PackedCollator
from rewardfuse.pooling import Layouts, in_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POOLINGS = ("transformers", "attention_mask")
ROW_LAYOUTS = ("padded", "grouped", "packed")
_LAYOUTS = {"grouped": GroupedCollator, "packed": PackedCollator}
_POOLED = "__pools_by_mask__"  # of such a forward
_REFUSED = ("labels", "inputs_embeds", "past_key_values", "output_hidden_states", "output_attentions")


@dataclass
class PoolingOptions:
    """Options of a reward trainer's configuration: where rewards are read, and how rows lie in a batch.

    Parameters:
        pooling (str, default "transformers"): as TRL, at the last token that is not the pad token, or
            "attention_mask", at the last token that the mask covers, with the head run on those tokens alone.
        row_layout (str, default "padded"): as TRL, every row padded to the longest of its batch; "grouped", rows of
            like length padded in groups, one pass of the backbone each; "packed", rows end to end without padding.
            The last two need ``pooling="attention_mask"`` and no ``pad_to_multiple_of``.

    Raises:
        ValueError: an option that is none of these, or does not go with another one.
    """

    pooling: str = field(
        default="transformers",
        metadata={"help": "Where a reward is read: transformers (last token that is not pad) or attention_mask."},
    )
    row_layout: str = field(
        default="padded", metadata={"help": "How the rows of a batch lie: padded, grouped (by length) or packed."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # that of TRL's configuration, beside which this class stands
        for name, accepted in (("pooling", POOLINGS), ("row_layout", ROW_LAYOUTS)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        if self.row_layout == "padded":
            return
        if self.pooling != "attention_mask":
            raise ValueError(f"row_layout={self.row_layout!r} needs pooling='attention_mask', got {self.pooling!r}")
        if self.pad_to_multiple_of:
            raise ValueError(
                f"pad_to_multiple_of goes with row_layout='padded', got {self.pad_to_multiple_of} "
                f"and row_layout={self.row_layout!r}"
            )


def reads_last_token(model: "PreTrainedModel") -> bool:
    """Whether a sequence classifier reads its head ``score`` at the last token that is not the pad token.

    The decoders of ``transformers`` do. Encoders with a pooler or a classifier, encoder-decoders and classes that
    average over tokens do not.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    pools = code is not None and "last_non_pad_token" in code.co_varnames
    return pools and hasattr(model, "score") and not getattr(model.config, "is_encoder_decoder", False)


def pool_by_mask(model: "PreTrainedModel") -> None:
    """Let ``model`` read its rewards where the attention mask ends, in place; its weights and class stay as they are.

    ``model.forward`` is replaced on this object, so that wrappers (DDP, FSDP, PEFT) around it reach the new one;
    :func:`pool_as_the_class` takes it off. It takes the layouts of
    :meth:`rewardfuse.reward_model.RewardModel.forward`: padded rows (all tokens valid where there is no mask), lists of
    groups with ``restore``, packed rows with ``cu_seqlens`` or ``position_ids``. By position it takes what the class's
    own does. It returns the output of ``score``, [B, 1], in the dtype which that has, NaN for an empty row. What else
    the backbone takes is passed on.

    Raises:
        ValueError: a class of another kind (:func:`reads_last_token`). When it is called: ``labels`` and other things
            that it cannot honour, and the errors of the layouts.
    """
    if not reads_last_token(model):
        raise ValueError(
            "pooling='attention_mask' needs a decoder with a head `score` that reads its last token, "
            f"got {type(model).__name__}"
        )
    layouts = Layouts(model.base_model)
    signature = inspect.signature(type(model).forward)

    def rewards(
        self: "PreTrainedModel",
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        others: dict[str, Any],
    ) -> torch.Tensor:
        if mask is None and position_ids is None and cu_seqlens is None:
            mask = torch.ones_like(ids)
        spans, inputs = layouts(ids, mask, position_ids, cu_seqlens)
        # backbone and head are looked up in each call: PEFT and FSDP replace them after this
        hidden = self.base_model(input_ids=ids, **inputs, **others).last_hidden_state.flatten(0, 1)
        logits = self.score(hidden[spans.end.to(hidden.device)]).to(ids.device)
        return logits.masked_fill(~spans.nonempty[:, None], torch.nan)

    def by_name(
        self: "PreTrainedModel",
        *,
        input_ids: torch.Tensor | Sequence[torch.Tensor],
        attention_mask: torch.Tensor | Sequence[torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        restore: torch.Tensor | None = None,
        use_cache: bool | None = None,  # never: a training step has no use for it
        **others: Any,
    ) -> SequenceClassifierOutputWithPast:
        refused = [name for name in _REFUSED if others.get(name) is not None and others[name] is not False]
        if refused:
            raise ValueError(f"a model that pools by its attention mask does not take {', '.join(refused)}")
        others = {name: value for name, value in others.items() if name not in _REFUSED and value is not None}
        if isinstance(input_ids, torch.Tensor):
            return SequenceClassifierOutputWithPast(
                logits=rewards(self, input_ids, attention_mask, position_ids, cu_seqlens, others)
            )

        def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return rewards(self, ids, mask, None, None, others)

        return SequenceClassifierOutputWithPast(logits=in_groups(run, input_ids, attention_mask, restore))

    def forward(self: "PreTrainedModel", *given: Any, **named: Any) -> SequenceClassifierOutputWithPast:
        if given:
            _, *positional = signature.bind_partial(self, *given).arguments.items()
            return by_name(self, **dict(positional), **named)
        return by_name(self, **named)

    # the class's signature, which trainers and generation look at
    pooled = functools.wraps(type(model).forward)(can_return_tuple(forward))
    setattr(pooled, _POOLED, True)
    model.forward = types.MethodType(pooled, model)


def pool_as_the_class(model: "PreTrainedModel") -> None:
    """Undo :func:`pool_by_mask`, also where ``accelerate`` has wrapped the forward since; else nothing."""
    forward = vars(model).get("forward")
    while forward is not None and not hasattr(forward, _POOLED):
        forward = getattr(forward, "__wrapped__", None)
    if forward is not None:
        del model.forward


class LaidOutCollator:
    """Wraps a trainer's collator: its rows in groups or packed instead of padded.

    The batch begins with ``row_lengths``, int64 [rows], the tokens of each row: the number of rows is its length, which
    is where ``accelerate`` looks for it. The rest is as :mod:`rewardfuse.packing` says.

    Args:
        collator: has ``rows(examples)``, as :meth:`rewardfuse.batching.Collator.rows`, and ``pad_token_id``.
        row_layout: "grouped" or "packed".

    Raises:
        ValueError: a collator without ``rows``, which can only pad.
    """

    def __init__(self, collator: Any, row_layout: str):
        if not hasattr(collator, "rows"):
            raise ValueError(
                f"row_layout={row_layout!r} needs the collator of the trainer, got data_collator "
                f"{type(collator).__name__}, which pads"
            )
        self._collate = _LAYOUTS[row_layout](_Unpadded(collator))

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._collate(examples)
        if "token_cu_seqlens" in batch:
            lengths = batch["token_cu_seqlens"].diff()
        else:
            lengths = torch.cat([mask.sum(dim=1) for mask in batch["attention_mask"]])[batch["restore"]]
        return {"row_lengths": lengths, **batch}


class _Unpadded(Collator):
    """A trainer's collator as one of :mod:`rewardfuse.batching`."""

    def __init__(self, collator: Any):
        filler = types.SimpleNamespace(pad_token_id=collator.pad_token_id, eos_token_id=None, padding_side="right")
        super().__init__(filler)
        self._lay_out_rows = collator.rows

    def _lay_out(self, items: Sequence[dict[str, Any]]) -> Rows:
        return self._lay_out_rows(items)


class PooledRows:
    """Mixin for ``trl.RewardTrainer``: the options of :class:`PoolingOptions`, where its ``args`` have them."""

    def __init__(self, model: Any, args: Any = None, *more: Any, **kwargs: Any):
        if args is not None:
            if args.accelerator_config.dispatch_batches:
                warnings.warn(
                    "dispatch_batches=True would cut pairs and lists apart between processes: it is set to False",
                    stacklevel=3,
                )
            args.accelerator_config.dispatch_batches = False
        super().__init__(model, args, *more, **kwargs)

    def _set_up_rows(self) -> None:
        """Pooling and layout as ``args`` say; called when the trainer has its model and its collator."""
        model = self.model
        pooling = getattr(self.args, "pooling", "transformers")
        if is_peft_model(model):
            if pooling == "attention_mask" and model.active_peft_config.is_prompt_learning:
                kind = type(model.active_peft_config).__name__
                raise ValueError(f"pooling='attention_mask' does not go with the virtual tokens of {kind}")
            model = model.get_base_model()
        if pooling == "attention_mask":
            self._check_whole_rows()
            pool_by_mask(model)
        else:
            pool_as_the_class(model)  # a model that another trainer has had
            _warn_if_read_early(model, self.processing_class)
        row_layout = getattr(self.args, "row_layout", "padded")
        if row_layout != "padded":
            self._check_passes(row_layout)
            self.data_collator = LaidOutCollator(self.data_collator, row_layout)

    def _check_whole_rows(self) -> None:
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "pooling='attention_mask' does not go with context or sequence parallelism, which cuts rows apart"
            )

    def _check_passes(self, row_layout: str) -> None:
        """Each process has its own number of groups, and so of passes, where sharded weights need the same one."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        sharded = self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
        if row_layout == "grouped" and sharded and self.accelerator.num_processes > 1:
            raise ValueError(
                "row_layout='grouped' does not go with weights sharded over processes (FSDP, ZeRO-3), which would "
                "wait for each other: use 'packed' or 'padded'"
            )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer counts them: of every token that the backbone sees, padding too."""
        return super().floating_point_ops(_flat(inputs))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        super()._track_num_input_tokens(_flat(inputs))


def _warn_if_read_early(model: "PreTrainedModel", tokenizer: Any) -> None:
    if reads_last_token(model) and tokenizer.pad_token_id == tokenizer.eos_token_id:
        warnings.warn(
            f"pad and eos are the same token ({tokenizer.pad_token!r}), so {type(model).__name__} takes the eos at the "
            "end of a row for padding and reads its reward one token early: set pooling='attention_mask'",
            stacklevel=4,
        )


def count_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """The tokens of a batch in any layout, padding left out, 0-d int64 on its device."""
    return (inputs["row_lengths"] if "row_lengths" in inputs else inputs["attention_mask"]).sum()


def _flat(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch for those who count its tokens: one tensor of ids, and one of the mask."""
    if "row_lengths" not in inputs:
        return inputs
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        "input_ids": torch.cat([group.flatten() for group in ids]),
        "attention_mask": torch.cat([group.flatten() for group in mask]),
    }
