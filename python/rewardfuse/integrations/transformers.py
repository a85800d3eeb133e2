"""The fused losses for the ``Trainer`` of transformers, as its ``compute_loss_func``, and collators that go with them.

A ``compute_loss_func`` is given the model's outputs, the batch's ``labels``, and the number of labels that are not −100
in a whole optimizer step: all its accumulated micro-batches, over all processes. Here a label is a pair (or a list), so
dividing by that number gives the mean over the pairs of the step, however they fall into micro-batches::

    from rewardfuse.integrations.transformers import PairDataCollator, PairLossFunc, paired_logits

    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(name, num_labels=1),
        args=TrainingArguments(output_dir="reward-model", remove_unused_columns=False),
        data_collator=PairDataCollator(tokenizer),
        train_dataset=items,  # {"chosen_ids": [...], "rejected_ids": [...]}
        compute_loss_func=PairLossFunc(),
    )

The model may be any that gives one reward a row as ``logits`` ``[rows, 1]``. A :class:`rewardfuse.RewardModel`, which
reads the reward at the right token whatever pads, does so as :class:`ForTrainer`. In evaluation the Trainer hands
predictions to ``compute_metrics`` whole only if there is one row a label: pass
``preprocess_logits_for_metrics=paired_logits`` (``listed_logits``) along with it. An ``IterableDataset`` on several
processes needs ``accelerator_config={"dispatch_batches": False}``: accelerate would hand the rows of a batch, not its
items, to the processes.

Tested with transformers 5.23; another series warns when this module is imported. Nothing of it is imported here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from rewardfuse import bradley_terry_loss, plackett_luce_loss_packed
from rewardfuse.batching import ListCollator, PairCollator, Rows
from rewardfuse.integrations._patching import warn_if_untested
from rewardfuse.ops import _checks

__all__ = [
    "ForTrainer",
    "ListDataCollator",
    "ListLossFunc",
    "PairDataCollator",
    "PairLossFunc",
    "listed_logits",
    "paired_logits",
]

if importlib.util.find_spec("transformers"):
    warn_if_untested("transformers", "5.23")

IGNORED = -100  # what the Trainer does not count among labels
_DISPATCHED = (
    ' (an IterableDataset on several processes needs accelerator_config={"dispatch_batches": False}: accelerate would '
    "hand rows, not items, to the processes)"
)
_BARE = " (a RewardModel loses its first reward to the Trainer: give it ForTrainer(model))"


class ForTrainer(nn.Module):
    """A :class:`rewardfuse.RewardModel` as the Trainer wants a model: with ``{"logits": [rows, 1]}`` for its outputs.

    From a bare tensor the Trainer takes the first reward away, as the loss that it expects there: ``predict()`` and
    ``compute_metrics`` would see one reward too few. It also learns from the ``labels`` of this ``forward``, which are
    not used, that batches have some; for a bare model it needs ``TrainingArguments(label_names=["labels"])``.

    Everything else is the model's, so ``ForTrainer(model).save_pretrained(folder)`` writes what
    ``RewardModel.from_pretrained`` reads. The checkpoints that the Trainer writes are for resuming alone.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        return {"logits": self.model(input_ids, attention_mask)[:, None]}


@dataclass(frozen=True, kw_only=True)
class PairLossFunc:
    r"""Bradley–Terry on pairs, as a ``compute_loss_func``.

    .. math:: \frac1N \sum_i [-t_i \log σ(z_i) - (1 - t_i) \log σ(-z_i) + κ (c_i + r_i)^2],
        \quad z = β (c - r) - m, \quad t = y(1 - ε) + (1 - y)ε

    Attributes:
        margin: :math:`m`, one number for all pairs.
        label_smoothing: :math:`ε` in [0, 0.5].
        beta: the scale :math:`β` > 0.
        center_rewards_coefficient: :math:`κ` ≥ 0.

    Called with

    - ``outputs``: of 2B rows, the B chosen responses c first, then the B rejected ones r (:class:`PairDataCollator`);
      a tensor ``[2B]`` or ``[2B, 1]``, or what has such ``logits`` or ``rewards``; of any floating dtype;
    - ``labels`` ``[B]``: :math:`y`, the probability that the chosen response is the better one, 1 for an
      ordinary pair; a pair of label −100 is not counted and never looked at;
    - ``num_items_in_batch``: :math:`N`, or None: the number of labels that are not −100.

    Returns a 0-d tensor, float32 (float64 for float64 rewards); 0 where no pair counts. See
    :func:`rewardfuse.bradley_terry_loss` for sources and accuracy.

    Raises:
        ValueError, TypeError: an option out of range (at once); outputs or labels of another shape or kind; labels that
            are no probability; several GPUs in one process, for which the Trainer scales such losses wrongly.

    >>> PairLossFunc(label_smoothing=0.1)(torch.tensor([2.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, -100.0]))
    tensor(0.4133)
    """

    margin: float = 0.0
    label_smoothing: float = 0.0
    beta: float = 1.0
    center_rewards_coefficient: float = 0.0

    def __post_init__(self) -> None:
        bradley_terry_loss(torch.zeros(0), torch.zeros(0), **vars(self))

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        rewards, labels = _rewards(outputs), _labels(labels)
        _check_rows("outputs", rewards, 2 * len(labels), "two rows a label", _DISPATCHED)
        mask = labels != IGNORED
        if _checks.values_are_checked(labels):
            probable = (labels >= 0) & (labels <= 1)
            _checks.check_values("labels", labels, probable, mask, f"probabilities, or {IGNORED}")
        return bradley_terry_loss(
            *rewards.chunk(2),
            mask=mask,
            target=torch.where(mask, labels, 1),
            normalizer=_normalizer(num_items_in_batch),
            **vars(self),
        )


@dataclass(frozen=True, kw_only=True)
class ListLossFunc:
    r"""Plackett–Luce on ranked lists of any length, as a ``compute_loss_func``.

    .. math:: \frac1N \sum_l \sum_{i \le \mathtt{top\_k}} \Bigl[\log \sum_{j \ge i} e^{r_{lj}} - r_{li}\Bigr]

    Attributes:
        top_k: how many of the best of each list are known; the others were offered, but not ranked. None: all.

    Called with

    - ``outputs``: rows list after list, the best response of each first (:class:`ListDataCollator`); in the forms that
      :class:`PairLossFunc` takes;
    - ``labels`` ``[lists]``, integers: the number of responses of each list; −100: no list, of no rows;
    - ``num_items_in_batch``: :math:`N`, or None: the number of labels that are not −100.

    Ties have no place in such labels: for them there is ``ListwiseRewardTrainer`` of ``rewardfuse.integrations.trl``.

    Returns a 0-d tensor, float32 (float64 for float64 rewards). See :func:`rewardfuse.plackett_luce_loss` for sources
    and accuracy.

    Raises:
        ValueError, TypeError: ``top_k`` is no int of at least 1 (at once); outputs or labels of another shape or kind.

    >>> ListLossFunc()(torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0]), torch.tensor([3, 2]))
    tensor(0.5171)
    """

    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k: expected None or an integer of at least 1, got {self.top_k!r}")

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        rewards, lengths = _rewards(outputs), _lengths(labels)
        if lengths.device.type == "cpu":  # on a GPU looking would wait for it
            _check_rows("outputs", rewards, int(lengths.sum()), "as many rows as labels say", _DISPATCHED)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        normalizer = _normalizer(num_items_in_batch)
        return plackett_luce_loss_packed(rewards, bounds, top_k=self.top_k, normalizer=normalizer)


class PairDataCollator(PairCollator):
    """Batches for :class:`PairLossFunc` from items ``{"chosen_ids", "rejected_ids"}``, with a ``target`` or without.

    ``input_ids`` and ``attention_mask`` int64 ``[2B, T]``, the chosen rows first, padded on the tokenizer's side;
    ``labels`` float32 ``[B]``, the targets, 1 where an item has none. Items come so from
    :class:`rewardfuse.batching.PairDataset`; the Trainer leaves them their keys under ``remove_unused_columns=False``.

    Raises:
        ValueError: there are no items, one of them lacks its token ids or has none in them, or has a ``margin``,
            ``weight`` or ``head``, which the Trainer does not pass on to a loss.
    """

    def _lay_out(self, items: Sequence[dict[str, Any]]) -> Rows:
        _check_keys(items, ("chosen_ids", "rejected_ids"))
        sequences, tensors = super()._lay_out(items)
        labels = tensors.pop("target", torch.ones(len(items)))
        _check_passed_on(tensors)
        return _token_ids(sequences), {"labels": labels}


class ListDataCollator(ListCollator):
    """Batches for :class:`ListLossFunc` from items ``{"response_ids"}``, best first, or with ``ranks`` (1 = best).

    ``input_ids`` and ``attention_mask`` int64 ``[responses, T]``, list after list, best first, padded on the
    tokenizer's side; ``labels`` int64 ``[lists]``, the number of responses of each.

    Raises:
        ValueError: there are no items, one of them lacks its token ids, has no responses or one without a token, has
            ranks that are not one a response, or tied, or has a ``weight``, ``top_k`` or ``head``, none of which the
            Trainer passes on to a loss.
    """

    def _lay_out(self, items: Sequence[dict[str, Any]]) -> Rows:
        _check_keys(items, ("response_ids",))
        sequences, tensors = super()._lay_out([{**item, "ranks": _ranks(item)} for item in items])
        lengths = tensors.pop("cu_seqlens").diff()
        del tensors["rows"]
        _check_passed_on(tensors)
        return _token_ids(sequences), {"labels": lengths}


def paired_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Predictions with a row a pair, ``[B, 2]`` (chosen, rejected): a ``preprocess_logits_for_metrics``.

    The Trainer cuts the predictions of a last, smaller batch to the number of its labels; with two rows a label half
    of them would be lost.

    >>> paired_logits(torch.tensor([[2.0], [0.5], [1.0], [1.5]]), torch.ones(2))
    tensor([[2.0000, 1.0000],
            [0.5000, 1.5000]])
    """
    rewards = _rewards(logits)
    _check_rows("logits", rewards, 2 * len(_labels(labels)), "two rows a label", _BARE)
    return torch.stack(rewards.chunk(2), 1)


def listed_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Predictions with a row a list, ``[lists, K]``, −100 behind the end of shorter ones: see :func:`paired_logits`.

    K is the length of the longest list, over all processes where there are several: each of them must call this.

    >>> listed_logits(torch.tensor([[2.0], [0.5], [1.0]]), torch.tensor([1, 2]))
    tensor([[   2.0000, -100.0000],
            [   0.5000,    1.0000]])
    """
    rewards, lengths = _rewards(logits), _lengths(labels)
    _check_rows("logits", rewards, int(lengths.sum()), "as many rows as labels say", _BARE)
    longest = lengths.max() if len(lengths) else lengths.sum()
    if dist.is_available() and dist.is_initialized():  # the Trainer gathers these tables as they are
        dist.all_reduce(longest, dist.ReduceOp.MAX)
    filled = torch.arange(int(longest), device=lengths.device) < lengths[:, None]
    return rewards.new_full(filled.shape, IGNORED).masked_scatter(filled, rewards)


def _rewards(outputs: Any) -> Tensor:
    """The reward of each row, ``[rows]``."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("rewards", outputs.get("logits"))
    elif not isinstance(outputs, Tensor):
        outputs = getattr(outputs, "rewards", getattr(outputs, "logits", outputs))
    if not isinstance(outputs, Tensor):
        raise TypeError(f"outputs: expected a tensor, or what has logits or rewards, got {type(outputs).__name__}")
    if outputs.dim() == 2 and outputs.shape[1] == 1:
        outputs = outputs.squeeze(1)
    if outputs.dim() != 1:
        raise ValueError(f"outputs: expected one reward a row, [rows] or [rows, 1], got {list(outputs.shape)}")
    _checks.check_rewards("outputs", outputs)
    return outputs


def _check_rows(name: str, rewards: Tensor, expected: int, words: str, reason: str) -> None:
    if len(rewards) != expected:
        raise ValueError(f"{name}: expected {words}, {expected}, got {len(rewards)}{reason}")


def _labels(labels: Any) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor from the collator, got {type(labels).__name__}")
    if labels.is_complex():
        raise TypeError(f"labels: expected real numbers, got {labels.dtype}")
    if labels.dim() != 1:
        raise ValueError(f"labels: expected one a pair or list, a 1-d tensor, got {list(labels.shape)}")
    return labels


def _lengths(labels: Any) -> Tensor:
    labels = _labels(labels)
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise TypeError(f"labels: expected the integer number of responses of each list, got {labels.dtype}")
    lengths = torch.where(labels == IGNORED, 0, labels).long()
    if _checks.values_are_checked(lengths) and (lengths < 0).any():
        raise ValueError(f"labels: expected lengths, or {IGNORED}, got {lengths.min()}")
    return lengths


def _normalizer(num_items_in_batch: Tensor | int | None) -> Tensor | float | None:
    """What to divide by; a step of no item at all must not divide by 0."""
    if not isinstance(num_items_in_batch, Tensor):
        _, number = _checks.tensor_or_number("num_items_in_batch", num_items_in_batch, 0.0)
        return None if num_items_in_batch is None else max(number, 1.0)
    if num_items_in_batch.dim():
        raise ValueError(
            f"num_items_in_batch: expected a number or a 0-d tensor, got {list(num_items_in_batch.shape)}, as the "
            "Trainer gives it with several GPUs in one process (torch.nn.DataParallel): start one process a GPU"
        )
    return num_items_in_batch.clamp(min=1)


def _check_keys(items: Sequence[dict[str, Any]], keys: tuple[str, ...]) -> None:
    for item in items:
        missing = [key for key in keys if key not in item]
        if missing:
            raise ValueError(
                f"items: expected {' and '.join(keys)}, got {sorted(item)}; "
                "the Trainer drops them without TrainingArguments(remove_unused_columns=False)"
            )


def _token_ids(sequences: Sequence[Any]) -> list[Any]:
    """Each row's token ids, none of them empty; as lists, since ``torch.tensor`` warns where it is given a tensor."""
    if not all(_has_some(ids) for ids in sequences):
        raise ValueError("items: expected at least one token id in each response, got one without")
    return [ids.tolist() if isinstance(ids, Tensor) else ids for ids in sequences]


def _ranks(item: Mapping[str, Any]) -> Sequence[Any]:
    """The rank of each response of a list; those of an item without are best first."""
    responses, ranks = item["response_ids"], item.get("ranks")
    if not _has_some(responses):
        raise ValueError("items: expected at least one response in response_ids, got none")
    if ranks is None:
        return range(len(responses))
    if len(ranks) != len(responses):
        raise ValueError(f"items: expected one of ranks a response, {len(responses)}, got {len(ranks)}")
    return ranks


def _has_some(values: Any) -> bool:
    return values is not None and len(values) > 0


def _check_passed_on(tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        raise ValueError(
            f"items: expected token ids alone, got {', '.join(tensors)} (ranks: tied ones) too, which the Trainer does "
            "not pass on to its loss; the trainers of rewardfuse.integrations.trl and `rewardfuse train` take them"
        )
