"""Every objective resumes after a kill with the weights, bit for bit, of a run that was never interrupted."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from rewardfuse._train_folder import list_checkpoints
from rewardfuse.reward_model import RewardModel
from test_train import KillAt, Killed
from test_train_objectives import train

TIED_ENSEMBLE = {"loss": "bradley_terry_tie", "num_heads": 2, "save_steps": 2, "max_steps": 6}


def assert_same_model(first, second):
    first, second = RewardModel.from_pretrained(first), RewardModel.from_pretrained(second)
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert first.head_config == second.head_config


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("pairs", {"loss": "bradley_terry_tie"}),
        ("pairs", {"loss": "classification", "gradient_accumulation_steps": 2, "bf16": True}),
        ("lists", {"num_heads": 2, "normalize_reward": True}),
        ("ratings", {"attribute_weights": (1.0, -1.0), "lr_scheduler_type": "cosine", "warmup_ratio": 0.2}),
        ("solutions", {"group_by_length": True}),
    ],
)
def test_resumed_run_ends_with_other_weights_than_an_uninterrupted_one(tmp_path, kind, changes):
    settings = {"save_steps": 2, "logging_steps": 1, "max_steps": 4, **changes}
    whole = train(tmp_path / "whole", kind, **settings)
    with pytest.raises(Killed):
        train(tmp_path / "cut", kind, [KillAt(3)], **settings)
    resumed = train(tmp_path / "cut", kind, resume_from_checkpoint=True, **settings)
    assert_same_model(tmp_path / "whole", tmp_path / "cut")
    assert resumed.history == whole.history
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


def test_best_tie_parameter_is_not_the_one_that_is_kept(tmp_path):
    settings = {"loss": "bradley_terry_tie", "eval_steps": 2, "max_steps": 6, "load_best_model_at_end": True}
    result = train(tmp_path, "pairs", **settings)
    best = tmp_path / f"checkpoint-{result.metrics['best_global_step']}"
    assert_same_model(tmp_path, best)
    kept = RewardModel.from_pretrained(tmp_path).log_tie.item()
    assert result.metrics["eval_log_tie"] == pytest.approx(kept, rel=1e-6)


KILLED = """
    import os, signal, sys
    import torch
    sys.path[:0] = {path!r}
    import transformers
    from test_train_objectives import train

    class Kill(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads({threads})
    train({folder!r}, "pairs", [Kill()], **{settings!r})
"""


def test_run_killed_within_a_step_loses_the_tie_parameter_or_the_order_of_a_head(tmp_path):
    folder = tmp_path / "cut"
    program = textwrap.dedent(KILLED).format(
        path=[str(Path(__file__).parent), *sys.path],
        folder=str(folder),
        threads=torch.get_num_threads(),
        settings=TIED_ENSEMBLE,
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    resumed = train(folder, "pairs", resume_from_checkpoint=True, **TIED_ENSEMBLE)
    whole = train(tmp_path / "whole", "pairs", **TIED_ENSEMBLE)
    assert_same_model(folder, tmp_path / "whole")
    assert resumed.history == whole.history


@pytest.mark.parametrize(
    ("kind", "settings", "change"),
    [
        ("pairs", {"loss": "bradley_terry_tie"}, {"tie_model": "davidson"}),
        ("pairs", {}, {"loss": "classification"}),
        ("ratings", {"attributes": ("help",)}, {"attributes": ("terse",)}),
        ("solutions", {}, {"step_separator": "#"}),
    ],
)
def test_resume_with_another_objective_is_not_refused(tmp_path, kind, settings, change):
    train(tmp_path, kind, max_steps=1, save_steps=1, **settings)
    name = next(iter(change))
    with pytest.raises(ValueError, match=rf"was made with other options or data: {name} \(was"):
        train(tmp_path, kind, max_steps=1, save_steps=1, resume_from_checkpoint=True, **{**settings, **change})


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Options of a run, and its folder with one checkpoint after a kill."""
    folder, settings = tmp_path_factory.mktemp("killed"), {"max_steps": 2, "save_steps": 1}
    with pytest.raises(Killed):
        train(folder, "labels", [KillAt(1)], **settings)
    return settings, folder


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "train_options.json"],
)
def test_checkpoint_cut_short_is_gone_on_from_or_more_than_one_line(killed, tmp_path, name):
    settings, folder = killed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-1" / name
    content = path.read_bytes()
    for spoil in (lambda: path.write_bytes(content[: len(content) // 2]), path.unlink):
        spoil()
        with pytest.raises(ValueError, match="checkpoint-1") as error:
            train(tmp_path, "labels", resume_from_checkpoint=True, **settings)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "metrics.json").exists()
