"""Training: it learns, repeats itself, resumes exactly after a kill, and leaves nothing half-written or NaN behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError

from rewardfuse._files import publish_files, staging_folder
from rewardfuse._train_folder import list_checkpoints
from rewardfuse._trainer import NonFiniteLossError
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.data import PreferencePair
from rewardfuse.reward_model import RewardModel, load_tokenizer
from rewardfuse.score import score_sequences
from rewardfuse.train import train_reward_model
from rewardfuse.train_options import TrainOptions

PAIRS = [PreferencePair(f"good {index}", f"bad {index}", prompt="p: ") for index in range(26)]
EVAL_PAIRS = [PreferencePair(f"good {index}", f"bad {index}", prompt="p: ") for index in range(30, 40)]


def tiny_model(dropout=0.1):
    sizes = {"vocab_size": 259, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    tokens = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return RewardModel.from_config(transformers.GPT2Config(**sizes, **tokens, **drop), seed=1)


def options(folder, **changes):
    defaults = {"learning_rate": 0.01, "num_train_epochs": 3, "per_device_train_batch_size": 4, "logging_steps": 2}
    quiet = {"disable_tqdm": True, "use_cpu": True, "gradient_accumulation_steps": 2}
    return TrainOptions(output_dir=str(folder), **{**defaults, **quiet, **changes})


def train(folder, callbacks=(), pairs=PAIRS, eval_pairs=EVAL_PAIRS, model=None, **changes):
    model = model or tiny_model()
    return train_reward_model(model, byte_tokenizer(), pairs, eval_pairs, options(folder, **changes), callbacks)


def weights(folder):
    return RewardModel.from_pretrained(folder).state_dict()


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Killed(Exception):
    pass


class KillAt(transformers.TrainerCallback):
    """Raises at the beginning of step ``step + 1``, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def test_learns_and_writes_model_metrics_and_no_pickled_arguments(tmp_path):
    result = train(tmp_path, eval_steps=4)
    assert result.metrics["eval_accuracy"] == 1.0 and result.metrics["eval_loss"] < 0.3
    assert result.metrics["eval_log_likelihood"] == pytest.approx(-result.metrics["eval_loss"], rel=1e-5)
    assert result.metrics["eval_tie_rate"] == 0.0 and result.metrics["eval_margin"] > 1.0
    assert (result.global_step, result.metrics["train_pairs"], result.metrics["eval_pairs"]) == (12, 26, 10)
    assert json.loads((tmp_path / "metrics.json").read_text()) == result.metrics
    journal = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert journal == result.history
    assert [line["step"] for line in journal if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in journal if "eval_loss" in line] == [4, 8, 12]
    assert all(0 <= line["accuracy"] <= 1 for line in journal if "loss" in line)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-12"]
    assert not [path for path in tmp_path.rglob("*") if path.name == "training_args.bin" or "partial" in path.name]
    model, tokenizer = RewardModel.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    texts = [f"p: {answer}" for pair in EVAL_PAIRS for answer in (pair.chosen, pair.rejected)]
    rewards = score_sequences(model, tokenizer, tokenizer(texts)["input_ids"])
    margins = [chosen - rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)]
    assert sum(margins) / len(margins) == pytest.approx(result.metrics["eval_margin"], rel=1e-4)


def test_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path):
    first, second, third = (train(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert first.history == second.history != third.history


@pytest.mark.parametrize(("save_steps", "killed_at"), [(3, 5), (2, 4), (4, 9), (None, 7)])
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, save_steps, killed_at):
    whole = train(tmp_path / "whole", save_steps=save_steps)
    with pytest.raises(Killed):
        train(tmp_path / "cut", [KillAt(killed_at)], save_steps=save_steps)
    assert not (tmp_path / "cut/metrics.json").exists()
    resumed = train(tmp_path / "cut", save_steps=save_steps, resume_from_checkpoint=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert resumed.history == whole.history
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


def test_resume_from_an_earlier_checkpoint_folder_gives_the_same_weights(tmp_path):
    train(tmp_path / "run", save_steps=3, save_total_limit=9)
    earlier = tmp_path / "run/checkpoint-6"
    train(tmp_path / "again", save_steps=3, resume_from_checkpoint=str(earlier))
    assert_same_weights(tmp_path / "run", tmp_path / "again")


def test_run_killed_after_its_last_checkpoint_is_finished_without_another_step(tmp_path):
    train(tmp_path, max_steps=5, save_steps=5)
    last = weights(tmp_path)
    for name in ("metrics.json", "model.safetensors", "config.json"):
        (tmp_path / name).unlink()
    assert train(tmp_path, max_steps=5, save_steps=5, resume_from_checkpoint=True).global_step == 5
    assert all(torch.equal(value, last[name]) for name, value in weights(tmp_path).items())


KILLED_IN_A_CHECKPOINT = """
    import os, signal, sys
    import torch
    sys.path[:0] = {path!r}
    import test_train

    save = torch.save

    def save_and_die(content, target):
        save(content, target)
        if ".partial" in str(target) and "checkpoint-6" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_and_die
    torch.set_num_threads({threads})
    test_train.train({folder!r}, save_steps=3)
"""


def test_kill_while_a_checkpoint_is_written_leaves_only_whole_ones(tmp_path):
    folder = tmp_path / "run"
    program = textwrap.dedent(KILLED_IN_A_CHECKPOINT).format(
        path=[str(Path(__file__).parent), *sys.path], folder=str(folder), threads=torch.get_num_threads()
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-3"]
    assert (folder / ".partial").is_dir()
    train(folder, save_steps=3, resume_from_checkpoint=True)
    train(tmp_path / "whole", save_steps=3)
    assert_same_weights(folder, tmp_path / "whole")
    assert not (folder / ".partial").exists()


@pytest.mark.parametrize("culprit", ["torch.save", "safetensors.torch.save_file", "os.fsync"])
def test_full_disk_during_a_checkpoint_leaves_the_earlier_one_to_resume_from(tmp_path, monkeypatch, culprit):
    class FillDisk(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                monkeypatch.setattr(culprit, full)
                monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, [FillDisk()], save_steps=3)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    assert train(tmp_path, save_steps=3, resume_from_checkpoint=True).global_step == 12


def test_nan_loss_stops_the_run_names_the_step_and_leaves_no_nan_checkpoint(tmp_path):
    class Poison(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                with torch.no_grad():
                    model.head.weight[0, 0] = torch.nan

    with pytest.raises(NonFiniteLossError, match=r"at step 7; the newest checkpoint is checkpoint-6$") as error:
        train(tmp_path, [Poison()], save_steps=3, logging_steps=50)
    assert "\n" not in str(error.value)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "checkpoint-6").values())
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]


def test_weights_gone_nan_with_a_finite_loss_are_not_saved(tmp_path):
    class Poison(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                with torch.no_grad():
                    model.head.weight.fill_(torch.inf)

    with pytest.raises(NonFiniteLossError, match=r"weight became NaN or infinite at step 6; .* checkpoint-3"):
        train(tmp_path, [Poison()], save_steps=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_nan_in_the_last_step_is_not_written_as_the_final_model(tmp_path):
    class Poison(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                with torch.no_grad():
                    model.head.weight.fill_(torch.nan)

    with pytest.raises(NonFiniteLossError, match="there is no checkpoint yet"):
        train(tmp_path, [Poison()], max_steps=5, save_steps=50, logging_steps=50, eval_pairs=None)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("change", [{"learning_rate": 0.02}, {"seed": 9}, {"beta": 2.0}])
def test_resume_with_an_option_that_changes_the_weights_is_refused(tmp_path, change):
    name = next(iter(change))
    train(tmp_path, max_steps=2, save_steps=2)
    with pytest.raises(ValueError, match=rf"made with other options or data: {name} \(was .*, is {change[name]}\)"):
        train(tmp_path, max_steps=2, save_steps=2, resume_from_checkpoint=True, **change)


def test_resume_with_other_data_is_refused_and_a_longer_run_warned_about(tmp_path):
    train(tmp_path, max_steps=2, save_steps=2)
    with pytest.raises(ValueError, match="other options or data: train_pairs_sha256"):
        changed = [PreferencePair("x", "y"), *PAIRS[1:]]
        train(tmp_path, pairs=changed, max_steps=2, save_steps=2, resume_from_checkpoint=True)
    with pytest.warns(UserWarning, match=r"with another max_steps \(was 2, is 4\)"):
        assert train(tmp_path, max_steps=4, save_steps=2, resume_from_checkpoint=True).global_step == 4


def test_run_killed_before_its_first_checkpoint_does_not_start_anew(tmp_path):
    settings = {"max_steps": 4, "save_steps": 3, "logging_steps": 1}
    with pytest.raises(Killed):
        train(tmp_path / "cut", [KillAt(2)], **settings)
    with pytest.warns(UserWarning, match="cut holds no checkpoint, the run starts anew"):
        train(tmp_path / "cut", resume_from_checkpoint=True, **settings)
    train(tmp_path / "whole", **settings)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


def test_checkpoint_of_another_run_overwrites_a_finished_one(tmp_path):
    settings = {"max_steps": 2, "save_steps": 1}
    train(tmp_path / "first", **settings)
    train(tmp_path / "second", seed=7, **settings)
    before, foreign = weights(tmp_path / "first"), str(tmp_path / "second/checkpoint-1")
    with pytest.raises(ValueError, match=r"first already holds .* --resume_from_checkpoint without a value"):
        train(tmp_path / "first", seed=7, resume_from_checkpoint=foreign, **settings)
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "first").items())
    train(tmp_path / "first", seed=7, resume_from_checkpoint=foreign, overwrite_output_dir=True, **settings)
    assert_same_weights(tmp_path / "first", tmp_path / "second")
    assert [path.name for path in list_checkpoints(tmp_path / "first")] == ["checkpoint-2"]


def test_metrics_of_the_shorter_run_stand_beside_the_model_of_the_longer_one(tmp_path, monkeypatch):
    def publish_and_die(source, target):
        publish_files(source, target)
        raise Killed

    train(tmp_path, max_steps=2, save_steps=2)
    monkeypatch.setattr("rewardfuse._trainer_files.publish_files", publish_and_die)
    with pytest.warns(UserWarning, match="another max_steps"), pytest.raises(Killed):
        train(tmp_path, max_steps=4, save_steps=2, resume_from_checkpoint=True)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("writer", "error", "code"),
    [
        (
            "torch.save",
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            errno.ENOSPC,
        ),
        (
            "safetensors.torch.serialize_file",
            SafetensorError("Error while serializing: I/O error: File too large"),
            errno.EIO,
        ),
    ],
)
def test_file_that_cannot_be_written_is_a_traceback(tmp_path, monkeypatch, writer, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(writer, fail)
    with pytest.raises(OSError) as caught:
        train(tmp_path, max_steps=2, save_steps=2)
    assert caught.value.errno == code and caught.value.filename == str(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if "checkpoint" in path.name or "partial" in path.name]


def test_run_on_cpus_is_taken_for_a_sharded_one(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.warns(UserWarning, match="this run on CPUs is DDP, not FSDP"):
        train(tmp_path, max_steps=1)


def test_what_a_killed_run_was_removing_or_writing_stays_for_ever(tmp_path):
    train(tmp_path, max_steps=3, save_steps=1, save_total_limit=9)
    (tmp_path / ".checkpoint-0.removed/half").mkdir(parents=True)
    for name in (".metrics.json.17.partial", ".metrics.jsonl.17.partial", ".scores.jsonl.17.partial"):
        (tmp_path / name).write_text("half")
    train(tmp_path, max_steps=3, save_steps=1, save_total_limit=1, resume_from_checkpoint=True)
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {".scores.jsonl.17.partial"}  # of a command that may be running
    kept = [path.name for path in list_checkpoints(tmp_path)]
    best = json.loads((tmp_path / "metrics.json").read_text())["best_global_step"]
    assert kept == sorted({f"checkpoint-{best}", "checkpoint-3"})


def test_resume_from_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no checkpoint .no trainer_state.json"):
        train(tmp_path, resume_from_checkpoint=str(tmp_path))


def test_folder_of_an_earlier_run_is_not_mixed_with_a_new_one(tmp_path):
    train(tmp_path, max_steps=2, save_steps=1)
    with pytest.raises(ValueError, match="already holds"):
        train(tmp_path, max_steps=1)
    train(tmp_path, max_steps=1, save_steps=1, overwrite_output_dir=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]


def test_early_stop_keeps_the_best_weights_also_when_resumed(tmp_path):
    reversed_pairs = [PreferencePair(pair.rejected, pair.chosen, prompt=pair.prompt) for pair in EVAL_PAIRS]
    settings = {"eval_pairs": reversed_pairs, "eval_steps": 1, "early_stopping_patience": 3, "save_total_limit": 1}
    result = train(tmp_path / "whole", **settings)
    evaluated = [line["eval_loss"] for line in result.history if "eval_loss" in line]
    assert result.global_step < 12 and result.global_step == result.metrics["best_global_step"] + 3
    assert result.metrics["eval_loss"] == pytest.approx(min(evaluated), rel=1e-6)
    assert (tmp_path / f"whole/checkpoint-{result.metrics['best_global_step']}").is_dir()
    with pytest.raises(Killed):
        train(tmp_path / "cut", [KillAt(result.global_step - 1)], **settings)
    resumed = train(tmp_path / "cut", resume_from_checkpoint=True, **settings)
    assert resumed.history == result.history
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_best_checkpoint_that_is_moved_with_its_folder_is_still_found(tmp_path):
    settings = {"eval_steps": 2, "load_best_model_at_end": True, "max_steps": 6}
    whole = train(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        train(tmp_path / "cut", [KillAt(5)], **settings)
    shutil.move(tmp_path / "cut", tmp_path / "moved")
    assert train(tmp_path / "moved", resume_from_checkpoint=True, **settings).history == whole.history


def test_target_weight_margin_and_smoothing_reach_the_loss(tmp_path):
    soft = [
        PreferencePair(pair.chosen, pair.rejected, pair.prompt, margin=1.0, weight=0.5, target=0.3) for pair in PAIRS
    ]
    model = tiny_model(dropout=0.0)
    result = train(
        tmp_path,
        pairs=soft,
        eval_pairs=soft,
        model=model,
        max_steps=1,
        label_smoothing=0.1,
        center_rewards_coefficient=0.2,
    )
    tokenizer = byte_tokenizer()
    answers = [f"p: {text}" for pair in PAIRS for text in (pair.chosen, pair.rejected)]
    rewards = torch.tensor(
        score_sequences(RewardModel.from_pretrained(tmp_path), tokenizer, tokenizer(answers)["input_ids"])
    )
    chosen, rejected = rewards[::2], rewards[1::2]
    log_sigmoid, z, t = torch.nn.functional.logsigmoid, chosen - rejected - 1.0, 0.3 * 0.9 + 0.7 * 0.1
    losses = -t * log_sigmoid(z) - (1 - t) * log_sigmoid(-z) + 0.2 * (chosen + rejected) ** 2
    assert result.metrics["eval_loss"] == pytest.approx(0.5 * losses.mean().item(), rel=1e-5)
    likelihood = 0.3 * log_sigmoid(chosen - rejected) + 0.7 * log_sigmoid(rejected - chosen)
    assert result.metrics["eval_log_likelihood"] == pytest.approx(likelihood.mean().item(), rel=1e-5)


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path):
    common = {"pairs": PAIRS[:16], "max_steps": 3, "eval_pairs": None, "logging_steps": 1, "max_grad_norm": 1e9}
    logs = []
    for batch, accumulate in ((2, 4), (8, 1)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        logs.append(train(tmp_path / str(batch), model=tiny_model(dropout=0.0), **common, **sizes).history)
    for small, large in zip(*logs, strict=True):
        # no gradient holds the common level of all rewards, so Adam blows rounding up along it
        assert small == pytest.approx(large, rel=1e-4, abs=2e-4)


def test_evaluating_more_often_does_not_change_the_training(tmp_path):
    train(tmp_path / "often", eval_steps=1, save_steps=4)
    train(tmp_path / "never", eval_pairs=None, save_steps=4)
    assert_same_weights(tmp_path / "often", tmp_path / "never")


@pytest.mark.parametrize("switch", [{"bf16": True}, {"gradient_checkpointing": True}, {"lr_scheduler_type": "cosine"}])
def test_switches_still_learn(tmp_path, switch):
    assert train(tmp_path, **switch).metrics["eval_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"label_smoothing": 0.6}, r"label_smoothing must lie in \[0, 0.5\], got 0.6"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must lie in"),
        ({"eval_split": -0.1}, "eval_split must be at least 0"),
        ({"metric_for_best_model": "f1"}, "metric_for_best_model must be loss, accuracy"),
        ({"max_length": 33}, "max_length must lie between 1 and the 32 tokens"),
        ({"eval_pairs": [], "early_stopping_patience": 1}, "need evaluation records"),
        ({"eval_steps": 2, "save_steps": 3, "load_best_model_at_end": True}, "must be a multiple of eval_steps"),
        ({"save_steps": 3, "load_best_model_at_end": True}, "save_steps without eval_steps"),
        ({"pairs": []}, "train_records is empty"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag"),
    ],
)
def test_options_out_of_range_are_refused_before_training(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **bad)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder, got a file"):
        train(tmp_path / "file")


def test_staging_folder_is_emptied_of_what_a_killed_run_left(tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial/half.safetensors").write_text("half")
    with staging_folder(tmp_path) as stage:
        assert list(stage.iterdir()) == []
    assert not stage.exists()
