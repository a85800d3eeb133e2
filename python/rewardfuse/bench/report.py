"""What a benchmark run leaves: a table a case, a JSON file and a picture."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

import rewardfuse
from rewardfuse._files import atomic_file

# Okabe & Ito's palette: told apart with every common colour-vision deficiency.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#595959"
MARK = {True: "reached", False: "missed"}


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rewardfuse": rewardfuse.__version__,
        "backend": rewardfuse.backend(device),
    }
    from rewardfuse import _backend

    if _backend._C is not None:
        facts["instruction_set"] = _backend._C.instruction_set()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["gpu_compute_capability"] = f"{properties.major}.{properties.minor}"
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return " ".join(line.partition(":")[2].split())
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def slug(machine: dict[str, Any]) -> str:
    """A file name's stem for a machine: its GPU, or its CPU."""
    return re.sub(r"[^a-z0-9.]+", "-", machine.get("gpu", machine["cpu"]).lower()).strip("-.") or "machine"


def progress(text: str) -> None:
    """One line on stderr that rewrites itself on a terminal; an empty text wipes it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def header(result: dict[str, Any]) -> str:
    """The lines above the tables: where this was measured, and how to read it."""
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    rounds = result["settings"]["rounds"]
    return (
        f"{where}; torch {machine['torch']}; {rounds} round{'s' * (rounds > 1)}, fewer (n) for what takes long\n"
        "times: median [quartiles]; ratio: this library's time / that contestant's, median over rounds\n"
    )


def table(op: str, case: dict[str, Any]) -> str:
    """One case as aligned text."""
    lines = [f"{op}: {case['name']}"]
    for clock in dict.fromkeys(m["clock"] for m in case["measurements"]):
        lines += _clock_table(case, clock)
    lines += [f"  left out: {name}, {reason}" for name, reason in case["left_out"].items()]
    for name, launches in case.get("launches", {}).items():
        extra = case["peak_extra_bytes"][name]
        text = f"{launches['total']} launches ({launches['without_fill']} without torch's fill), peak extra {extra:,} B"
        lines.append(f"  {name}: {text}{_reach(launches, '≤')}")
    return "\n".join(lines) + "\n"


def _clock_table(case: dict[str, Any], clock: str) -> list[str]:
    measurements = [m for m in case["measurements"] if m["clock"] == clock]
    rows = [[f"{clock} time"] + [text for m in measurements for text in (m["direction"], "ratio")] + [""]]
    for name in measurements[-1]["seconds"]:
        row, mark = [name], ""
        for m in measurements:
            ratio = m["ratio_to"].get(name)
            row.append(_spread(m["seconds"][name], m["rounds"]) if name in m["seconds"] else "")
            row.append(_ratio(ratio["median"]) if ratio else "")
            mark = _reach(ratio or {}, "≤") or mark
        rows.append([*row, mark.strip()])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    for m in measurements:
        if "bandwidth" in m:
            share = m["bandwidth"]["share_of_copy"]
            rate, copy = (m["bandwidth"][key] * 1e-9 for key in ("bytes_per_second", "copy_bytes_per_second"))
            text = f"{rate:.1f} GB/s of the {copy:.1f} GB/s of a copy, {100 * share['median']:.0f} %"
            lines.append(f"  bandwidth, {clock} time: {text}{_reach(share, '≥')}")
    return lines


def _reach(figure: dict[str, Any], sign: str) -> str:
    if "reach" not in figure:
        return ""
    reach = figure["reach"]
    return f"  {sign} {_ratio(reach) if reach < 0.1 else f'{reach:.3g}'} {MARK[figure['reached']]}"


def _ratio(value: float) -> str:
    """0.42, or 1/60 where decimals say little."""
    return f"{value:.2f}" if value >= 0.1 else f"1/{1 / value:.3g}" if value > 1e-3 else f"1/{1 / value:.0f}"


def _times(value: float) -> str:
    return f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def _spread(summary: dict[str, float], rounds: int) -> str:
    unit, scale = next(
        (u, s) for u, s in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if summary["median"] * s >= 1 or u == "µs"
    )
    low, middle, high = (summary[key] * scale for key in ("lower_quartile", "median", "upper_quartile"))
    fewer = f" n={summary['rounds']}" * (summary["rounds"] < rounds)
    return f"{middle:.3g} {unit} [{low:.3g}, {high:.3g}]{fewer}"


def write(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write <stem>.json and, with matplotlib installed, <stem>.png; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    with atomic_file(path) as stream:
        json.dump(result, stream, indent=2)
        stream.write("\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return [path]
    picture = folder / f"{stem}.png"
    draw(result, picture)
    return [path, picture]


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar for every peer of every case: how many times this library's time it takes, forward + backward."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    groups = [
        (f"{op}, {case['name']}" + (f", {m['clock']} time" if case["device"] == "cuda" else ""), m)
        for op, measured in result["ops"].items()
        for case in measured["cases"]
        for m in case["measurements"]
        if m["direction"] == "forward + backward"
    ]
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
            _bar(axes, position, peer, ratio)
            ticks.append(position)
            labels.append("copy of the same bytes" if peer == "copy" else peer)
        position += 1
    axes.axvline(1, color=GREY, lw=1)
    axes.set_yticks(ticks, labels, fontsize=8.5)
    axes.set(
        xscale="log", ylim=(position, -1), xlabel="peer's time / this library's time, forward + backward (log scale)"
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
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _bar(axes: Any, position: int, peer: str, ratio: dict[str, Any]) -> None:
    """From 1 to how many times as long the peer takes, with quartiles, and a tick where a target stands."""
    speedup = 1 / ratio["median"]
    low, high = speedup - 1 / ratio["upper_quartile"], 1 / ratio["lower_quartile"] - speedup
    axes.barh(
        position,
        speedup - 1,
        left=1,
        height=0.75,
        color=GREY if peer == "copy" else BLUE if speedup >= 1 else ORANGE,
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
