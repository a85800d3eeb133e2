"""A trainer for ranked lists in the manner of TRL's ``RewardTrainer``; imported by ``rewardfuse.integrations.trl``."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import global_then_local_main_first, pad

from rewardfuse.batch_losses import LIST_LOSSES, list_loss, list_stats
from rewardfuse.batching import Rows, collate_lists
from rewardfuse.data import kind_of
from rewardfuse.data.ranked_lists import RankedList, check_responses, ranks_of
from rewardfuse.integrations._trl_metrics import NO_REWARD, DeferredMetrics, PredictedTables, number
from rewardfuse.integrations._trl_pooling import PooledRows, PoolingOptions, count_tokens
from rewardfuse.ops.plackett_luce import TIES
from rewardfuse.reward_model import row_inputs
from rewardfuse.tokenizing import as_messages

COLUMNS = ("response_ids", "ranks", "weight", "top_k")  # of a prepared data set


@dataclass
class ListwiseRewardConfig(PoolingOptions, trl.RewardConfig):
    """TRL's ``RewardConfig`` with the options of the losses of ranked lists, ``pooling`` and ``row_layout``.

    Parameters (beside TRL's; ``per_device_train_batch_size`` counts lists, ``max_length`` leaves out a list if any of
    its responses is longer):
        loss (str, default "plackett_luce"): :func:`rewardfuse.plackett_luce_loss_packed`, or "all_pairs",
            :func:`rewardfuse.all_pairs_loss` on every pair of different ranks.
        ties (str, default "breslow"): how Plackett-Luce takes tied ranks, "breslow" or "efron".
        top_k (int, default None): only so many of the best responses of a list are taken as ranked.
        pooling, row_layout (str): as of ``RewardConfig``.

    Raises:
        ValueError: an option that is none of these, ``ties`` with another loss than Plackett-Luce, or
            ``center_rewards_coefficient``, which is made for pairs.
    """

    loss: str = field(default="plackett_luce", metadata={"help": "Loss of a ranked list: plackett_luce or all_pairs."})
    ties: str = field(default="breslow", metadata={"help": "How plackett_luce takes tied ranks: breslow or efron."})
    top_k: int | None = field(
        default=None, metadata={"help": "Take only so many of the best responses of a list as ranked."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, accepted in (("loss", LIST_LOSSES), ("ties", TIES)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        if self.loss != "plackett_luce" and self.ties != "breslow":
            raise ValueError(f"ties is an option of the loss plackett_luce, not of {self.loss}, got {self.ties!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.center_rewards_coefficient:
            raise ValueError(
                f"center_rewards_coefficient is an option of pairs, got {self.center_rewards_coefficient} for lists"
            )


@dataclass
class DataCollatorForRankedLists(DataCollatorMixin):
    """Batches examples ``{"response_ids": [[int]], "ranks": [number]}``, with numbers ``weight``, ``top_k`` or without.

    Each response is one row, ``input_ids`` and ``attention_mask`` [responses, T], right-padded; lists lie end to end,
    the best response first, as the other tensors say (:func:`rewardfuse.batching.collate_lists`).
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def rows(self, examples: list[dict[str, Any]]) -> Rows:
        """Token ids of every response, list after list, best first, and the other tensors of the batch."""
        return collate_lists(examples)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences, rankings = self.rows(examples)
        ids = [torch.tensor(sequence) for sequence in sequences]
        options = {"padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of}
        return {
            "input_ids": pad(ids, padding_value=self.pad_token_id, **options),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, **options),
            **rankings,
        }


class ListwiseRewardTrainer(PooledRows, PredictedTables, DeferredMetrics, trl.RewardTrainer):
    r"""TRL's ``RewardTrainer`` for ranked lists: Plackett-Luce or all ordered pairs, each response encoded once.

    The data set has a column ``responses`` (at least two strings, or lists of chat messages, a row), with or without
    ``prompt``, and one of ``ranks``, ``order``, ``labels``; optionally ``weight`` and ``top_k``. They mean what they do
    in data files, see :mod:`rewardfuse.data.ranked_lists`. A tokenized one has ``response_ids``, not ``responses``.
    Lists may differ in length. Texts are put together as TRL does: eos after plain text, the chat template for
    messages (a string beside messages is one message, of the user or the assistant).

    With s the rewards of a list, best first, the loss is :math:`\sum_{i \le k} (\log \sum_{j \ge i} e^{s_j} - s_i)`,
    averaged over the lists of the batch (ties, ``top_k``, ``all_pairs``: :class:`ListwiseRewardConfig`). On lists of
    two it is TRL's loss.

    Logged under TRL's names: ``accuracy`` is the share of the ordered pairs (ranks differ) of a batch that the rewards
    order alike, ``margin`` the mean reward of the best responses minus that of the others, averaged over lists; those
    of weight 0 are left out of both. Values reach the host when they are logged, not in every step.

    ``predict`` and ``compute_metrics`` get one row a list, [lists, K]: the rewards of its responses, the best first
    (tied ones as given), and -100, with which ``transformers`` pads, beyond its end.

    Source: Luce 1959, Plackett 1975; all pairs: Ouyang et al. 2022 (InstructGPT), eq. 1.

    Raises:
        ValueError, TypeError: a row that is no ranked list, named with its number; ``args`` of another class; a data
            set without rows, or of which ``max_length`` leaves none.
    """

    def __init__(self, model, args: ListwiseRewardConfig | None = None, *more, **kwargs):
        if args is not None and not isinstance(args, ListwiseRewardConfig):
            raise TypeError(f"args must be a ListwiseRewardConfig, got {type(args).__name__}")
        super().__init__(model, args or ListwiseRewardConfig("ranked-reward"), *more, **kwargs)
        if type(self.data_collator) is DataCollatorForPreference:
            self.data_collator = DataCollatorForRankedLists(**vars(self.data_collator))
        self._set_up_rows()

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        def prepare(example, index):
            try:
                return _prepare(example, processing_class)
            except (ValueError, TypeError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError  # subclasses take other arguments
                raise kind(f"{dataset_name} data set, row {index}: {error}") from None

        sized = isinstance(dataset, Dataset)  # an IterableDataset takes neither of these options
        options = {"num_proc": args.dataset_num_proc, "desc": f"Preparing {dataset_name} dataset"} if sized else {}
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{dataset_name} data set: expected at least one row, got none")
        unused = [name for name in first if name not in COLUMNS]
        with global_then_local_main_first():
            dataset = dataset.map(prepare, with_indices=True, remove_columns=unused, **options)
            if args.max_length is not None:
                dataset = dataset.filter(
                    lambda example: max(map(len, example["response_ids"])) <= args.max_length, **options
                )
        if next(iter(dataset), None) is None:
            raise ValueError(
                f"{dataset_name} data set: every list has a response longer than max_length={args.max_length}"
            )
        return dataset

    def _set_signature_columns_if_needed(self):
        self._signature_columns = list(COLUMNS)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of the batch's lists, a 0-d float32 tensor; with ``return_outputs`` also the model's outputs."""
        outputs = model(
            **row_inputs(inputs), use_cache=False
        )  # a cache has no use here, and clashes with checkpointing
        rewards = outputs.logits.squeeze(-1)
        loss = list_loss(rewards, inputs, loss=self.args.loss, ties=self.args.ties, top_k=self.args.top_k)
        stats = list_stats(rewards, inputs, self.args.top_k)
        self._record(outputs.logits, stats.accuracy, stats.margin, count_tokens(inputs))
        return (loss, outputs) if return_outputs else loss

    def _prediction_table(self, rewards, inputs):
        rows = inputs["rows"].to(rewards.device)
        return rewards[rows.clamp(min=0)].masked_fill(rows < 0, NO_REWARD)


def _prepare(example: dict[str, Any], tokenizer) -> dict[str, Any]:
    """What the collator needs of a row, checked: token ids, ranks, and weight and top_k if there are such columns."""
    tokenized = example.get("response_ids") is not None
    responses = _check_ids(example["response_ids"]) if tokenized else check_responses(example)
    ranks = ranks_of({**example, "responses": responses})
    numbers = {}
    for name, absent in (("weight", 1.0), ("top_k", len(responses))):
        if name in example:
            numbers[name] = absent if example[name] is None else example[name]
    if "weight" in numbers:
        numbers["weight"] = number("weight", numbers["weight"], "list")
    RankedList(tuple(responses), ranks, **numbers)  # checks them
    if not tokenized:
        responses = _check_ids([_token_ids(example, response, tokenizer) for response in responses])
    return {"response_ids": responses, "ranks": list(ranks), **numbers}


def _check_ids(responses: Any) -> list[list[int]]:
    if not isinstance(responses, list):
        raise ValueError(f"`response_ids` must be a list, got {kind_of(responses)}")
    for index, ids in enumerate(responses):
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise ValueError(f"`response_ids[{index}]` must be a list of at least one token id, got {ids!r:.40}")
    return responses


def _token_ids(example: dict[str, Any], response: Any, tokenizer) -> list[int]:
    prompt = example.get("prompt")
    if not isinstance(prompt, str | list | None):
        raise ValueError(f"`prompt` must be a string or a list of chat messages, got {kind_of(prompt)}")
    if isinstance(response, str) and not isinstance(prompt, list):
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos token, with which plain text must end: give it one")
        eos = "" if response.endswith(tokenizer.eos_token) else tokenizer.eos_token
        return tokenizer((prompt or "") + response + eos)["input_ids"]
    messages = as_messages(prompt, "user") + as_messages(response, "assistant")
    tools = example.get("tools")
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    options.update(example.get("chat_template_kwargs") or {})
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
