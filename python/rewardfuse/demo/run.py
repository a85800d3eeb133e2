"""The demo's run: make the world, train a reward model on its labels, measure it on prompts that it has never seen;
then compare three losses on rankings (`rankings`), and let policies learn from the reward model (`rloo`)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rewardfuse._files import atomic_file
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.data import PreferencePair
from rewardfuse.demo import world
from rewardfuse.demo.rankings import RankingOptions, compare_losses
from rewardfuse.demo.report import build_report
from rewardfuse.demo.rloo import PolicyOptions, compare_kl_coefs
from rewardfuse.demo.setting import SCORING_BATCH, HeldOut, hold_out, model_config
from rewardfuse.evaluation import log_likelihood, pair_accuracy
from rewardfuse.reward_model import RewardModel
from rewardfuse.score import score_sequences
from rewardfuse.train import TrainOptions, train_reward_model


@dataclass(frozen=True)
class DemoOptions:
    """Size of the world, the model and the training.

    Attributes:
        answers_per_prompt: held-out answers to each held-out prompt, an even number; neighbours form a pair.
        probe_stride: the learning curve is measured on every so many-th held-out pair, every `probe_steps` steps.
    """

    seed: int = 0
    output_dir: str = "demo-output"
    train_pairs: int = 12800
    held_out_prompts: int = 16
    answers_per_prompt: int = 120
    probe_stride: int = 3
    probe_steps: int = 25
    batch_size: int = 32
    learning_rate: float = 2e-3
    hidden_size: int = 128
    layers: int = 2
    heads: int = 8
    rankings: RankingOptions = field(default_factory=RankingOptions)
    policy: PolicyOptions = field(default_factory=PolicyOptions)

    @classmethod
    def quick(cls, seed: int, output_dir: str) -> DemoOptions:
        """A run of seconds, too short to learn much: it shows that everything works."""
        return cls(
            seed=seed,
            output_dir=output_dir,
            train_pairs=320,
            answers_per_prompt=8,
            probe_steps=5,
            hidden_size=32,
            rankings=RankingOptions(repetitions=2, lists=32, hidden_size=32),
            policy=PolicyOptions.quick(),
        )


class LearningCurve(transformers.TrainerCallback):
    """Measures the model on some of the held-out pairs as it learns. Nothing is chosen by these figures."""

    def __init__(self, tokenizer: Any, held_out: HeldOut, options: DemoOptions):
        self.tokenizer, self.options = tokenizer, options
        pairs = range(0, len(held_out.pairs.first_wins), options.probe_stride)
        self.ids = [held_out.ids[2 * pair + side] for pair in pairs for side in range(2)]
        self.true_gap = held_out.gaps(world.oracle_reward(held_out.answers))[pairs]
        self.first_wins = held_out.pairs.first_wins[pairs]
        self.points: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.options.probe_steps == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, kwargs["model"])

    def _measure(self, step: int, model: RewardModel) -> None:
        training = model.training
        rewards = np.array(score_sequences(model, self.tokenizer, self.ids, batch_size=SCORING_BATCH))
        model.train(training)
        gap = rewards[0::2] - rewards[1::2]
        self.points.append(
            {
                "step": step,
                "train_pairs": step * self.options.batch_size,
                "accuracy_oracle": pair_accuracy(gap, self.true_gap).accuracy.value,
                "accuracy_labels": pair_accuracy(gap, np.where(self.first_wins, 1, -1)).accuracy.value,
                "log_likelihood": log_likelihood(gap, self.first_wins),
            }
        )


def run_demo(options: DemoOptions, *, progress: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run the demo; writes the model to `output_dir/model` and the figures to `output_dir/report.json`.

    The same options give the same figures on the same machine, but for `seconds`.

    Returns:
        The report, and the arrays that the plot needs: learned and oracle reward of every held-out answer
        `[prompts, k]`, and the learned reward gap and label of every held-out pair.
    """
    started = time.monotonic()
    if options.answers_per_prompt < 2 or options.answers_per_prompt % 2:
        raise ValueError(f"answers_per_prompt: expected an even number of at least 2, got {options.answers_per_prompt}")
    with _one_thread():
        report, arrays = _train_and_measure(options, progress)
    report["seconds"] = round(time.monotonic() - started, 1)
    with atomic_file(Path(options.output_dir, "report.json")) as stream:
        json.dump(report, stream, indent=2)
        stream.write("\n")
    return report, arrays


def _train_and_measure(options: DemoOptions, progress: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    tokenizer = byte_tokenizer()
    train, train_wishes, held_out = make_data(options, tokenizer)
    config = model_config(tokenizer, options.hidden_size, options.layers, options.heads)
    model = RewardModel.from_config(config, seed=options.seed)
    untrained = held_out.rewards(model, tokenizer)
    curve = LearningCurve(tokenizer, held_out, options)
    result = train_reward_model(model, tokenizer, train, None, _train_options(options, progress), [curve])
    learned = held_out.rewards(model, tokenizer)
    report = build_report(held_out.answers, held_out.pairs, learned, untrained)
    report["learning_curve"] = curve.points
    report["train_loss"] = [{"step": line["step"], "loss": line["loss"]} for line in result.history if "loss" in line]
    report["options"] = {**dataclasses.asdict(options), "parameters": sum(p.numel() for p in model.parameters())}
    report["rankings"] = compare_losses(
        options.rankings, train_wishes, held_out, options.output_dir, options.seed, progress=progress
    )
    report["policy"] = compare_kl_coefs(options.policy, model, tokenizer, train_wishes, options.seed, progress=progress)
    arrays = {"learned": learned, "oracle": world.oracle_reward(held_out.answers)}
    return report, {**arrays, "gap": held_out.gaps(learned), "first_wins": held_out.pairs.first_wins}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one CPU thread. The model is too small to gain from more, threads that wait for each other on a busy
    machine cost several times as much, and the figures do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_data(options: DemoOptions, tokenizer: Any) -> tuple[list[PreferencePair], np.ndarray, HeldOut]:
    """Training pairs, all prompts `[m, 3]` to train on, and held-out answers from `options.seed`; no prompt is in
    both."""
    for_split, for_train, for_held_out = (np.random.default_rng([options.seed, stream]) for stream in range(3))
    train_wishes, held_out_wishes = world.split_prompts(options.held_out_prompts, for_split)
    records = world.sample_pairs(train_wishes, options.train_pairs, for_train).records()
    train = [PreferencePair(**record, source=f"demo pair {i}") for i, record in enumerate(records)]
    held_out = hold_out(held_out_wishes, options.answers_per_prompt, tokenizer, for_held_out)
    return train, train_wishes, held_out


def _train_options(options: DemoOptions, progress: bool) -> TrainOptions:
    return TrainOptions(
        output_dir=str(Path(options.output_dir, "model")),
        overwrite_output_dir=True,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        weight_decay=0.01,
        per_device_train_batch_size=options.batch_size,
        logging_steps=options.probe_steps,
        save_total_limit=1,
        seed=options.seed,
        disable_tqdm=not progress,
    )
