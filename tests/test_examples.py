"""Every file of examples/ runs as it stands, and does what it says."""

import ast
import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

from test_processes import torchrun

EXAMPLES = Path(__file__).parents[1] / "examples"
LEARN = ("trl_reward.py", "trl_ranked_lists.py")  # print (loss, accuracy)
PLAY = ("trl_rloo.py", "trl_grpo.py")  # print (reward, KL)
QUIET = ("with_openrlhf.py", "with_verl.py", "with_nemo_rl.py")  # assert what they claim


def run(name, folder, monkeypatch, capsys):
    """What the example prints; each runs in a folder of its own, since some write."""
    if name.startswith("trl_") and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed: pip install rewardfuse[trl]")
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def last(printed):
    return ast.literal_eval([line for line in printed.splitlines() if line.startswith("[")][-1])


def test_example_has_no_test():
    named = {*LEARN, *PLAY, *QUIET, "transformers_trainer.py", "several_processes.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == named


@pytest.mark.parametrize("name", LEARN)
def test_reward_model_does_not_learn(name, tmp_path, monkeypatch, capsys):
    steps = last(run(name, tmp_path, monkeypatch, capsys))
    assert steps[-1][0] < 0.9 * steps[0][0] and steps[-1][1] > 0.9


@pytest.mark.parametrize("name", PLAY)
def test_policy_does_not_learn(name, tmp_path, monkeypatch, capsys):
    steps = last(run(name, tmp_path, monkeypatch, capsys))
    assert steps[-1][0] > steps[0][0] + 0.5 and steps[-1][1] > 0


def test_transformers_trainer_does_not_learn(tmp_path, monkeypatch, capsys):
    lines = run("transformers_trainer.py", tmp_path, monkeypatch, capsys).splitlines()
    before, after = (float(line.split()[1]) for line in lines if line.startswith(("before", "after")))
    assert after < 0.5 * before


@pytest.mark.parametrize("name", QUIET)
def test_drop_in_fails_its_own_claims(name, tmp_path, monkeypatch, capsys):
    assert "nan" not in run(name, tmp_path, monkeypatch, capsys)


def test_loop_of_two_processes_prints_other_losses(tmp_path, monkeypatch, capsys):
    alone = run("several_processes.py", tmp_path, monkeypatch, capsys).split()
    together = torchrun(EXAMPLES / "several_processes.py")  # torch's gloo may abort after the last line: no exit code
    assert len(alone) == 3 and alone[0] > alone[-1]
    assert [float(loss) for loss in together.stdout.split()] == pytest.approx([float(loss) for loss in alone], abs=1e-5)
