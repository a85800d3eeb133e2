"""The picture of ``rewardfuse bench trainer``: where the time of a step goes, a stacked bar a contestant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewardfuse.bench.picture import BLUE, GREY, save
from rewardfuse.bench.report import number
from rewardfuse.bench.trainer_parts import PARTS

# Okabe & Ito's palette, in the order of a step.
COLORS = ("#F0E442", "#56B4E9", "#CC79A7", "#E69F00", BLUE, "#009E73", GREY)
LIGHT = ("#F0E442", "#56B4E9", "#CC79A7", "#E69F00", "#009E73")  # that black text is read on
CHARACTER = 0.0117  # its width as a share of the axis


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture (PNG)."""
    save(figure_of(result), path)


def figure_of(result: dict[str, Any]) -> Any:
    """A matplotlib figure with a panel for every data set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    op = next(op for op in result["ops"].values() if "runs" in op)
    runs = op["runs"]
    bars = [len(run["contestants"]) for run in runs]
    figure = Figure(figsize=(11, 1.6 + 0.95 * sum(bars) + 0.5 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(runs), 1, squeeze=False, height_ratios=bars)[:, 0]
    for axes, run in zip(panels, runs, strict=True):
        _panel(axes, run)
    keys = [Patch(color=color, label=part) for part, color in zip(PARTS, COLORS, strict=True)]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=11)
    panels[-1].set_xlabel("ms per training step, in rounds with every part timed")
    machine = op.get("machine", result["machine"])
    where = f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}; {machine['date'][:10]}"
    threads = f", {runs[0]['threads']} thread{'s' * (runs[0]['threads'] != 1)}" if runs[0]["threads"] else ""
    how = f"{runs[0]['pairs_per_step']} pairs a step, {runs[0]['dtype']}{threads}"
    figure.suptitle(f"RewardTrainer: where a step's time goes\n{how}; {where}", fontsize=13)
    return figure


def _panel(axes: Any, run: dict[str, Any]) -> None:
    longest = max(sum(of["parts_ms_per_step"].values()) for of in run["contestants"].values())
    end = 1.3 * longest  # the bars' ends are labelled
    labels = []
    for row, (name, of) in enumerate(run["contestants"].items()):
        _bar(axes, row, of["parts_ms_per_step"], end)
        ratio = f"  ({of['speed_ratio']['median']:.2f}×)" if "speed_ratio" in of else ""
        labels.append(f"{name}\n{of['tokens_per_second']['median']:,.0f} tokens/s{ratio}")
    axes.set_yticks(range(len(labels)), labels, fontsize=11)
    axes.set(xlim=(0, end), ylim=(len(labels) - 0.3, -0.5))
    axes.set_title(run["name"], fontsize=12, weight="bold", loc="left")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _bar(axes: Any, row: int, parts: dict[str, float], end: float) -> None:
    """The parts one after another; a name where it fits, below the bar where it does not."""
    left, narrow = 0.0, []
    for (part, value), color in zip(parts.items(), COLORS, strict=True):
        axes.barh(row, value, left=left, height=0.5, color=color, edgecolor="white", linewidth=0.6)
        text = f"{part} {number(value)}"
        if value > CHARACTER * end * len(text):
            ink = "black" if color in LIGHT else "white"
            axes.text(left + value / 2, row, text, ha="center", va="center", fontsize=11, color=ink)
        else:
            narrow.append(text)
        left += value
    axes.text(left + 0.01 * end, row, f"{number(left)} ms", va="center", fontsize=11.5, weight="bold")
    axes.text(0.004 * end, row + 0.42, "  ".join(narrow), va="center", fontsize=10, color=GREY)
