"""Two processes end with the loss, the gradients, the metrics and the weights of one on the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import process_cases
from rewardfuse._global_batches import GlobalBatches
from rewardfuse.reward_model import RewardModel
from test_train import KillAt, Killed

TESTS = Path(__file__).parent


def torchrun(*arguments, processes=2, **environment):
    """Run a script in several processes; returns the finished run, whose output tells what failed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    # On CPUs even where there is a GPU: two processes cannot share one, and the cases say what CPUs give.
    settings = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TESTS),
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    return subprocess.run(
        [*command, *map(str, arguments)], env=settings, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All cases, done by two processes; before that, a run of one process that they resume."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.raises(Killed):
        process_cases.run(folder / "cut by one", "pairs, one left over", 1, [KillAt(3)], save_steps=2)
    done = torchrun(TESTS / "process_cases.py", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def assert_same_run(first, second):
    """Every logged figure and every weight, to rounding: the processes add in another order."""
    lines = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (first, second)
    ]
    assert len(lines[0]) == len(lines[1]) > 4
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        one.pop("epoch"), other.pop("epoch")  # counts batches, and those of an epoch's last step differ in number
        assert other == pytest.approx(one, rel=2e-5, abs=2e-6)
    weights = [RewardModel.from_pretrained(path).state_dict() for path in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    # Biases of keys never matter, the last one not to differences of rewards: their gradient is rounding, which Adam
    # scales up.
    for name in weights[0].keys() - {"transformer.ln_f.bias", "transformer.h.0.attn.c_attn.bias"}:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", process_cases.CASES)
def test_two_processes_train_otherwise_than_one(folder, tmp_path, name):
    process_cases.run(tmp_path, name, 1)
    assert {"loss", "grad_norm"} < json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]).keys()
    assert_same_run(tmp_path, folder / name)


def test_run_of_two_processes_resumed_by_one_ends_otherwise(folder, tmp_path):
    name = "pairs, one left over"
    process_cases.run(folder / "cut", name, 1, save_steps=2, resume_from_checkpoint=True)
    assert_same_run(folder / name, folder / "cut")


def test_run_of_one_process_resumed_by_two_ends_otherwise(folder):
    assert_same_run(folder / "pairs, one left over", folder / "cut by one")


def test_model_trained_by_two_processes_is_refused_or_scores_otherwise(folder):
    scored = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    model = RewardModel.from_pretrained(folder / "scored")
    expected = model.score([line["text"] for line in scored]).rewards.tolist()
    assert [line["reward"] for line in scored] == pytest.approx(expected, abs=1e-6) and len(scored) == 7


def test_run_resumed_with_other_steps_goes_on(folder, tmp_path):
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps · processes \(was 4, is 2\)"):
        process_cases.run(folder / "cut", "pairs, one left over", 2, save_steps=2, resume_from_checkpoint=True)


def test_processes_that_do_not_fit_hang_or_go_on(folder):
    first, second = (json.loads((folder / f"failures-{rank}.json").read_text()) for rank in (0, 1))
    assert "learning_rate (0.01 and 1.01)" in first["options"] and first["options"] == second["options"]
    assert "data: training records (" in first["data"] and first["data"] == second["data"]
    assert first["bad record"].startswith("OtherProcessError: process 1 failed: line 8: the prompt alone has")
    assert second["bad record"].startswith("DataError: line 8: the prompt alone has")
    assert "model" in first["seed of the head"] and first["seed of the head"] == second["seed of the head"]
    assert all(value < 30 for said in (first, second) for name, value in said.items() if name.endswith("seconds"))


@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "fully_shard"])
@pytest.mark.parametrize("name", ["pairs", "lists"])
def test_global_denominator_gives_other_gradients_than_one_process(folder, name, wrap):
    found = torch.load(folder / f"gradients of {name}, {wrap}.pt")
    model, batch = process_cases.tiny_model(dropout=0.0), process_cases.share_of_batch(None)[name][0]
    loss, _ = model.loss(batch)
    loss.backward()
    assert found.pop("loss") == pytest.approx(loss.item(), rel=1e-6)
    expected = {key: value.grad for key, value in model.named_parameters()}
    assert len(found) == len(expected) and sum(gradient.abs().sum() for gradient in expected.values()) > 1
    for key, gradient in expected.items():
        torch.testing.assert_close(
            found[key.removeprefix("module.")] if key in found else found[f"module.{key}"], gradient
        )


def test_sharded_model_trains_otherwise_than_one_process(folder, tmp_path):
    process_cases.run(tmp_path, "pairs, one left over", 1, save_steps=2)
    assert_same_run(tmp_path, folder / "fsdp")
    assert_same_run(folder / "fsdp", folder / "fsdp cut")
    journal = (folder / "fsdp cut/metrics.jsonl").read_bytes()
    assert journal == (folder / "fsdp/metrics.jsonl").read_bytes()  # a resumed run of as many processes: bit for bit
    assert not list(folder.glob("fsdp*/**/pytorch_model*")) and list(folder.glob("fsdp cut/*/optimizer.bin"))


def test_sharding_in_sixteen_bits_rounds_rewards_or_head(folder, tmp_path):
    """Rewards of 8 significant bits would be multiples of a coarse step."""
    lines = [json.loads(line) for line in (folder / "fsdp bf16/metrics.jsonl").read_text().splitlines()]
    rewards = torch.tensor([line["eval_chosen_reward"] for line in lines if "eval_loss" in line]) * 5  # their sums
    assert (rewards != rewards.bfloat16()).all()
    losses = [line["loss"] for line in lines if "loss" in line]
    process_cases.run(tmp_path, "pairs, one left over", 1, bf16=True)
    alone = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[:6] == pytest.approx([line["loss"] for line in alone if "loss" in line][:6], rel=0.01)


def test_what_cannot_be_sharded_is_tried(folder):
    for rank in (0, 1):
        said = json.loads((folder / f"refused-{rank}.json").read_text())
        assert "use_peft does not run under FSDP" in said["adapters"]
        assert "bradley_terry_tie does not run under FSDP" in said["ties"]
        assert "group_by_length does not run under FSDP" in said["ragged lists in groups"]


def test_checkpoint_of_a_sharded_run_is_resumed_without_sharding(folder):
    with pytest.raises(ValueError, match="was made with FSDP, this run is without FSDP"):
        process_cases.run(
            folder / "fsdp cut", "pairs, one left over", 1, num_train_epochs=3, resume_from_checkpoint=True
        )


@pytest.mark.parametrize("count", range(1, 30))
@pytest.mark.parametrize(("size", "accumulation", "processes"), [(2, 1, 2), (1, 2, 2), (3, 2, 4), (4, 1, 1)])
def test_record_is_taken_twice_or_a_process_has_another_number_of_batches(count, size, accumulation, processes):
    batches = GlobalBatches(range(count), size, accumulation, processes, seed=1)
    alone = GlobalBatches(range(count), size * processes * accumulation, 1, 1, seed=1)
    for epoch in (0, 1):
        batches.set_epoch(epoch), alone.set_epoch(epoch)
        found = list(batches)
        assert len(found) == len(batches) and len(found) % processes == 0
        assert all(0 < len(batch) <= size for batch in found)
        step, steps = processes * accumulation, list(alone)
        for number, expected in enumerate(steps):
            own = [record for batch in found[number * step : (number + 1) * step] for record in batch if record >= 0]
            assert own == expected
