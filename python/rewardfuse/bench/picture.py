"""The picture of a benchmark run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewardfuse.bench.case import BOTH
from rewardfuse.bench.measure import COPY
from rewardfuse.bench.report import MARK

# Okabe & Ito's palette: told apart with every common colour-vision deficiency.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#595959"


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar for every peer of every case: how many times this library's time it takes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    groups = list(_groups(result))
    rows = sum(1 + len(m["ratio_to"]) for _, m in groups)
    figure = Figure(figsize=(9.5, 1.4 + 0.27 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    position = 0
    ticks, labels = [], []
    ends = [1.0]
    for title, m in groups:
        axes.text(0.005, position, title, transform=axes.get_yaxis_transform(), fontsize=9, weight="bold", va="center")
        for peer, ratio in m["ratio_to"].items():
            position += 1
            ends += [1 / ratio["median"], 1 / ratio.get("reach", 1)]
            _bar(axes, position, ratio, BLUE if peer not in m.get("beside", [COPY]) else GREY)
            ticks.append(position)
            labels.append("copy of the same bytes" if peer == COPY else peer)
        position += 1
    axes.axvline(1, color=GREY, lw=1)
    axes.set_yticks(ticks, labels, fontsize=8.5)
    axes.set(
        xscale="log",
        ylim=(position, -1),
        xlabel="peer's time / this library's time, forward + backward where not said otherwise (log scale)",
    )
    axes.set_xlim(min(ends) * (0.8 if min(ends) < 1 else 1), max(ends) * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.spines[["top", "right"]].set_visible(False)
    machine = result["machine"]
    axes.set_title(
        f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}; {machine['date'][:10]}", fontsize=10
    )
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture (PNG), whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _groups(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(title, measurement) of whole steps, and of a direction that has a target of its own."""
    for op, measured in result["ops"].items():
        for case in measured.get("cases", []):
            for m in case["measurements"]:
                whole = m["direction"] == BOTH
                if whole or any("reach" in ratio for ratio in m["ratio_to"].values()):
                    parts = [op, case["name"], *[m["direction"]] * (not whole)]
                    yield ", ".join([*parts, *[f"{m['clock']} time"] * (case["device"] == "cuda")]), m


def _bar(axes: Any, position: int, ratio: dict[str, Any], color: str) -> None:
    """From 1 to how many times as long the peer takes, with quartiles, and a tick where a target stands."""
    speedup = 1 / ratio["median"]
    low, high = speedup - 1 / ratio["upper_quartile"], 1 / ratio["lower_quartile"] - speedup
    axes.barh(
        position,
        speedup - 1,
        left=1,
        height=0.75,
        color=ORANGE if color == BLUE and speedup < 1 else color,
        xerr=[[max(low, 0)], [max(high, 0)]],
        error_kw={"ecolor": "black", "elinewidth": 1},
    )
    end = max(1 / ratio["lower_quartile"], 1)
    text = _times(speedup)
    if "reach" in ratio:
        axes.plot([1 / ratio["reach"]] * 2, [position - 0.45, position + 0.45], color="black", lw=2)
        text += f"  (target {_times(1 / ratio['reach'])}, {MARK[ratio['reached']]})"
        end = max(end, 1 / ratio["reach"])
    axes.annotate(text, (end, position), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")


def _times(value: float) -> str:
    return f"{value:.2f}×" if value < 10 else f"{value:.0f}×"
