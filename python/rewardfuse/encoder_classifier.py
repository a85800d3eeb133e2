"""Reward models that are encoders with the classifier of their family, as ``AutoModelForSequenceClassification`` saves
them: BERT, RoBERTa, DeBERTa and their kin, which read the first token through layers of their own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewardfuse.checkpoints import (
    LOADING,
    check_complete,
    check_folder,
    one_line_errors,
    quiet_transformers,
    take_weights,
)
from rewardfuse.pooling import padded_spans
from rewardfuse.reward_head import HeadConfig
from rewardfuse.reward_model import RewardModel


def has_own_classifier(config: Any, weight_names: Iterable[str]) -> bool:
    """Whether a checkpoint is an encoder with a classifier of another form than a linear map of one token."""
    architectures = getattr(config, "architectures", None) or [""]
    classifier = architectures[0].endswith("ForSequenceClassification") and not config.is_encoder_decoder
    return classifier and any(name.startswith("classifier.") for name in weight_names)


class EncoderRewardModel(RewardModel):
    """A sequence classifier with one label whose logit is the reward: its own pooling and head, kept whole.

    The head computes in float32. Rows are moved to the left edge first, because the first token is read. Packed rows
    and step positions are not for these models.
    """

    def __init__(self, classifier: Any):
        nn.Module.__init__(self)
        self._hold("classifier_model", classifier, HeadConfig.read(classifier.config))
        for module in self._head_modules():
            module.float()
            module.register_forward_pre_hook(_enter_float32)
            module.register_forward_hook(_leave_float32, always_call=True)

    def _head_modules(self) -> list[nn.Module]:
        base = self.classifier_model.base_model_prefix
        return [module for name, module in self.classifier_model.named_children() if name != base]

    def head_parameters(self) -> list[nn.Parameter]:
        own = [parameter for module in self._head_modules() for parameter in module.parameters()]
        return [*own, *([] if self.log_tie is None else [self.log_tie])]

    @classmethod
    def load(cls, name_or_path: str | Path, **options: Any) -> "EncoderRewardModel":
        """Load the checkpoint of a classifier.

        Raises:
            ValueError: weights are missing, or it has another number of labels than one.
        """
        from transformers import AutoModelForSequenceClassification

        with quiet_transformers():
            classifier, found = AutoModelForSequenceClassification.from_pretrained(name_or_path, **LOADING, **options)
        missing = sorted(found["missing_keys"])
        if missing:
            raise ValueError(f"{name_or_path}: {len(missing)} weights are missing, first {missing[0]}")
        check_complete(found, name_or_path)
        if classifier.config.num_labels != 1:
            labels = classifier.config.num_labels
            advice = "new_head=True (--new_head) starts a fresh head"
            raise ValueError(f"{name_or_path}: the classifier must have one label, got {labels}; {advice}")
        model = cls(classifier)
        if getattr(classifier.config, "log_tie", None) is not None:
            model.read_log_tie(classifier.config, name_or_path)
        return model

    def _outputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        name = type(self.backbone).__name__
        if attention_mask is None or input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
            raise ValueError(f"{name} takes padded rows: input_ids and attention_mask [batch, length]")
        if position_ids is not None or cu_seqlens is not None or positions is not None:
            raise ValueError(f"{name} reads its first token only: no positions, no packed rows")
        spans = padded_spans(attention_mask)
        rows, length = input_ids.shape
        columns = torch.arange(length, device=input_ids.device)
        first = spans.start - length * torch.arange(rows, device=input_ids.device)
        moved = (columns + first[:, None]) % length
        inputs = {"input_ids": input_ids.gather(1, moved), "attention_mask": attention_mask.gather(1, moved)}
        return self.backbone(**inputs).logits.float().masked_fill(~spans.nonempty[:, None], torch.nan)

    def load_weights(self, folder: str | Path) -> None:
        """As :meth:`RewardModel.load_weights`."""
        with one_line_errors(folder):
            check_folder(folder)
            saved = type(self).load(folder, dtype=self.backbone.dtype)
            take_weights(self.backbone, saved.backbone.state_dict())
        if self.log_tie is not None:
            self.read_log_tie(saved.config, folder)

    def save_pretrained(
        self, folder: str | Path, *, state_dict: dict[str, torch.Tensor] | None = None, is_main_process: bool = True
    ) -> None:
        """As ``AutoModelForSequenceClassification`` saves it."""
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        self._write_log_tie(state_dict)
        own = {name.removeprefix(f"{self._prefix}."): value for name, value in state_dict.items()}
        with quiet_transformers():
            self.backbone.save_pretrained(folder, state_dict=own, is_main_process=is_main_process)


# Hooks, and not another forward: a copy of the module (an average of weights, peft's) must run its own weights.
def _enter_float32(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Keep a head in float32 between a 16-bit encoder and the reward, under autocast as well."""
    module._without_autocast = torch.autocast(inputs[0].device.type, enabled=False)
    module._without_autocast.__enter__()
    dtype = next(module.parameters(), inputs[0]).dtype
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)


def _leave_float32(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    module.__dict__.pop("_without_autocast").__exit__(None, None, None)
