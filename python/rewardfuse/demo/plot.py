"""The demo's pictures: learning curve, calibration, learned against oracle reward; three losses on rankings; and what
policies make of the reward model."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from rewardfuse.demo.report import COMPARED, LOSS_TITLES, NORMAL_95
from rewardfuse.evaluation import reliability

# Okabe & Ito's palette: told apart with every common colour-vision deficiency.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
# Colour, marker and line of each KL coefficient: told apart in print as well.
STYLES = ((ORANGE, "o", "-"), (BLUE, "s", "--"), (GREEN, "^", ":"), (GREY, "D", "-."))


def draw(report: dict[str, Any], arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write the picture to `path` (PNG); `report` and `arrays` as `run_demo` returns them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _learning_curve(left, report)
    _calibration(middle, report, arrays)
    _rewards(right, report, arrays)
    _save(figure, path)


def draw_rankings(comparison: dict[str, Any], path: Path) -> None:
    """Write the picture of the three losses to `path` (PNG); `comparison` as `compare_losses` returns it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _repetitions(left, comparison)
    _differences(right, comparison)
    _save(figure, path)


def draw_policies(comparison: dict[str, Any], path: Path) -> None:
    """Write the picture of the policies to `path` (PNG); `comparison` as `compare_kl_coefs` returns it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    middle.sharey(left)  # the same scale: the two rewards part before the reader's eyes
    _policy_curve(left, comparison, "learned_reward")
    _policy_curve(middle, comparison, "oracle_reward")
    _policy_curve(right, comparison, "kl")
    left.set_title("What the policy is paid by: the learned reward", fontsize=11.5)
    left.set_ylabel("learned reward, change since the reference")
    middle.set_title("What was meant: the oracle's reward", fontsize=11.5)
    middle.set_ylabel("oracle reward, change since the reference")
    right.set_title("How far the policy went", fontsize=11.5)
    right.set_ylabel("KL of policy to reference, nats a response")
    left.legend(frameon=True, framealpha=0.7, edgecolor="none", fontsize=10, loc="lower right")
    _first_responses(figure, comparison)
    _save(figure, path)


def _policy_curve(axes: Any, comparison: dict[str, Any], name: str) -> None:
    """One curve a run; the last point was measured on fresh responses, and has a 95 % interval."""
    base = 0.0 if name == "kl" else comparison["start"][name]["mean"]
    for run, (color, marker, line) in zip(comparison["runs"], itertools.cycle(STYLES), strict=False):
        steps, values = ([point[key] for point in run["curve"]] for key in ("step", name))
        title = f"β = {run['kl_coef']:g}" + (", no penalty" if run["kl_coef"] == 0 else "")
        axes.plot(steps, [v - base for v in values], marker + line, color=color, ms=5, lw=1.8, label=title)
        end, half = run["end"][name]["mean"] - base, NORMAL_95 * run["end"][name]["standard_error"]
        axes.errorbar(steps[-1], end, yerr=half, color=color, capsize=3)
    axes.axhline(0.0, color=GREY, lw=0.8)
    axes.set(xlabel="RLOO steps", xlim=(-2, 1.06 * comparison["steps"]))


def _first_responses(figure: Any, comparison: dict[str, Any]) -> None:
    """Under the curves, in words: how the oracle reads, and what each writes to one prompt, the first as it came."""
    prompt = comparison["start"]["examples"][0]["prompt"]
    parts = [("reference", comparison["start"]), *((f"β = {r['kl_coef']:g}", r["end"]) for r in comparison["runs"])]
    said = [f"{title}: {figures['examples'][0]['response']!a}" for title, figures in parts]
    oracle = "To the oracle a text that is none of the world's answers is worth what the worst answer to its prompt is."
    said = f"{oracle}\n“{prompt}”, the first response as it came:   " + "   ".join(said)
    figure.supxlabel(said, fontsize=10.5, parse_math=False)  # a policy may write dollars


def _save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _learning_curve(axes: Any, report: dict[str, Any]) -> None:
    points = report["learning_curve"]
    pairs = [point["train_pairs"] for point in points]
    best = report["best_possible"]["expected_accuracy_labels"]
    axes.plot(pairs, [p["accuracy_oracle"] for p in points], "o-", color=BLUE, ms=4, label="against the oracle's order")
    labels = [p["accuracy_labels"] for p in points]
    axes.plot(pairs, labels, "s-", color=ORANGE, ms=4, label="against the annotators' labels")
    axes.axhline(best, color=ORANGE, ls="--", lw=1.2, label=f"best possible against the labels, {best:.3f}")
    axes.axhline(0.5, color=GREY, ls=":", lw=1.2, label="chance")
    axes.set(xlabel="training pairs seen", ylabel="accuracy on held-out pairs", ylim=(0.3, 1.02))
    axes.legend(frameon=True, framealpha=0.7, edgecolor="none", fontsize=9, loc="lower right")
    final = report["model"]["accuracy_oracle"]["value"]
    axes.set_title(f"It orders {100 * final:.1f} % of unseen pairs as the oracle does", fontsize=11.5)


def _calibration(axes: Any, report: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    curve = reliability(np.exp(-np.logaddexp(0.0, -arrays["gap"])), arrays["first_wins"])
    filled = curve.count > 0
    x, y = curve.predicted[filled], curve.observed[filled]
    # The interval holds the frequency up to rounding, and a bar cannot have a negative length.
    bars = np.maximum([y - curve.low[filled], curve.high[filled] - y], 0.0)
    axes.plot([0, 1], [0, 1], color=GREY, ls=":", lw=1.2, label="perfect calibration")
    axes.errorbar(x, y, yerr=bars, fmt="o-", color=BLUE, ms=5, capsize=3, label="labels, with 95 % interval")
    axes.set(xlabel="predicted probability that the first answer wins", ylabel="frequency with which it won")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    error, floor = report["model"]["calibration_error"], report["best_possible"]["calibration_error"]
    axes.set_title(f"Calibration error {error:.3f} (true probabilities: {floor:.3f})", fontsize=11.5)


def _rewards(axes: Any, report: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    oracle, learned = (array - array.mean(axis=1, keepdims=True) for array in (arrays["oracle"], arrays["learned"]))
    axes.scatter(oracle, learned, s=9, alpha=0.3, color=GREEN, linewidths=0, rasterized=True)
    axes.set(xlabel="oracle reward, minus the prompt's mean", ylabel="learned reward, minus the prompt's mean")
    tau = report["model"]["kendall_tau_within_prompt"]
    axes.set_title(f"Learned against oracle reward: Kendall τ = {tau:.2f}", fontsize=11.5)


def _repetitions(axes: Any, comparison: dict[str, Any]) -> None:
    figures = [row[COMPARED[1]] for row in comparison["losses"].values()]
    places = range(len(figures))
    for values in zip(*(figure["values"] for figure in figures), strict=True):
        axes.plot(places, values, "o-", color=GREY, ms=4, lw=0.8, alpha=0.5)
    axes.plot(
        [], [], "o-", color=GREY, ms=4, lw=0.8, alpha=0.5, label="one repetition: same rankings, same first weights"
    )
    means = [figure["mean"] for figure in figures]
    bars = [[f["mean"] - f["low"] for f in figures], [f["high"] - f["mean"] for f in figures]]
    axes.errorbar(places, means, yerr=bars, fmt="D", color=BLUE, ms=7, capsize=5, label="mean, with 95 % interval")
    axes.set_xticks(places, [LOSS_TITLES[loss].replace(", ", ",\n") for loss in comparison["losses"]])
    axes.set(xlim=(-0.4, len(figures) - 0.6), ylabel="Kendall τ against the oracle, within a prompt")
    axes.legend(frameon=True, framealpha=0.7, edgecolor="none", fontsize=9, loc="lower left")
    axes.set_title(f"Trained on the same {comparison['responses']} responses", fontsize=11.5)


def _differences(axes: Any, comparison: dict[str, Any]) -> None:
    rows = comparison["differences"]
    for place, row in enumerate(reversed(rows)):
        tau = row[COMPARED[1]]
        axes.plot(tau["values"], [place] * len(tau["values"]), "o", color=GREY, ms=4, alpha=0.5)
        bars = [[tau["mean"] - tau["low"]], [tau["high"] - tau["mean"]]]
        axes.errorbar(tau["mean"], place, xerr=bars, fmt="D", color=ORANGE, ms=7, capsize=5)
    titles = ["\nminus ".join(LOSS_TITLES[row[side]] for side in ("first", "second")) for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), titles)
    axes.axvline(0.0, color=GREY, ls=":", lw=1.2)
    axes.set(ylim=(-0.5, len(rows) - 0.5), xlabel="difference of τ within a repetition, with 95 % interval of its mean")
    axes.set_title("An interval that holds 0 does not tell the two apart", fontsize=11.5)
