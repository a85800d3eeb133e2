"""What the trainers for TRL share: metrics that stay on the device until they are logged, predictions in tables."""

from typing import Any

import torch

NAMES = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")
NO_REWARD = -100  # where a table of predictions has none: what the evaluation loop pads with


def number(name: str, value: Any, owner: str) -> float:
    """``value`` of a column as a float; a TypeError that names the column where it is no number."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"column {name!r} must hold a number for every {owner}, got {value!r}")
    return float(value)


class DeferredMetrics:
    """Mixin for ``trl.RewardTrainer``: TRL's metrics under TRL's names, without a synchronization in every step."""

    def __init__(self, *args, **kwargs):
        # (mode, metrics [5], tokens []), on the device
        self._pending: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def _record(self, logits: torch.Tensor, accuracy: torch.Tensor, margin: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep this batch's metrics on the device: ``logits`` [sequences, 1]; ``accuracy``, ``margin``, ``tokens`` 0-d.

        Processes exchange vectors of a fixed size, never the logits: those with lists may have different numbers.
        """
        training = self.model.training
        rewards = logits.to(accuracy.dtype)
        count = rewards.new_full((), rewards.numel())
        spread = torch.stack([rewards.min(), rewards.sum(), rewards.max(), count])
        low, total, high, count = self.accelerator.gather(spread[None]).unbind(dim=1)  # one row for each process
        # TRL gathers these two, and the tokens, as it would samples: the end of a data set may leave a process out
        means = self.accelerator.gather_for_metrics(torch.stack([accuracy, margin])[None]).mean(dim=0)
        metrics = torch.cat([torch.stack([low.min(), total.sum() / count.sum(), high.max()]), means])
        tokens = self.accelerator.gather_for_metrics(tokens).sum() if training else torch.zeros_like(tokens)
        self._pending.append(("train" if training else "eval", metrics, tokens))
        if len(self._pending) >= 256:  # bounds the memory of a run that never logs
            self._collect()

    def _collect(self) -> None:
        """Move the pending metrics into TRL's, with one transfer for the values and one for the token counts."""
        if not self._pending:
            return
        modes, metrics, tokens = zip(*self._pending, strict=True)
        self._pending.clear()
        for mode, values, count in zip(modes, torch.stack(metrics).tolist(), torch.stack(tokens).tolist(), strict=True):
            self._total_train_tokens += count // self._tp_size
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
            for name, value in zip(NAMES, values, strict=True):
                self._metrics[mode][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log ``logs`` with the averages of the metrics since the last call."""
        self._collect()
        super().log(logs, start_time)


class PredictedTables:
    """Mixin for ``trl.RewardTrainer``: predictions with one row for each sample, a pair or a list.

    The evaluation loop counts samples along the first dimension when it gathers a last, partial batch, and pads only
    the second one to what other processes and batches have.
    """

    def _prediction_table(self, rewards: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The rewards [sequences] of a batch as a table [samples, K], filled up with :data:`NO_REWARD`."""
        raise NotImplementedError

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        """Loss, table of rewards, labels; of further outputs of the model, such as its hidden states, none."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if logits is None:
            return loss, None, labels
        if isinstance(logits, tuple):
            logits = logits[0]
        return loss, self._prediction_table(logits.squeeze(-1), inputs), labels
