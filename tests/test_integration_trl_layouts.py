"""TRL's reward trainers on batches without padding: grouped and packed rows train and log as padded ones do."""

import json
import math
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install rewardfuse[trl]")

import trl
from datasets import Dataset  # noqa: F401, for the processes below
from transformers import AutoConfig, AutoModelForSequenceClassification

from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations import trl as ours
from rewardfuse.integrations._trl_pooling import LaidOutCollator
from test_integration_trl import history, make_trainer
from test_integration_trl_lists import make_trainer as make_list_trainer
from test_integration_trl_pooling import BY_MASK, LAYOUTS, assert_close_logs, first_rows, lists, pairs

STEPS = 20


@pytest.fixture(scope="module")
def eos_is_pad():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def eos_is_not_pad():
    return byte_tokenizer()


@pytest.mark.parametrize("row_layout", LAYOUTS)
def test_twenty_steps_differ_from_trl_where_pad_is_not_eos(tmp_path, eos_is_not_pad, row_layout):
    options = {"include_num_input_tokens_seen": "non_padding"}
    theirs = history(make_trainer(trl, tmp_path / "trl", eos_is_not_pad, pairs(), **options))
    options.update(BY_MASK, row_layout=row_layout)
    mine = history(make_trainer(ours, tmp_path / "ours", eos_is_not_pad, pairs(), **options))
    assert mine[0]["num_input_tokens_seen"] > 0 and len({step["loss"] for step in mine}) == STEPS
    assert_close_logs(mine, theirs)


@pytest.mark.parametrize("row_layout", ["grouped", "packed"])
def test_layout_of_lists_changes_training_or_evaluation(tmp_path, eos_is_pad, row_layout):
    runs = {}
    for layout in ("padded", row_layout):
        trainer = make_list_trainer(tmp_path / layout, eos_is_pad, lists(), row_layout=layout, **BY_MASK)
        trainer.train()
        evaluated = {k: v for k, v in trainer.evaluate(lists(7)).items() if "runtime" not in k and "second" not in k}
        runs[layout] = [entry for entry in trainer.state.log_history if "loss" in entry], evaluated
    assert len({step["loss"] for step in runs[row_layout][0]}) == 10
    assert_close_logs(runs[row_layout][0], runs["padded"][0])
    assert runs[row_layout][1] == pytest.approx(runs["padded"][1], rel=1e-5, abs=1e-5)
    assert runs[row_layout][1]["eval_num_tokens"] > 0


def test_packed_rows_read_each_other(tmp_path, eos_is_pad):
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "openai-gpt", vocab_size=len(eos_is_pad), n_embd=16, n_layer=1, n_head=2, num_labels=1, initializer_range=0.5
    )
    model = AutoModelForSequenceClassification.from_config(config)
    args = ours.RewardConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        row_layout="packed",
        gradient_checkpointing=False,
        **BY_MASK,
    )
    trainer = ours.RewardTrainer(model, args, processing_class=eos_is_pad, train_dataset=pairs(4))
    with pytest.raises(ValueError, match="OpenAIGPTModel does not keep packed sequences apart"):
        first_rows(trainer)


@pytest.mark.parametrize("config", [ours.RewardConfig, ours.ListwiseRewardConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "mean"}, "pooling must be one of transformers, attention_mask, got 'mean'"),
        ({"row_layout": "flat", **BY_MASK}, "row_layout must be one of padded, grouped, packed, got 'flat'"),
        ({"row_layout": "grouped"}, "row_layout='grouped' needs pooling='attention_mask', got 'transformers'"),
        ({"row_layout": "packed", "pad_to_multiple_of": 8, **BY_MASK}, "pad_to_multiple_of goes with .* got 8"),
    ],
)
def test_options_that_do_not_go_together_reach_training(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message):
        config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_collator_that_pads_is_taken_for_a_layout_without_padding():
    collator = trl.trainer.reward_trainer.DataCollatorForPreference(pad_token_id=0)
    with pytest.raises(ValueError, match="row_layout='packed' needs the collator of the trainer, got data_collator"):
        LaidOutCollator(collator, "packed")


@pytest.mark.parametrize("sharded", ["fsdp", "zero-3"])
def test_groups_of_sharded_weights_wait_for_each_other(tmp_path, eos_is_pad, sharded):
    trainer = make_trainer(ours, tmp_path, eos_is_pad, pairs(4), row_layout="packed", **BY_MASK)
    zero = SimpleNamespace(zero_stage=3) if sharded == "zero-3" else None
    trainer.accelerator = SimpleNamespace(num_processes=2, state=SimpleNamespace(deepspeed_plugin=zero))
    trainer.is_fsdp_enabled = sharded == "fsdp"
    trainer._check_passes("packed")
    with pytest.raises(ValueError, match="row_layout='grouped' does not go with weights sharded over processes"):
        trainer._check_passes("grouped")


TWO_PROCESSES = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import trl
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations import trl as ours
import test_integration_trl_layouts as here
from test_integration_trl import make_trainer
from test_integration_trl_lists import make_trainer as make_list_trainer

folder, tokenizer = sys.argv[2], byte_tokenizer()
found = {}
for name, module in (("trl", trl), ("ours", ours)):
    trainer = make_trainer(module, folder, tokenizer, here.pairs(24), max_steps=2)
    trainer.train()
    trainer.evaluate(here.pairs(13))
    found[name] = trainer.state.log_history
for layout in here.LAYOUTS:
    torch.manual_seed(0)
    options = {"pooling": "attention_mask", "row_layout": layout, "max_steps": 2}
    trainer = make_list_trainer(folder, tokenizer, here.lists(12), **options)
    seen, record = [], trainer._record
    trainer._record = lambda logits, *rest: (seen.append(logits.detach().flatten().tolist()), record(logits, *rest))
    trainer.train()
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, seen)
    found[layout] = {"logs": trainer.state.log_history, "rewards": everyone}
ranks = [1, 2, 3, 4, 5]
uneven = [{"responses": list("abcde"[:count]), "ranks": ranks[:count]} for count in [2] * 3 + [5] * 3 + [3]]
uneven = trainer._prepare_dataset(here.Dataset.from_list(uneven), tokenizer, trainer.args, "test")
predicted = trainer.predict(uneven)  # lists of two on one process, of five on the other
found["predicted"] = predicted.predictions.tolist()
trainer.accelerator.unwrap_model(trainer.model).eval()
texts = ["abcde"[place] + tokenizer.eos_token for place in range(5)]
rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
found["alone"] = [trainer.model(row, attention_mask=torch.ones_like(row)).logits.item() for row in rows]
trainer.evaluate(here.lists(7).to_iterable_dataset())
found["streamed"] = trainer.state.log_history[-1]
if trainer.is_world_process_zero():
    with open(folder + "/found.json", "w") as stream:
        json.dump(found, stream)
os._exit(0)  # gloo's threads may abort Python's own way out
"""


def test_processes_with_different_numbers_of_rows_hang_or_log_something_else(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_DATASETS_CACHE=str(tmp_path))
    command = [sys.executable, "-W", "ignore", "-c", TWO_PROCESSES, os.path.dirname(__file__), str(tmp_path)]
    runs = []
    for rank in ("0", "1"):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        runs.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE))
    try:
        errors = [run.communicate(timeout=300)[1].decode() for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], errors
    found = json.loads((tmp_path / "found.json").read_text())
    for mine, theirs in zip(found["ours"], found["trl"], strict=True):
        assert mine.keys() == theirs.keys()
        for name in [name for name in theirs if "runtime" not in name and "second" not in name]:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    for layout in LAYOUTS:
        steps = [entry for entry in found[layout]["logs"] if "loss" in entry]
        sizes = [[len(step) for step in process] for process in found[layout]["rewards"]]
        assert sizes[0] != sizes[1] and len(steps) == 2  # else nothing was at stake
        for step, rewards in zip(steps, zip(*found[layout]["rewards"], strict=True), strict=True):
            flat = [reward for process in rewards for reward in process]
            logged = [step[f"{name}_reward"] for name in ("min", "mean", "max")]
            assert logged == pytest.approx([min(flat), sum(flat) / len(flat), max(flat)], rel=1e-5)
            padded = found["padded"]["logs"][step["step"] - 1]
            assert {k: step[k] for k in padded} == pytest.approx(padded, rel=1e-5, abs=1e-5)
    assert math.isfinite(found["streamed"]["eval_loss"])
    assert len(found["predicted"]) == 7
    for row, count in zip(found["predicted"], [2] * 3 + [5] * 3 + [3], strict=True):
        assert row == pytest.approx(found["alone"][:count] + [-100.0] * (5 - count), abs=1e-5)
