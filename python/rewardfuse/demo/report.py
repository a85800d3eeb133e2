"""The demo's figures, and how they are printed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rewardfuse.demo import world
from rewardfuse.evaluation import kendall_tau, log_likelihood, mean_kendall_tau, pair_accuracy, reliability

COMPARED = ("accuracy_oracle", "kendall_tau_within_prompt")  # what the losses on rankings are compared by
LOSS_TITLES = {
    "plackett_luce": "Plackett-Luce",
    "all_pairs": "all pairs",
    "bradley_terry": "Bradley-Terry, disjoint pairs",
}
NORMAL_95 = 1.96  # half width of a 95 % interval in standard errors

OWN_TRAINER = """\
In a training loop of your own:

    from rewardfuse import bradley_terry_loss

    rewards = model(input_ids, attention_mask)          # [2B], the chosen responses first
    chosen, rejected = rewards.chunk(2)
    loss = bradley_terry_loss(chosen, rejected)         # 0-d, float32
    loss.backward()

In a TRL script, one import changes:

    from rewardfuse.integrations.trl import RewardConfig, RewardTrainer

On data of your own, from the command line:

    rewardfuse train --dataset_name pairs.jsonl --model_name_or_path FOLDER_OR_NAME --output_dir my-reward-model

It takes pairs and ranked lists alike.
"""


def build_report(
    answers: world.Answers, pairs: world.LabelledPairs, learned: np.ndarray, untrained: np.ndarray
) -> dict[str, Any]:
    """Every figure of the demo, ready for JSON.

    Args:
        answers: held-out answers, `[prompts, k]`.
        pairs: neighbours 2i and 2i + 1 of each prompt, labelled, `[prompts k/2]`.
        learned, untrained: rewards `[prompts, k]` of the model after and before training.
    """
    oracle = world.oracle_reward(answers)
    length = np.vectorize(len, otypes=[np.float64])(answers.texts())
    return {
        "held_out_pairs": len(pairs.probability),
        "held_out_answers": int(oracle.size),
        "model": _figures(learned, oracle, pairs),
        "untrained": _figures(untrained, oracle, pairs),
        "longer_wins": _figures(length, oracle, pairs, is_reward=False),
        "best_possible": _bounds(oracle, pairs),
    }


def _figures(
    rewards: np.ndarray, oracle: np.ndarray, pairs: world.LabelledPairs, is_reward: bool = True
) -> dict[str, Any]:
    """Figures of one rule. One that is no reward, only an order, has neither likelihood nor calibration, and a coin
    decides its ties: lengths are often equal, where a reward never ties two texts by accident."""
    gap, true_gap = _gap(rewards), _gap(oracle)
    if not is_reward:
        gap = np.where(gap == 0, np.random.default_rng(0).choice([-1.0, 1.0], size=gap.shape), gap)
    against_oracle = pair_accuracy(gap, true_gap)
    against_labels = pair_accuracy(gap, np.where(pairs.first_wins, 1, -1))
    named_right = np.where(gap > 0, pairs.probability, np.where(gap < 0, 1.0 - pairs.probability, 0.0))
    figures = {
        "accuracy_oracle": against_oracle.accuracy._asdict(),
        "accuracy_labels": against_labels.accuracy._asdict(),
        "expected_accuracy_labels": float(named_right.mean()),
        "tie_rate": against_labels.tie_rate,
        "undecided_by_oracle": against_oracle.undecided,
        "kendall_tau": kendall_tau(rewards.reshape(-1), oracle.reshape(-1)),
        "kendall_tau_within_prompt": mean_kendall_tau(rewards, oracle),
    }
    if is_reward:
        probability = np.exp(-np.logaddexp(0.0, -gap))  # sigma(gap) without overflow
        figures["log_likelihood"] = log_likelihood(gap, pairs.first_wins)
        figures["expected_log_likelihood"] = log_likelihood(gap, pairs.probability)
        figures["calibration_error"] = reliability(probability, pairs.first_wins).expected_calibration_error
    return figures


def _bounds(oracle: np.ndarray, pairs: world.LabelledPairs) -> dict[str, float]:
    """What no model can beat, and what the oracle itself would reach."""
    return {
        "expected_accuracy_labels": world.best_accuracy(pairs.probability),
        "expected_accuracy_labels_of_oracle": world.oracle_accuracy(_gap(oracle), pairs.probability),
        "expected_log_likelihood": world.best_log_likelihood(pairs.probability),
        # what the true probabilities score on these labels: the part of the figure that is counting noise
        "calibration_error": reliability(pairs.probability, pairs.first_wins).expected_calibration_error,
    }


def _gap(rewards: np.ndarray) -> np.ndarray:
    return (rewards[:, 0::2] - rewards[:, 1::2]).reshape(-1)


def table_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the summary, as text."""
    header = ["on held-out prompts", "accuracy vs oracle", "accuracy vs labels", "log-likelihood", "Kendall τ", "ECE"]
    rows = []
    for name, title in (("longer_wins", "longer answer wins"), ("untrained", "untrained model"), ("model", "model")):
        figures = report[name]
        likelihood, error = figures.get("log_likelihood"), figures.get("calibration_error")
        rows.append(
            [
                title,
                _with_interval(figures["accuracy_oracle"]),
                _with_interval(figures["accuracy_labels"]),
                "-" if likelihood is None else f"{likelihood:.3f}",
                f"{figures['kendall_tau_within_prompt']:.3f}",
                "-" if error is None else f"{error:.3f}",
            ]
        )
    best = report["best_possible"]
    accuracy, likelihood = f"{best['expected_accuracy_labels']:.3f}", f"{best['expected_log_likelihood']:.3f}"
    rows.append(["best possible", "1.000", accuracy, likelihood, "1.000", f"{best['calibration_error']:.3f}"])
    return header, rows


def _with_interval(proportion: dict[str, float]) -> str:
    return f"{proportion['value']:.3f} [{proportion['low']:.3f}, {proportion['high']:.3f}]"


def notes(report: dict[str, Any]) -> str:
    """What the table's columns mean, and the figures that it has no room for."""
    model, best = report["model"], report["best_possible"]
    return (
        f"{report['held_out_pairs']} pairs of {report['held_out_answers']} answers; 95 % Wilson intervals; "
        f"{model['undecided_by_oracle']} pairs that the oracle ties are left out of the first column.\n"
        "vs oracle: the true order. vs labels: one annotator's noisy choice a pair; no model can expect more than "
        f"{best['expected_accuracy_labels']:.3f} there\n"
        f"(the oracle's own order: {best['expected_accuracy_labels_of_oracle']:.3f}; "
        f"this model's, over all annotators: {model['expected_accuracy_labels']:.3f}).\n"
        "log-likelihood: nats a pair; the best is minus the entropy of the labels.\n"
        f"τ: between learned and oracle reward, within a prompt (over all answers: {model['kendall_tau']:.3f};\n"
        "pairs within prompts do not tell how prompts compare).\n"
        "ECE: calibration error in 10 bins; the last row is what the true probabilities score on these labels."
    )


def ranking_rows(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison of losses on rankings, as text."""
    header = ["trained by, on the same rankings", "accuracy vs oracle", "Kendall τ"]
    figures = comparison["losses"].items()
    return header, [[LOSS_TITLES[loss], *(_mean(row[name]) for name in COMPARED)] for loss, row in figures]


def _mean(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def ranking_notes(comparison: dict[str, Any]) -> str:
    """How the comparison was made, and what its intervals say of each two losses."""
    repetitions = len(comparison["differences"][0][COMPARED[0]]["values"])
    lines = [
        f"Means over {repetitions} repetitions (rankings and first weights drawn anew) with 95 % t-intervals; "
        "each of the three\n"
        f"encodes the same {comparison['responses']} responses in {comparison['steps']} steps. "
        "Differences of τ within a repetition:",
    ]
    for difference in comparison["differences"]:
        first, second = (LOSS_TITLES[difference[side]] for side in ("first", "second"))
        tau = difference[COMPARED[1]]
        lines.append(
            f"  {first} minus {second}: {tau['mean']:+.3f} [{tau['low']:+.3f}, {tau['high']:+.3f}], {_verdict(tau)}"
        )
    return "\n".join(lines)


def _verdict(difference: dict[str, Any]) -> str:
    if difference["low"] > 0:
        return "the first is better"
    return "the second is better" if difference["high"] < 0 else "not told apart"


def policy_rows(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison of KL coefficients, as text."""
    header = ["a policy after its steps", "learned reward", "oracle reward", "its best (step)", "KL, nats", "answers"]

    def row(title: str, figures: dict[str, Any], best: str) -> list[str]:
        learned, oracle, kl = (_plus_minus(figures[name]) for name in ("learned_reward", "oracle_reward", "kl"))
        return [title, learned, oracle, best, kl, f"{100 * figures['answers']['mean']:.0f} %"]

    rows = [row("none yet: the reference", comparison["start"], "")]
    for run in comparison["runs"]:
        best = f"{run['best']['oracle_reward']:.2f} ({run['best']['step']:.0f})"
        rows.append(row(f"β = {run['kl_coef']:g}", run["end"], best))
    return header, rows


def _plus_minus(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.2f} ± {NORMAL_95 * figure['standard_error']:.2f}"


def policy_notes(comparison: dict[str, Any]) -> str:
    """How the policies were trained and measured, and what the figures say of each β."""
    start, runs = comparison["start"], comparison["runs"]
    lines = [
        f"{comparison['steps']} RLOO steps of {comparison['responses_per_step']} responses; measured on "
        f"{comparison['responses_measured']} fresh responses to the training prompts, ± 95 % (of these\n"
        "responses, not of other seeds). Its best: the highest point of the oracle's curve. Answers: texts that are "
        "one of\nthe world's answers; to the oracle any other is worth what the worst answer to its prompt is.",
        *(f"  β = {run['kl_coef']:g}: {_fate(start, run['end'])}" for run in runs),
    ]
    for run in runs[1:]:
        difference = _difference(run["end"]["oracle_reward"], runs[0]["end"]["oracle_reward"])
        lines.append(
            f"  oracle reward at the end, β = {run['kl_coef']:g} against β = {runs[0]['kl_coef']:g}: "
            f"{_moved(difference, 'higher', 'lower', 'not told apart')}"
        )
    lines.append("A response of each, the first one as it came:")
    for title, figures in [("the reference", start), *((f"β = {run['kl_coef']:g}", run["end"]) for run in runs)]:
        example = figures["examples"][0]
        lines.append(
            f"  {example['prompt']} {title}: {example['response']!a} "
            f"(learned {example['learned_reward']:.2f}, oracle {example['oracle_reward']:.2f})"
        )
    return "\n".join(lines)


def _fate(start: dict[str, Any], end: dict[str, Any]) -> str:
    """What became of the learned and of the oracle's reward between two measurements, and what to call it."""
    learned, oracle = (_difference(end[name], start[name]) for name in ("learned_reward", "oracle_reward"))
    said = ", ".join(
        f"the {name} reward {_moved(difference, 'rose', 'fell', 'did not move for sure')}"
        for name, difference in (("learned", learned), ("oracle", oracle))
    )
    gamed = learned[0] > learned[1] and oracle[0] < -oracle[1]
    return f"{said}: the reward model is gamed" if gamed else said


def _difference(first: dict[str, float], second: dict[str, float]) -> tuple[float, float]:
    """Of two means, with the half width of its 95 % interval."""
    error = math.hypot(first["standard_error"], second["standard_error"])
    return first["mean"] - second["mean"], NORMAL_95 * error


def _moved(difference: tuple[float, float], up: str, down: str, neither: str) -> str:
    value, half = difference
    if abs(value) <= half:
        return f"{neither} ({value:+.2f} ± {half:.2f})"
    return f"{up if value > 0 else down} by {abs(value):.2f} ± {half:.2f}"


def print_report(report: dict[str, Any]) -> None:
    """Print the summary tables with their notes."""
    _print_table("A reward model against the truth", *table_rows(report), bold="model")
    print(notes(report), end="\n\n")
    _print_table("Three losses on the same rankings", *ranking_rows(report["rankings"]))
    print(ranking_notes(report["rankings"]), end="\n\n")
    _print_table("A policy that learns from the reward model", *policy_rows(report["policy"]))
    print(policy_notes(report["policy"]))


def _print_table(title: str, header: list[str], rows: list[list[str]], bold: str | None = None) -> None:
    """By rich if it is installed, as plain text otherwise."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    else:
        table = Table(title=title)
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == bold else None)
        Console(width=max(118, Console().width)).print(table)
