"""Training runs that one process and several must end alike; run by ``torchrun``, this file does them all.

torchrun --nproc_per_node 2 tests/process_cases.py FOLDER NAME…

Numbers of records do not divide by what a step takes: the last step of an epoch has a ragged rest, with a process
that has less to do than the other, or nothing.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rewardfuse import _processes
from rewardfuse.batch_losses import list_loss, pair_loss
from rewardfuse.batching import ListCollator, ListDataset, PairCollator, PairDataset
from rewardfuse.data import PreferencePair
from rewardfuse.score import score_dataset
from rewardfuse.train import head_for, train_reward_model
from test_train import KillAt, Killed, byte_tokenizer, options, tiny_model
from test_train_lists import lists as ragged_lists
from test_train_objectives import KINDS, model_for

RECORDS_A_STEP = 4
SETTINGS = {"num_train_epochs": 2, "logging_steps": 1, "learning_rate": 0.01, "seed": 3}
#: name: (kind of records, how many to train and to evaluate on, further options)
CASES = {
    "pairs, one left over": ("pairs", 13, 5, {"per_device_train_batch_size": 2}),
    "pairs, three left over": ("pairs", 11, 6, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "ties": ("pairs", 9, 3, {"loss": "bradley_terry_tie", "tie_learning_rate": 0.1}),
    "ragged lists in groups": ("ragged lists", 13, 5, {"group_by_length": True}),
    "all pairs": ("ragged lists", 9, 4, {"loss": "all_pairs"}),
    "ratings": ("ratings", 10, 5, {}),
    "steps": ("solutions", 13, 5, {}),
    "ensemble": ("pairs", 5, 4, {"num_heads": 3, "num_train_epochs": 1}),
    "adapters": ("pairs", 9, 4, {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}),
}


def records(kind, start, stop):
    return ragged_lists(start, stop) if kind == "ragged lists" else KINDS[kind](start, stop)


def run(folder, name, processes, callbacks=(), **changes):
    """Train the case `name`; the records of a step are the same whatever the number of processes."""
    kind, training, evaluation, special = CASES[name]
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, **SETTINGS, **special, **changes}
    if processes == 1:
        settings["gradient_accumulation_steps"] = RECORDS_A_STEP // settings["per_device_train_batch_size"]
    chosen = options(folder, per_device_eval_batch_size=2, **settings)
    train, held_out = records(kind, 0, training), records(kind, 40, 40 + evaluation)
    model = model_for(head_for(train, held_out, chosen), dropout=0.0)
    return train_reward_model(model, byte_tokenizer(), train, held_out, chosen, callbacks)


def run_all(folder, names):
    for name in names:
        run(folder / name, name, _processes.count())


def train_and_score(folder):
    """The trained model scores a file at once; with a bar in one process alone, as scripts are written."""
    data = folder / "answers.jsonl"
    if _processes.rank() == 0:
        data.write_text("".join(json.dumps({"text": f"good {index}"}) + "\n" for index in range(7)))
    train, chosen = records("pairs", 0, 6), options(folder / "scored", max_steps=2, disable_tqdm=_processes.rank() > 0)
    model = model_for(head_for(train, (), chosen), dropout=0.0)
    train_reward_model(model, byte_tokenizer(), train, None, chosen)
    score_dataset(model, byte_tokenizer(), str(data), str(folder / "scores.jsonl"), window_size=2)


def cut(folder):
    """A run that ends after five of its seven steps, to be resumed by another number of processes."""
    with contextlib.suppress(Killed):
        run(folder / "cut", "pairs, one left over", _processes.count(), [KillAt(5)], save_steps=2)
    resumed = [KillAt(99)]  # goes on where one process stopped
    run(folder / "cut by one", "pairs, one left over", 2, resumed, save_steps=2, resume_from_checkpoint=True)


def failures(folder):
    """What the processes say when they do not fit together, and how long they wait before they say it."""
    rank = _processes.rank()
    train = records("pairs", 0, 8)
    broken = [*train[:-1], PreferencePair("x", "y", prompt="too long " * 20, source="line 8")]
    attempts = {
        "options": (train, {"learning_rate": 0.01 + rank}),
        "data": (train[rank:] + train[:rank], {}),
        "bad record": (broken, {}),
        "seed of the head": (train, {"seed": 3}),
    }
    said = {}
    for name, (data, changes) in attempts.items():
        chosen = options(folder / name, **changes)
        model = model_for(head_for(data, (), chosen), dropout=0.0)
        if name == "seed of the head" and rank == 1:
            torch.nn.init.zeros_(model.head.weight)
        started = time.monotonic()
        try:
            train_reward_model(model, byte_tokenizer(), data, None, chosen)
            said[name] = "nothing"
        except ValueError as error:
            said[name] = f"{type(error).__name__}: {error}"
        said[f"{name}, seconds"] = time.monotonic() - started
    (folder / f"failures-{rank}.json").write_text(json.dumps(said))


def gradients(folder):
    """The gradients of a loss as a user writes it, of three pairs here and one there, and of ragged lists."""
    rank, count = _processes.rank(), _processes.count()
    for name, (batch, total) in share_of_batch(rank).items():
        for wrap in (DistributedDataParallel, fully_shard):
            model = wrap(tiny_model(dropout=0.0))
            options = {"normalizer": total / count}  # the processes' gradients are averaged
            rewards = model(batch["input_ids"], batch["attention_mask"])
            loss = list_loss(rewards, batch, **options) if name == "lists" else pair_loss(rewards, batch, **options)[0]
            loss.backward()
            whole = {key: _whole(value.grad) for key, value in model.named_parameters() if value.requires_grad}
            mean = sum(_processes.gather(loss.item())) / count
            if rank == 0:
                torch.save({"loss": mean, **whole}, folder / f"gradients of {name}, {wrap.__name__}.pt")


def share_of_batch(rank):
    """{name: (the batch of this process, items of all processes)}; rank None: one process has it all."""
    items = {
        "pairs": (PairCollator, PairDataset(records("pairs", 0, 4), byte_tokenizer(), 32).items),
        "lists": (ListCollator, ListDataset(records("ragged lists", 0, 4), byte_tokenizer(), 32).items),
    }
    parts = {None: slice(None), 0: slice(0, 3), 1: slice(3, None)}
    return {name: (make(byte_tokenizer())(all_of[parts[rank]]), len(all_of)) for name, (make, all_of) in items.items()}


def _whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


@contextlib.contextmanager
def fsdp_on_cpus():
    """accelerate shards on accelerators alone: tell it that these processes have some. torch shards on CPUs too."""

    def pretend(self, *arguments, **options):
        original(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    settings |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    original = PartialState.__init__
    with mock.patch.dict(os.environ, settings), mock.patch.object(PartialState, "__init__", pretend):
        yield


def sharded(folder):
    """Under FSDP2: a whole run, one that is stopped and resumed, one in bfloat16; and what cannot be sharded."""
    name, saves = "pairs, one left over", {"save_steps": 2}
    run(folder / "fsdp", name, 2, **saves)
    with contextlib.suppress(Killed):
        run(folder / "fsdp cut", name, 2, [KillAt(5)], **saves)
    run(folder / "fsdp cut", name, 2, resume_from_checkpoint=True, **saves)
    run(folder / "fsdp bf16", name, 2, bf16=True, eval_steps=2, load_best_model_at_end=True)
    said = {}
    for refused in ("adapters", "ties", "ragged lists in groups"):
        try:
            run(folder / f"fsdp {refused}", refused, 2)
        except ValueError as error:
            said[refused] = str(error)
    (folder / f"refused-{_processes.rank()}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    with _processes.connected(use_cpu=True):
        run_all(target, sys.argv[2:] or CASES)
        train_and_score(target)
        cut(target)
        failures(target)
        gradients(target)
        with fsdp_on_cpus():
            sharded(target)
