"""TRL's reward trainer on the fused Bradley-Terry loss, and one of its kind for ranked lists.

Change one import; nothing else in a script has to change::

    from rewardfuse.integrations.trl import RewardConfig, RewardTrainer  # was: from trl import …

With default options losses and metrics equal TRL's own (tested against TRL 1.16). Ranked lists, which TRL has no
trainer for: ``ListwiseRewardConfig``, ``ListwiseRewardTrainer``, ``DataCollatorForRankedLists``. The trainers of
policies (``GRPOTrainer``, ``RLOOTrainer`` and their configurations) are loaded when they are first asked for, since
TRL takes seconds to load its own.
"""

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from rewardfuse import bradley_terry_loss
from rewardfuse.batching import Rows

try:
    import trl
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError(
        "rewardfuse.integrations.trl needs TRL, which is not installed: pip install rewardfuse[trl]"
    ) from error

from trl.trainer.reward_trainer import DataCollatorForPreference as _TRLDataCollator

from rewardfuse.integrations._patching import HookChangedError, check_parameters, warn_if_untested
from rewardfuse.integrations._trl_lists import DataCollatorForRankedLists, ListwiseRewardConfig, ListwiseRewardTrainer
from rewardfuse.integrations._trl_metrics import DeferredMetrics, PredictedTables, number
from rewardfuse.integrations._trl_pooling import PooledRows, PoolingOptions, count_tokens
from rewardfuse.reward_model import row_inputs

if TYPE_CHECKING:
    from rewardfuse.integrations._trl_policy import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

__all__ = [
    "DataCollatorForPreference",
    "DataCollatorForRankedLists",
    "GRPOConfig",
    "GRPOTrainer",
    "ListwiseRewardConfig",
    "ListwiseRewardTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
]

TESTED_TRL = "1.16"
POLICY_TRAINERS = ("GRPOConfig", "GRPOTrainer", "RLOOConfig", "RLOOTrainer")
PAIR_COLUMNS = ("margin", "weight", "target")  # numbers that belong to a pair: for the loss, not for the model


HOOKS = {  # the methods of TRL's trainer that are replaced or wrapped here, and what they take beside self
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "_set_signature_columns_if_needed": (),
    "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    "log": ("logs", "start_time"),
    "floating_point_ops": ("inputs",),
    "_track_num_input_tokens": ("inputs",),
    "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
}


def check_hooks(trainer: type, hooks: dict[str, tuple[str, ...]]) -> None:
    """Raises HookChangedError unless the class ``trainer`` has each method of ``hooks`` with just these parameters."""
    for name, parameters in hooks.items():
        if not hasattr(trainer, name):
            raise HookChangedError(f"{trainer.__module__}.{trainer.__qualname__} has no {name} any more")
        check_parameters(getattr(trainer, name), ("self", *parameters))


warn_if_untested("trl", TESTED_TRL)
check_hooks(trl.RewardTrainer, HOOKS)
check_hooks(_TRLDataCollator, {"torch_call": ("examples",)})


def __getattr__(name: str) -> Any:
    if name in POLICY_TRAINERS:
        from rewardfuse.integrations import _trl_policy

        return getattr(_trl_policy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass
class RewardConfig(PoolingOptions, trl.RewardConfig):
    r"""TRL's ``RewardConfig`` with the further options of :func:`rewardfuse.bradley_terry_loss`, and of pooling.

    Parameters (beside all of TRL's, ``center_rewards_coefficient`` among them):
        label_smoothing (float, default 0.0): probability :math:`\varepsilon` in [0, 0.5] that a label is flipped:
            :math:`t = y (1 - \varepsilon) + (1 - y) \varepsilon` with y = ``target`` (1 where the data set has none).
            It is not ``label_smoothing_factor``, which TRL inherits from ``transformers`` and never reads.
        beta (float, default 1.0): scale of the reward difference, :math:`z = \beta (r_c - r_r) - m`; positive.
        pooling (str, default "transformers"): where a reward is read: as TRL, at the last token that is not the pad
            token (one token early where pad is eos), or "attention_mask", at the last token that the mask covers,
            with the head run on those tokens alone.
        row_layout (str, default "padded"): how the rows of a batch lie: as TRL, or without padding to the longest one,
            "grouped" by length or "packed" end to end; these need ``pooling="attention_mask"``.

    Raises:
        ValueError: ``label_smoothing`` or ``beta`` out of range; ``pooling`` or ``row_layout`` is none of these, or
            they do not go together.
    """

    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Probability in [0, 0.5] that a preference label is flipped (conservative Bradley-Terry)."},
    )
    beta: float = field(default=1.0, metadata={"help": "Positive scale of the reward difference inside the sigmoid."})

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.label_smoothing <= 0.5:
            raise ValueError(f"label_smoothing must be between 0 and 0.5, got {self.label_smoothing}")
        if not 0.0 < self.beta < float("inf"):
            raise ValueError(f"beta must be positive and finite, got {self.beta}")
        if self.label_smoothing_factor != 0:
            warnings.warn(
                f"label_smoothing_factor={self.label_smoothing_factor} has no effect on a reward loss: "
                "set label_smoothing",
                stacklevel=3,
            )


@dataclass
class DataCollatorForPreference(_TRLDataCollator):
    """TRL's collator, which also batches the optional columns ``weight`` and ``target`` as float32 tensors [pairs].

    Raises:
        TypeError: a column that some pair has and that holds no number for another, named with the value that came.
    """

    def rows(self, examples: list[dict[str, Any]]) -> Rows:
        """Token ids of 2 x pairs sequences, the chosen ones first, and the columns, float32 [pairs]."""
        sequences = [example[name] for name in ("chosen_ids", "rejected_ids") for example in examples]
        return sequences, _columns(examples)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch of 2 x pairs sequences, the chosen ones first."""
        pairs = [{key: value for key, value in example.items() if key not in PAIR_COLUMNS} for example in examples]
        return {**super().torch_call(pairs), **_columns(examples)}


def _columns(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor([number(name, example.get(name), "pair") for example in examples], dtype=torch.float)
        for name in PAIR_COLUMNS
        if any(name in example for example in examples)
    }


class RewardTrainer(PooledRows, PredictedTables, DeferredMetrics, trl.RewardTrainer):
    r"""TRL's ``RewardTrainer`` with the loss and its metrics from :func:`rewardfuse.bradley_terry_loss`.

    With r_c, r_r the rewards of a pair (``logits.squeeze(-1)``, chosen in the first half of the batch),

    .. math:: \ell = w\,[-t \log\sigma(z) - (1 - t) \log\sigma(-z) + c\,(r_c + r_r)^2],\quad z = \beta (r_c - r_r) - m,

    averaged over the pairs of the batch (:math:`\varepsilon`, :math:`\beta`, c: see :class:`RewardConfig`). The data
    set may have columns ``margin`` (m, default 0), ``weight`` (w, default 1) and ``target`` (y in t, default 1: the
    probability that the chosen response is the better one). TRL keeps ``margin`` alone and drops the other two. A
    ``trl.RewardConfig`` works as well and means the default options.

    Logged: TRL's own names and values, ``accuracy`` strict (ties count as wrong). Pairs of weight 0 are left out of
    ``accuracy`` and ``margin``. Values reach the host when they are logged, not in every step.

    Deviations from TRL: the loss is computed and returned in float32 where TRL keeps the dtype of the scores
    (bfloat16 models); ``margin`` is not passed to the model; ``predict`` and ``compute_metrics`` get one row a pair,
    [pairs, 2], the chosen response's reward first, where TRL's [2 x pairs, 1] loses some of a last, partial batch.

    Source: Bradley and Terry 1952; TRL 1.16 ``RewardTrainer.compute_loss``.

    Warns:
        pad and eos are the same token and ``pooling`` is "transformers": every reward is read one token early.

    Raises:
        TypeError: a column without a number for some pair.
        ValueError: ``pooling="attention_mask"`` and a model that does not read the last token through a head
            ``score``, or with virtual tokens of PEFT; a ``row_layout`` that does not go with the collator, the
            backbone or the way in which the weights are spread over processes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if type(self.data_collator) is _TRLDataCollator:
            self.data_collator = DataCollatorForPreference(**vars(self.data_collator))
        self._set_up_rows()

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in PAIR_COLUMNS if name not in self._signature_columns]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of the batch, a 0-d float32 tensor; with ``return_outputs`` also the model's outputs."""
        pair = {name: inputs[name] for name in PAIR_COLUMNS if name in inputs}
        tokens = count_tokens(inputs)
        if "row_lengths" in inputs:
            inputs = row_inputs(inputs)
        inputs = {name: value for name, value in inputs.items() if name not in PAIR_COLUMNS}
        inputs["use_cache"] = False  # no use here, and it clashes with gradient checkpointing
        outputs = model(**inputs)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)

        # a trl.RewardConfig has no such options: the defaults of the loss hold then
        options = {name: getattr(self.args, name) for name in ("label_smoothing", "beta") if hasattr(self.args, name)}
        loss, stats = bradley_terry_loss(
            chosen,
            rejected,
            **pair,
            **options,
            center_rewards_coefficient=self.args.center_rewards_coefficient or 0.0,
            return_stats=True,
        )
        self._record(outputs.logits, stats.accuracy, stats.reward_margin, tokens)
        return (loss, outputs) if return_outputs else loss

    def _prediction_table(self, rewards, inputs):
        return torch.stack(rewards.chunk(2), dim=1)
