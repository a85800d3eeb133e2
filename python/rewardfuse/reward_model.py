"""A reward model: a ``transformers`` backbone, one float32 linear head, and the fused losses.

The reward of a sequence is ``r = w · h``, with h the backbone's last hidden state at the sequence's last token, which
``attention_mask``, ``position_ids`` or ``cu_seqlens`` tell (``pooling``). ``AutoModelForSequenceClassification`` looks
for the last ``input_ids != pad_token_id`` instead, which is one token early as soon as pad and eos are the same token,
and runs its head on every position.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from rewardfuse.batch_losses import list_loss, list_stats, pair_loss, rating_loss
from rewardfuse.checkpoints import (
    HEAD,
    architecture,
    load_tokenizer,
    output_width,
    quiet_transformers,
    without_pooler,
)
from rewardfuse.pooling import Layouts, in_groups
from rewardfuse.process_rewards import process_reward_loss
from rewardfuse.reward_head import HeadConfig, RewardHead

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rewardfuse.scoring import ScoreOutput

# The inputs of forward, under the names that batches have for them: there `cu_seqlens` are the bounds of ranked lists.
BATCH_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "restore": "restore",
    "position_ids": "position_ids",
    "token_cu_seqlens": "cu_seqlens",
    "step_positions": "positions",
}


class RewardOutputs(NamedTuple):
    """What a reward model says of a batch.

    Attributes:
        rewards: float32 ``[B]``; of a process reward model ``[B, S]``.
        outputs: float32 ``[B, K]``, every output of the head (:class:`HeadConfig` says what they are); ``[B, S, K]`` at
        steps. log_tie: the tie parameter of ``bradley_terry_tie``, 0-d, where the model has one.
    """

    rewards: torch.Tensor
    outputs: torch.Tensor
    log_tie: torch.Tensor | None


def row_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :meth:`RewardModel.forward` that a batch of any collator holds."""
    return {argument: batch[key] for key, argument in BATCH_INPUTS.items() if key in batch}


class RewardModel(nn.Module):
    """Backbone plus head ``Linear(hidden, K, bias=False)``, in float32 whatever the backbone computes in.

    The backbone is registered under its own ``base_model_prefix``, so that parameters carry the names of the checkpoint
    (``model.layers.0…``; the head is ``score.weight`` there) which ``AutoModelForSequenceClassification`` reads and
    writes for decoders.

    Args:
        backbone: a model that returns ``last_hidden_state`` ``[B, T, hidden]``.
        head: what the head's outputs are.
        seed: draws the head's initial weights, N(0, initializer_range²), from a generator of their own; ``None`` draws
            them from torch's global one.
        bias: give the head a bias, as some checkpoints have; ``AutoModelForSequenceClassification`` has none.
    """

    def __init__(
        self,
        backbone: "PreTrainedModel",
        *,
        head: HeadConfig | None = None,
        seed: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if backbone.config.is_encoder_decoder:
            raise ValueError(f"backbone must be a decoder or an encoder, got {type(backbone).__name__}, which is both")
        self._hold(backbone.base_model_prefix or "model", without_pooler(backbone), head or HeadConfig())
        config = self.config.get_text_config()
        self.head = RewardHead(output_width(config), self.head_config.outputs, bias)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.head.initialize(getattr(config, "initializer_range", 0.02), generator)
        self._layouts = Layouts(backbone)

    def _hold(self, prefix: str, backbone: "PreTrainedModel", head: HeadConfig) -> None:
        """What every reward model has: its backbone, what its outputs are, and where it comes from."""
        self._prefix = prefix
        setattr(self, prefix, backbone)
        self._head_config = head
        head.write(self.config)
        self.register_parameter("log_tie", None)
        #: where it was loaded from, or the empty string; an attribute, since peft looks for one
        self.name_or_path = backbone.name_or_path
        self.tokenizer_options: dict[str, Any] = {}  #: for the tokenizer beside it: trust_remote_code, revision
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def backbone(self) -> "PreTrainedModel":
        return self._modules[self._prefix]  # not by name: Mamba's kin call theirs `backbone`

    @property
    def config(self) -> "PreTrainedConfig":
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def head_config(self) -> HeadConfig:
        """What the head's outputs are; kept in the configuration, so that a checkpoint has it."""
        return self._head_config

    @head_config.setter
    def head_config(self, head: HeadConfig) -> None:
        if head.outputs != self._head_config.outputs:
            expected = f"the {self._head_config.outputs} outputs of this head"
            raise ValueError(f"head_config must name {expected}, got {head.outputs}: {', '.join(head.names)}")
        head.write(self.config)
        self._head_config = head

    @property
    def _no_split_modules(self) -> Any:
        """The layers that accelerate shards one by one under FSDP; looked for by this name."""
        return self.backbone._no_split_modules

    def head_parameters(self) -> list[nn.Parameter]:
        """What lies behind the backbone; kept in float32 where the model is cast to a 16-bit type."""
        return [*self.head.parameters(), *([] if self.log_tie is None else [self.log_tie])]

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RewardModel":
        before = [parameter.detach() for parameter in self.head_parameters()]
        super()._apply(function, recurse)
        for parameter, kept in zip(self.head_parameters(), before, strict=True):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = kept.to(parameter.device)
        return self

    def add_log_tie(self, value: float = 0.1) -> None:
        """Give the model ``log_tie`` (0-d float32), which :func:`rewardfuse.bradley_terry_tie_loss` learns."""
        self.log_tie = nn.Parameter(torch.tensor(float(value), device=self.device))

    def forward(
        self,
        input_ids: torch.Tensor | Sequence[torch.Tensor],
        attention_mask: torch.Tensor | Sequence[torch.Tensor] | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        restore: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        return_outputs: bool = False,
    ) -> torch.Tensor | RewardOutputs:
        """Rewards, float32 ``[B]`` (``[B, S]`` with ``positions``), or :class:`RewardOutputs`.

        Exactly one of these layouts (``collators`` of ``batching`` and ``packing`` make them):

        - ``input_ids`` and ``attention_mask`` ``[B, T]``, padded on either side: 1 (or True) where a token is real (B
          may be 0);
        - both as lists of such tensors, groups of rows of like length, whose rewards are laid end to end; ``restore``
          int64 ``[B]`` then gives the place of each row in them;
        - ``input_ids`` ``[1, total]`` packed end to end with ``cu_seqlens`` int ``[B + 1]``, or rows ``[R, T]`` packed
          without padding with ``position_ids`` that begin again at 0 (this one synchronizes with the device).

        Args:
            positions: int64 ``[B, S]``, tokens at which to read (step separators), counted from each sequence's first
                real token; -1 where there is none, whose output is NaN. Without it the last token is read.

        Raises:
            ValueError: shapes that fit none of these; on the CPU also an empty sequence (elsewhere its reward is NaN,
                because looking would synchronize) and bounds that are none; a backbone that cannot keep packed
                sequences apart.
        """
        if isinstance(input_ids, torch.Tensor) and input_ids.dim() == 2 and not len(input_ids):
            # Backbones cannot take an empty batch; a view of no weights keeps it in the graph.
            steps = () if positions is None else (positions.shape[1],)
            outputs = self.head_parameters()[0].flatten()[:0].reshape(0, *steps, self.head_config.outputs)
        elif isinstance(input_ids, list | tuple):
            outputs = self._grouped(input_ids, attention_mask, restore, positions)
        else:
            outputs = self._outputs(input_ids, attention_mask, position_ids, cu_seqlens, positions)
        shape = outputs.shape[:-1]
        # A copy: FSDP hangs its backward on what forward returns, and warns of views.
        rewards = self.head_config.reward(outputs.flatten(0, -2)).reshape(shape).clone()
        if not return_outputs:
            return rewards
        # A clone: DistributedDataParallel looks for the graph behind what forward returns, and a parameter has none.
        return RewardOutputs(rewards, outputs, None if self.log_tie is None else self.log_tie.clone())

    def _grouped(
        self,
        input_ids: Sequence[torch.Tensor],
        attention_mask: Sequence[torch.Tensor] | None,
        restore: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        parts: Sequence[torch.Tensor | None] = [None] * len(input_ids)
        if positions is not None and restore is not None:  # given in the batch's order, needed in that of the groups
            grouped = torch.empty_like(positions).index_copy_(0, restore, positions)
            parts = grouped.split([len(rows) for rows in input_ids])

        def outputs(ids: torch.Tensor, mask: torch.Tensor, part: torch.Tensor | None) -> torch.Tensor:
            return self._outputs(ids, mask, None, None, part)

        return in_groups(outputs, input_ids, attention_mask, restore, parts)

    def _outputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        """Every output of the head, float32 ``[B, K]`` or ``[B, S, K]``."""
        spans, inputs = self._layouts(input_ids, attention_mask, position_ids, cu_seqlens)
        hidden = self.backbone(input_ids=input_ids, **inputs).last_hidden_state.flatten(0, 1)
        nonempty, places = spans.nonempty, spans.end
        if positions is not None:
            if positions.dim() != 2 or len(positions) != len(places):
                raise ValueError(f"positions must be [{len(places)}, steps], got {list(positions.shape)}")
            places = spans.start[:, None] + positions
            nonempty = nonempty[:, None] & (positions >= 0) & (places <= spans.end[:, None])
            places = torch.where(nonempty, places, spans.end[:, None])
        outputs = self.head(hidden[places])
        outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        return outputs.masked_fill(~nonempty[..., None], torch.nan)

    def loss(self, batch: Mapping[str, Any], **options: Any) -> tuple[torch.Tensor, Any]:
        """``(loss, stats)`` of a batch that a collator of ``batching``, ``step_batching`` or ``packing`` made.

        What it holds decides: ``step_labels``, :func:`rewardfuse.process_reward_loss`; ``ratings``,
        :func:`rating_loss`; ``cu_seqlens``, the bounds of ranked lists among the rows, :func:`list_loss`; else pairs,
        the chosen rows first, then the rejected ones, :func:`pair_loss`. ``options`` are those of the function.
        ``stats`` are of pairs and lists, otherwise None.
        """
        outputs = self(**row_inputs(batch), return_outputs=True)
        if "step_labels" in batch:
            return process_reward_loss(outputs.rewards, batch["step_labels"], **options), None
        if "ratings" in batch:
            return rating_loss(outputs.outputs, batch, **options), None
        if "cu_seqlens" in batch:
            loss = list_loss(outputs.rewards, batch, **options)
            return loss, list_stats(outputs.rewards, batch, options.get("top_k"))
        return pair_loss(outputs.rewards, batch, **options)

    def score(
        self, inputs: Sequence[Any], tokenizer: "PreTrainedTokenizerBase | None" = None, **options: Any
    ) -> "ScoreOutput":
        """Rewards of texts, conversations or prompt and response pairs: :func:`rewardfuse.scoring.score_inputs`.

        ``tokenizer``: by default the one that was saved beside the model.
        """
        from rewardfuse.scoring import score_inputs

        return score_inputs(self, inputs, tokenizer or self._own_tokenizer(), **options)

    def calibrate(
        self, inputs: Sequence[Any], tokenizer: "PreTrainedTokenizerBase | None" = None, **options: Any
    ) -> tuple[float, float]:
        """Keep mean and std of the rewards of a calibration set: :func:`rewardfuse.scoring.calibrate`."""
        from rewardfuse.scoring import calibrate

        return calibrate(self, inputs, tokenizer or self._own_tokenizer(), **options)

    def _own_tokenizer(self) -> "PreTrainedTokenizerBase":
        if self._tokenizer is None:
            if not self.name_or_path:
                raise ValueError("tokenizer is needed: this model was not loaded from a checkpoint that could hold one")
            self._tokenizer = load_tokenizer(self.name_or_path, **self.tokenizer_options)
        return self._tokenizer

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute the backbone's activations in the backward pass to save memory; as ``transformers`` has it."""
        enable = getattr(self.backbone, "activation_checkpointing_enable", None)
        if enable is None:  # before transformers 5.2x
            enable = self.backbone.gradient_checkpointing_enable
        enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """:meth:`activation_checkpointing_enable` by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    @classmethod
    def from_config(
        cls, config: "PreTrainedConfig", *, head: HeadConfig | None = None, seed: int | None = None
    ) -> "RewardModel":
        """A model with random weights; with ``seed`` the same ones every time (torch's global generator stays as it
        is)."""
        from transformers import AutoModel

        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return cls(AutoModel.from_config(copy.deepcopy(config)), head=head, seed=seed)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        new_head: bool = False,
        head: HeadConfig | None = None,
        seed: int | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> "RewardModel":
        """Load a reward model: :func:`rewardfuse.loading.load_reward_model` says which checkpoints and errors."""
        from rewardfuse.loading import load_reward_model

        options = {"new_head": new_head, "head": head, "seed": seed, "trust_remote_code": trust_remote_code}
        return load_reward_model(name_or_path, **options, **kwargs)

    def load_weights(self, folder: str | Path) -> None:
        """Take over every weight that :meth:`save_pretrained` wrote to ``folder`` for a model of the same
        configuration.

        Raises:
            ValueError: no model there, or its weights do not fit this one.
        """
        from rewardfuse.loading import load_weights

        load_weights(self, folder)

    def save_pretrained(
        self, folder: str | Path, *, state_dict: dict[str, torch.Tensor] | None = None, is_main_process: bool = True
    ) -> None:
        """Write ``config.json`` and safetensors weights; ``state_dict`` replaces the model's own.

        ``AutoModelForSequenceClassification`` reads a decoder so written and gives the same ``K`` outputs (where pad is
        not eos, and without a bias of the head, which it has no place for); the tie parameter stands in
        ``config.json``.
        """
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        for name in ("weight", "bias"):
            if f"head.{name}" in state_dict:
                state_dict[f"{HEAD}.{name}"] = state_dict.pop(f"head.{name}")
        self._write_log_tie(state_dict)
        with quiet_transformers():
            self.backbone.save_pretrained(folder, state_dict=state_dict, is_main_process=is_main_process)
            if is_main_process:
                self.config.architectures = [architecture(self.config, type(self.backbone).__name__)]
                self.config.save_pretrained(folder)

    def _write_log_tie(self, state_dict: dict[str, torch.Tensor]) -> None:
        """The tie parameter stands in ``config.json``: other readers of the weights have no place for it."""
        if "log_tie" in state_dict:
            self.config.log_tie = state_dict.pop("log_tie").item()

    def read_log_tie(self, config: "PreTrainedConfig", folder: str | Path) -> None:
        """Take over the tie parameter of a configuration, in place.

        Raises:
            ValueError: it has none, or no finite one.
        """
        value = getattr(config, "log_tie", None)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{folder}: log_tie in config.json must be a finite number, got {value!r}")
        if self.log_tie is None:
            self.add_log_tie()
        with torch.no_grad():
            self.log_tie.fill_(value)
