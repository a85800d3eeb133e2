"""One contestant of ``rewardfuse bench trainer``: a trainer that runs in a process of its own, round by round.

A round is an epoch over the same few batches. Between rounds the trainer waits, so that contestants can take turns
while each keeps its model, optimizer and memory. After the timed rounds the parts of a step are timed, in rounds of
their own.
"""

from __future__ import annotations

import functools
import importlib
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

DATA, FORWARD, HEAD, LOSS, BACKWARD, OPTIMIZER, REST = PARTS = (
    "data",
    "forward",
    "pooling + head",
    "loss + metrics",
    "backward",
    "optimizer",
    "rest",
)
#: Commands to a waiting trainer: run a round, run a round with its parts timed, end.
ROUND, ROUND_OF_PARTS, STOP = "round", "round of parts", "stop"
OURS = "rewardfuse.integrations.trl"


class Job(NamedTuple):
    """What a contestant runs."""

    module: str  #: "trl" or the drop-in, which has the same names
    options: dict[str, Any]  #: of its RewardConfig, beyond those that all share
    pairs: Sequence[tuple[list[int], list[int]]]  #: token ids of (chosen, rejected): the batches of a round in order
    pairs_per_step: int
    most_rounds: int
    width: int
    layers: int
    vocabulary: int
    device: str
    threads: int | None
    folder: str  #: for what trainers print and write


class Stopwatch:
    """Seconds that parts take, each without the parts inside it; on a GPU it waits for the device at every change."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._wait, self._open, self._since = wait, [], 0.0

    def enter(self, part: str) -> None:
        """The part begins; the one that it lies in stands still."""
        self._change()
        self._open.append(part)

    def leave(self) -> None:
        """The part that began last ends."""
        self._change()
        self._open.pop()

    def _change(self) -> None:
        self._wait()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count the calls of ``owner.name`` from now on as ``part``."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return original(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, timed)

    def watch_trainer(self, trainer: Any) -> None:
        """Time the parts of a ``transformers.Trainer``'s steps; to be called when its training has begun."""
        for owner, name, part in (
            (trainer, "get_batch_samples", DATA),  # collates, and moves where accelerate does that
            (trainer, "_prepare_inputs", DATA),
            (trainer.model.base_model, "forward", FORWARD),
            (trainer.model, "forward", HEAD),
            (trainer, "compute_loss", LOSS),
            (trainer, "log", LOSS),  # where metrics that were kept on the device reach the host
            (trainer.accelerator, "backward", BACKWARD),
            (trainer, "_clip_grad_norm", OPTIMIZER),
            (trainer, "_get_grad_norm", OPTIMIZER),
            (trainer.optimizer, "step", OPTIMIZER),
            (trainer.model_wrapped, "zero_grad", OPTIMIZER),
        ):
            self.watch(owner, name, part)


def work(connection: Connection, job: Job) -> None:
    """Run the job as commands come; answers ("ready" | "round" | "failed", facts)."""
    try:
        _redirect_output(job)
        trainer = build_trainer(job)
        trainer.add_callback(_rounds(trainer, connection, job.device))
        connection.send(("ready", {}))
        if connection.recv() != STOP:
            trainer.train()
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        connection.send(("failed", {"reason": f"{type(error).__name__}: {lines[0]}"}))


def _redirect_output(job: Job) -> None:
    """Trainers print what they log, and warn: into a file, which somebody who looks for an error finds."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(Path(job.folder) / "output.txt", "w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


def build_trainer(job: Job) -> Any:
    """The contestant's trainer, its model on the device; the same weights for all, as long as seeds say the same."""
    if job.device == "cuda":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with several, the Trainer would split batches over them
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    from datasets import Dataset

    from rewardfuse.byte_tokenizer import byte_tokenizer

    module = importlib.import_module(job.module)
    tokenizer = byte_tokenizer()
    config = module.RewardConfig(
        output_dir=job.folder,
        num_train_epochs=job.most_rounds,
        per_device_train_batch_size=job.pairs_per_step,
        train_sampling_strategy="sequential",  # the same batches in every round
        gradient_checkpointing=False,
        use_cpu=job.device == "cpu",
        bf16=job.device == "cuda",
        dataloader_pin_memory=job.device == "cuda",
        max_length=None,
        logging_steps=len(job.pairs) // job.pairs_per_step,  # once a round
        logging_first_step=True,
        seed=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **job.options,
    )
    pairs = Dataset.from_list([{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in job.pairs])
    return module.RewardTrainer(
        model=_model(job, tokenizer), args=config, train_dataset=pairs, processing_class=tokenizer
    )


def _model(job: Job, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=job.vocabulary,
            hidden_size=job.width,
            intermediate_size=4 * job.width,
            num_hidden_layers=job.layers,
            num_attention_heads=8,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _rounds(trainer: Any, connection: Connection, device: str) -> Any:
    """A callback that times rounds, reports them, and waits in between."""
    from transformers import TrainerCallback

    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    before = _memory(device)

    class Rounds(TrainerCallback):
        watch: Stopwatch | None = None
        watching = False
        started = 0.0

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            if self.watch is not None:
                if not self.watching:
                    self.watch.watch_trainer(trainer)
                    self.watching = True
                self.watch.seconds.update(dict.fromkeys(PARTS, 0.0))
                self.watch.enter(REST)
            wait()
            self.started = time.perf_counter()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait()
            facts: dict[str, Any] = {"seconds": time.perf_counter() - self.started}
            if self.watch is not None:
                self.watch.leave()
                facts["parts"] = dict(self.watch.seconds)
            facts["peak_bytes"] = _peak_memory(device) - before
            facts["tokens_so_far"] = state.log_history[-1]["num_tokens"]
            facts["losses"] = [entry["loss"] for entry in state.log_history if "loss" in entry]
            connection.send(("round", facts))
            command = connection.recv()
            if command == ROUND_OF_PARTS and self.watch is None:
                self.watch = Stopwatch(wait)
            control.should_training_stop = command == STOP

    return Rounds()


def _memory(device: str) -> int:
    """What there is before the first step: model and trainer."""
    if device == "cpu":
        return _peak_memory(device)
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_memory(device: str) -> int:
    """Bytes at the worst moment so far: of the process on a CPU, of torch's allocator on a GPU."""
    if device == "cpu":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return torch.cuda.max_memory_allocated()


def _nothing() -> None:
    pass
