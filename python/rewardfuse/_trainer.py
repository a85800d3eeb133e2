"""The ``transformers`` Trainer with our losses, atomic checkpoints and a stop at NaN; imported only when
training."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rewardfuse import _processes
from rewardfuse._callbacks import Progress, SaveWhole
from rewardfuse._files import atomic_file
from rewardfuse._fsdp import prepare_fsdp
from rewardfuse._global_batches import PLACEHOLDER, GlobalBatches, PlaceholderCollator, WithPlaceholders, nothing
from rewardfuse._objective_base import Objective
from rewardfuse._train_folder import JOURNAL_FILE, OPTIONS_FILE, damage_named, list_checkpoints
from rewardfuse._trainer_files import TrainerFiles
from rewardfuse._training_arguments import training_arguments
from rewardfuse.batching import EnsembleDataset, TokenizedDataset
from rewardfuse.checkpoints import quiet_transformers
from rewardfuse.lora import Lora
from rewardfuse.packing import GroupedCollator
from rewardfuse.reward_model import RewardModel, row_inputs
from rewardfuse.train_options import TrainOptions

_TIMINGS = ("_runtime", "_per_second", "_flos", "train_loss")  # not the same in every run, so not in metrics.jsonl


class NonFiniteLossError(ValueError):
    """The loss or the weights became NaN or infinite."""


def build_trainer(
    model: RewardModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    objective: Objective,
    train_set: TokenizedDataset,
    eval_set: TokenizedDataset | None,
    options: TrainOptions,
    record: dict[str, Any],
    callbacks: Sequence[transformers.TrainerCallback],
    adapters: Lora | None,
) -> "RewardTrainer":
    """Assemble the trainer of :func:`rewardfuse.train.train_reward_model`."""
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if options.num_heads > 1:
        train_set = EnsembleDataset(train_set, options.num_heads)
    collator = objective.collator(tokenizer)
    callbacks = [SaveWhole(), *objective.callbacks(), *callbacks]
    if options.early_stopping_patience is not None:
        callbacks.append(transformers.EarlyStoppingCallback(options.early_stopping_patience))
    return RewardTrainer(
        model=model,
        args=training_arguments(options, evaluates=eval_set is not None),
        data_collator=GroupedCollator(collator) if options.group_by_length else collator,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        callbacks=callbacks,
        objective=objective,
        options=options,
        record=record,
        adapters=adapters,
    )


class RewardTrainer(TrainerFiles, transformers.Trainer):
    """Trainer for an objective's batches; metrics stay on the device between log lines."""

    def __init__(
        self,
        *,
        objective: Objective,
        options: TrainOptions,
        record: dict[str, Any],
        adapters: Lora | None,
        **kwargs: Any,
    ):
        super().__init__(compute_metrics=self._evaluation_metrics, **kwargs)
        if self.is_fsdp_enabled:
            prepare_fsdp(self.model, self.accelerator.state.fsdp_plugin, options)
        elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            warnings.warn("accelerate shards on accelerators only: this run on CPUs is DDP, not FSDP", stacklevel=2)
        self.objective, self.options, self.record, self.adapters = objective, options, record, adapters
        self._sums_and_counts = torch.zeros(
            (2, len(objective.train_metrics)), dtype=torch.float64, device=self.args.device
        )
        self._first_bad_step = torch.tensor(math.inf, dtype=torch.float64, device=self.args.device)
        self._stage: Path | None = None
        for callback in list(self.callback_handler.callbacks):
            if isinstance(callback, ProgressCallback | PrinterCallback):  # both write to stdout, where --json belongs
                self.remove_callback(callback)
        if not self.args.disable_tqdm:
            self.add_callback(Progress(objective.train_metrics[0]))

    def run(self, checkpoint: Path | None) -> dict[str, Any]:
        """Train, then evaluate the final weights; returns the final metrics."""
        with quiet_transformers(), self._closed_bars():
            if checkpoint is not None:
                with damage_named(checkpoint):
                    self.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
                self.rewrite_journal()
            if checkpoint is not None and self._is_finished(checkpoint):
                best = self._best_checkpoint()
                self._load_from_checkpoint(str(best if best and self.args.load_best_model_at_end else checkpoint))
                if self.is_world_process_zero():
                    self._remove_old_checkpoints(best)  # which the kill may have prevented
            else:
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            self._check_finite(weights=True)
            metrics = self._final_metrics() if self.eval_dataset is not None else {}
        return {**metrics, "global_step": self.state.global_step, "best_global_step": self.state.best_global_step}

    def _final_metrics(self) -> dict[str, Any]:
        """The evaluation of the final weights: the last one if it was theirs, or a new one."""
        evaluated = [line for line in self.history() if "eval_loss" in line]
        chosen_step = self.state.best_global_step if self.args.load_best_model_at_end else self.state.global_step
        if not evaluated or not evaluated[-1]["step"] == chosen_step == self.state.global_step:
            self.evaluate()
            evaluated = self.history()
        return {key: value for key, value in evaluated[-1].items() if key != "step"}

    def _is_finished(self, checkpoint: Path) -> bool:
        """Whether the run had reached its end in this checkpoint and was killed before the outputs were written."""
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        saved = json.loads((checkpoint / OPTIONS_FILE).read_text(encoding="utf-8"))
        stopped = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
        lengths = ("num_train_epochs", "max_steps", "early_stopping_patience")
        return stopped and all(saved[name] == self.record[name] for name in lengths)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This batch's sum over the mean count of the step's batches (:meth:`_get_num_items_in_batch`): the mean of it
        over batches and processes, which the Trainer takes, is the mean over all items of the step."""
        outputs = model(**row_inputs(inputs), return_outputs=True)  # not model.loss: DDP works by its own forward
        if PLACEHOLDER in inputs:
            loss = nothing(outputs.outputs, outputs.log_tie)
            return (loss, outputs) if return_outputs else loss
        loss, sums_and_counts = self.objective.loss(outputs, inputs, num_items_in_batch)
        self._sums_and_counts += sums_and_counts
        marked = self._first_bad_step.clamp(max=self.state.global_step + 1)
        self._first_bad_step = torch.where(torch.isfinite(loss), self._first_bad_step, marked)
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Steps that hold the same records whatever the number of processes, see :class:`GlobalBatches`."""
        args = self.args
        sizes = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
        loader = torch.utils.data.DataLoader(
            WithPlaceholders(self.train_dataset),
            batch_sampler=GlobalBatches(self.train_dataset, *sizes, seed=args.seed),
            collate_fn=PlaceholderCollator(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """How many items of the loss the batches of this optimizer step have on average, over all processes."""
        if not batch_samples:
            return None
        counts = [0 if PLACEHOLDER in batch else self.objective.count(batch) for batch in batch_samples]
        counts = [torch.as_tensor(count, device=device) for count in counts]
        mean = torch.stack(counts).sum() / len(counts)
        return self.accelerator.reduce(mean, "mean").clamp(min=torch.finfo(mean.dtype).tiny)  # of no items the sum is 0

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """What the objective needs of this batch for its metrics, one row for each record."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return None, *self.objective.predict(model(**row_inputs(inputs), return_outputs=True), inputs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, but a tie parameter has a group of its own: in steps fit for weights it would not move."""
        optimizer = super().create_optimizer(model)
        log_tie = self.accelerator.unwrap_model(self.model).log_tie
        if self.objective.loss_name == "bradley_terry_tie" and len(optimizer.param_groups) == 2:
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter is not log_tie]
            own = {"params": [log_tie], "lr": self.options.tie_learning_rate, "weight_decay": 0.0}
            optimizer.add_param_group(own)
        return optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, but it leaves the random generator alone: evaluating must not change the training."""
        with torch.random.fork_rng(devices=[]):  # only the data loader draws, on the CPU
            return super().evaluate(*args, **kwargs)

    def _evaluation_metrics(self, prediction: transformers.EvalPrediction) -> dict[str, float]:
        self._check_finite()  # names the step at which it began
        predictions, truth = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
        metrics = self.objective.summarize(predictions, truth)
        wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
        if wrong:
            raise NonFiniteLossError(self._says(f"eval_{wrong[0]}", self.state.global_step))
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training metrics since the last line, and append the line to metrics.jsonl."""
        self._check_finite()
        if "loss" in logs:
            sums, counts = self.accelerator.reduce(self._sums_and_counts, "sum").tolist()
            means = [value / max(count, 1) for value, count in zip(sums, counts, strict=True)]
            logs.update(zip(self.objective.train_metrics, means, strict=True))
            self._sums_and_counts.zero_()
        super().log(logs, start_time)
        line = _deterministic(self.state.log_history[-1])
        if self.is_world_process_zero() and set(line) - {"step", "epoch"}:
            with open(Path(self.args.output_dir, JOURNAL_FILE), "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, sort_keys=True) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl, without what differs between equal runs (timings)."""
        lines = (_deterministic(line) for line in self.state.log_history)
        return [line for line in lines if set(line) - {"step", "epoch"}]

    def rewrite_journal(self) -> None:
        """Write metrics.jsonl anew from the state: after a resume it may hold lines from beyond the checkpoint."""
        if self.is_world_process_zero():
            with atomic_file(Path(self.args.output_dir, JOURNAL_FILE)) as stream:
                stream.writelines(json.dumps(line, sort_keys=True) + "\n" for line in self.history())

    def _check_finite(self, weights: bool = False) -> None:
        bad_step = self.accelerator.gather(self._first_bad_step.reshape(1)).min().item()
        if not math.isinf(bad_step):
            raise NonFiniteLossError(self._says("loss", int(bad_step)))
        if weights:
            own = [getattr(parameter, "_local_tensor", parameter) for parameter in self.model.parameters()]  # FSDP's
            finite = all(torch.isfinite(parameter).all() for parameter in own)
            if not all(_processes.gather(finite)):
                raise NonFiniteLossError(self._says("weight", self.state.global_step))

    def _says(self, what: str, step: int) -> str:
        left = list_checkpoints(Path(self.args.output_dir))
        newest = f"the newest checkpoint is {left[-1].name}" if left else "there is no checkpoint yet"
        return f"{what} became NaN or infinite at step {step}; {newest}"

    @contextlib.contextmanager
    def _closed_bars(self) -> Iterator[None]:
        """Close open progress bars when an error ends the run, so that its message has a line of its own."""
        try:
            yield
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Progress):
                    callback.close()


def _deterministic(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.endswith(_TIMINGS)}
