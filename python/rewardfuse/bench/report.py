"""What a benchmark run prints: a table a case, and two a training run."""

from __future__ import annotations

import sys
from typing import Any

MARK = {True: "reached", False: "missed"}


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
    lines += [line for m in case["measurements"] if "memory" in m for line in _memory_lines(m)]
    lines += [f"  left out: {name}, {reason}" for name, reason in case["left_out"].items()]
    for name, launches in case.get("launches", {}).items():
        text = f"{launches['total']} launches ({launches['without_fill']} without torch's fill)"
        lines.append(f"  {name}: {text}{_reach(launches, '≤')}")
    return "\n".join(lines) + "\n"


def _clock_table(case: dict[str, Any], clock: str) -> list[str]:
    measurements = [m for m in case["measurements"] if m["clock"] == clock]
    rows = [[f"{clock} time"] + [text for m in measurements for text in (m["direction"], "ratio")]]
    for name in dict.fromkeys(name for m in measurements for name in m["seconds"]):
        row = [name]
        for m in measurements:
            ratio = m["ratio_to"].get(name)
            row.append(_spread(m["seconds"][name], m["rounds"]) if name in m["seconds"] else "")
            row.append(_ratio(ratio["median"]) + _reach(ratio, "≤") if ratio else "")
        rows.append(row)
    lines = _aligned(rows)
    for m in measurements:
        if "bandwidth" in m:
            share = m["bandwidth"]["share_of_copy"]
            rate, copy = (m["bandwidth"][key] * 1e-9 for key in ("bytes_per_second", "copy_bytes_per_second"))
            text = f"{rate:.1f} GB/s of the {copy:.1f} GB/s of a copy, {100 * share['median']:.0f} %"
            lines.append(f"  bandwidth, {m['direction']}, {clock} time: {text}{_reach(share, '≥')}")
    return lines


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def run_table(op: str, run: dict[str, Any]) -> str:
    """One training run of every contestant as aligned text: speed and memory, then the parts of a step."""
    baseline, threads = run["baseline"], run["threads"]
    rows = [["", "tokens/s", f"× {baseline}", "ms per step", "peak memory", f"× {baseline}"]]
    for name, of in run["contestants"].items():
        speed, step = (_quartiles(of[key]) for key in ("tokens_per_second", "ms_per_step"))
        ratios = ["", ""]
        if name != baseline:
            ratio = of["speed_ratio"]
            low, high = ratio["lower_quartile"], ratio["upper_quartile"]
            ratios = [f"{ratio['median']:.2f} [{low:.2f}, {high:.2f}]", f"{of['peak_ratio']:.2f}"]
        rows.append([name, speed, ratios[0], step, _bytes(of["peak_bytes"]), ratios[1]])
    parts = list(run["contestants"][baseline]["parts_ms_per_step"])
    detail = [["ms per step of rounds with parts timed", *parts, "sum"]]
    for name, of in run["contestants"].items():
        spent = of["parts_ms_per_step"]
        detail.append([name, *(number(spent[part]) for part in parts), number(sum(spent.values()))])
    model = run["model"]
    layers = f"{model['layers']} layer{'s' * (model['layers'] != 1)}"
    loss = run["contestants"][baseline]["first_loss"]
    lines = [
        f"{op}: {run['name']}",
        f"  {model['kind']} of {layers}, {model['width']} wide, {run['dtype']}, gradient checkpointing off",
        f"  {run['pairs_per_step']} pairs a step, {run['steps_per_round']} steps a round, "
        f"{run['rounds']} round{'s' * (run['rounds'] != 1)}"
        + (f", {threads} thread{'s' * (threads != 1)}" if threads else ""),
    ]
    lines += [*_aligned(rows), *_aligned(detail)]
    lines.append(f"  the first loss is {loss:.6g}; the others' differ by at most {run['largest_loss_difference']:.2g}")
    lines += [f"  left out: {name}, {reason}" for name, reason in run["left_out"].items()]
    return "\n".join(lines) + "\n"


def _quartiles(summary: dict[str, float]) -> str:
    low, middle, high = (summary[key] for key in ("lower_quartile", "median", "upper_quartile"))
    return f"{number(middle)} [{number(low)}, {number(high)}]"


def number(value: float) -> str:
    """1,234 or 56.7 or 0.0123."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory_lines(measurement: dict[str, Any]) -> list[str]:
    memory = measurement["memory"]
    parts = []
    for name, peak in memory["peak_extra_bytes"].items():
        ratio = memory.get("ratio_to", {}).get(name)
        parts.append(f"{name} {_bytes(peak)}" + (f" ({_ratio(ratio['ratio'])}{_reach(ratio, '≤')})" if ratio else ""))
    lines = [f"  peak memory, {measurement['direction']}: {', '.join(parts)}"]
    if memory.get("share_of"):
        shares = []
        for name, share in memory["share_of"].items():
            aim = f" ≤ {100 * share['reach']:g} % {MARK[share['reached']]}" if "reach" in share else ""
            shares.append(f"{100 * share['share']:.1f} % of {name} ({_bytes(share['bytes'])}){aim}")
        lines.append(f"    beyond {_bytes(memory['kept_bytes'])} of results and gradients: {', '.join(shares)}")
    return lines


def _bytes(size: int) -> str:
    unit, scale = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if size >= s or s == 1)
    return f"{size / scale:.3g} {unit}"


def _reach(figure: dict[str, Any], sign: str) -> str:
    if "reach" not in figure:
        return ""
    reach = figure["reach"]
    return f"  {sign} {_ratio(reach) if reach < 0.1 else f'{reach:.3g}'} {MARK[figure['reached']]}"


def _ratio(value: float) -> str:
    """0.42, or 1/60 where decimals say little."""
    return f"{value:.2f}" if value >= 0.1 else f"1/{1 / value:.3g}" if value > 1e-3 else f"1/{1 / value:.0f}"


def _spread(summary: dict[str, float], rounds: int) -> str:
    unit, scale = next(
        (u, s) for u, s in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if summary["median"] * s >= 1 or u == "µs"
    )
    low, middle, high = (summary[key] * scale for key in ("lower_quartile", "median", "upper_quartile"))
    fewer = f" n={summary['rounds']}" * (summary["rounds"] < rounds)
    return f"{middle:.3g} {unit} [{low:.3g}, {high:.3g}]{fewer}"
