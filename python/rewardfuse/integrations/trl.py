"""TRL's reward trainer on the fused Bradley-Terry loss, and one of its kind for ranked lists.

Change one import; nothing else in a script has to change::

    from rewardfuse.integrations.trl import RewardConfig, RewardTrainer  # was: from trl import …

With default options losses and metrics equal TRL's own (tested against TRL 1.16). Ranked lists, which TRL has no
trainer for: ``ListwiseRewardConfig``, ``ListwiseRewardTrainer``, ``DataCollatorForRankedLists``.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version

from rewardfuse import bradley_terry_loss

try:
    import trl
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError(
        "rewardfuse.integrations.trl needs TRL, which is not installed: pip install rewardfuse[trl]"
    ) from error

from trl.trainer.reward_trainer import DataCollatorForPreference as _TRLDataCollator

from rewardfuse.integrations._trl_lists import DataCollatorForRankedLists, ListwiseRewardConfig, ListwiseRewardTrainer
from rewardfuse.integrations._trl_metrics import DeferredMetrics, number

__all__ = [
    "DataCollatorForPreference",
    "DataCollatorForRankedLists",
    "ListwiseRewardConfig",
    "ListwiseRewardTrainer",
    "RewardConfig",
    "RewardTrainer",
]

TESTED_TRL = "1.16"
PAIR_COLUMNS = ("margin", "weight", "target")  # numbers that belong to a pair: for the loss, not for the model


def warn_if_untested(version: str) -> None:
    """Warn when ``version`` of TRL lies outside the tested series; called once, when this module is imported."""
    if Version(version).release[:2] != Version(TESTED_TRL).release:
        warnings.warn(
            f"rewardfuse.integrations.trl is tested with TRL {TESTED_TRL}, but TRL {version} is installed: "
            "losses and metrics may differ from TRL's own",
            stacklevel=2,
        )


warn_if_untested(trl.__version__)


@dataclass
class RewardConfig(trl.RewardConfig):
    r"""TRL's ``RewardConfig`` with the further options of :func:`rewardfuse.bradley_terry_loss`.

    Parameters (beside all of TRL's, ``center_rewards_coefficient`` among them):
        label_smoothing (float, default 0.0): probability :math:`\varepsilon` in [0, 0.5] that a label is flipped:
            :math:`t = y (1 - \varepsilon) + (1 - y) \varepsilon` with y = ``target`` (1 where the data set has none).
            It is not ``label_smoothing_factor``, which TRL inherits from ``transformers`` and never reads.
        beta (float, default 1.0): scale of the reward difference, :math:`z = \beta (r_c - r_r) - m`; positive.

    Raises:
        ValueError: ``label_smoothing`` or ``beta`` out of range.
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
        TypeError: a column that holds no number for one of the pairs, named with the value that came.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch of 2 x pairs sequences, the chosen ones first."""
        columns = {
            name: torch.tensor([number(name, example.get(name), "pair") for example in examples], dtype=torch.float)
            for name in PAIR_COLUMNS
            if name in examples[0]
        }
        pairs = [{key: value for key, value in example.items() if key not in PAIR_COLUMNS} for example in examples]
        return {**super().torch_call(pairs), **columns}


class RewardTrainer(DeferredMetrics, trl.RewardTrainer):
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
    (bfloat16 models), and ``margin`` is not passed to the model.

    Source: Bradley and Terry 1952; TRL 1.16 ``RewardTrainer.compute_loss``.

    Raises:
        TypeError: a column without a number for some pair.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if type(self.data_collator) is _TRLDataCollator:
            self.data_collator = DataCollatorForPreference(**vars(self.data_collator))

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in PAIR_COLUMNS if name not in self._signature_columns]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of the batch, a 0-d float32 tensor; with ``return_outputs`` also the model's outputs."""
        pair = {name: inputs[name] for name in PAIR_COLUMNS if name in inputs}
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
        self._record(outputs.logits, stats.accuracy, stats.reward_margin, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss
