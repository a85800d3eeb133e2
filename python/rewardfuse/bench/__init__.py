"""``rewardfuse bench``: this library against plain torch and torch.compile, on the same tensors in one run."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# An op's module has cases(settings) -> Iterator[Case] and NOTE, a line on who its peers are; or, where no single steps
# are timed, measure(settings, show=) -> {"note", "runs"}.
OPS = {
    "bradley_terry": "rewardfuse.bench.bradley_terry",
    "kl_rewards": "rewardfuse.bench.kl_rewards",
    "plackett_luce": "rewardfuse.bench.plackett_luce",
    "reward_model": "rewardfuse.bench.reward_model",
    "trainer": "rewardfuse.bench.trainer",
}
NEEDS = {"trainer": "trl"}  # without this package such an op is left out, and an error where it was named


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the named ops, or all; print tables or JSON; returns 0.

    Raises:
        ValueError: an unknown op, a device that is not there, a number out of range, or results of another machine in
            the way.
        OSError: the results cannot be written.
    """
    arguments = _parser().parse_args(argv)
    _check(arguments)
    from rewardfuse.bench import report, results
    from rewardfuse.bench.contestants import Settings

    rounds = arguments.repeats or (5 if arguments.quick else 50)
    settings = Settings(torch.device(arguments.device), arguments.threads, arguments.quick, rounds)
    machine = results.machine_facts(settings.device)
    result: dict[str, Any] = {"machine": machine, "settings": _plain(settings), "ops": {}}
    stem, before = arguments.name or results.slug(machine), {}
    if arguments.output_dir is not None:
        before = results.earlier(machine, arguments.output_dir, stem)  # before the minutes that measuring takes
    if not arguments.json:
        print(report.header(result))
    for name in arguments.op or _measurable():
        result["ops"][name] = _measure_op(name, settings, show=not arguments.json)
    if arguments.json:
        print(json.dumps(result, indent=2))
    if arguments.output_dir is not None:
        for path in results.write(result, before, arguments.output_dir, stem):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rewardfuse bench",
        description="Measure ops against plain torch and torch.compile, and training against TRL. Without an op: all.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("op", nargs="*", help=f"what to measure: {', '.join(OPS)} (which needs TRL)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="torch's threads for every CPU case; default: each case's own")
    parser.add_argument(
        "--repeats",
        type=int,
        help="rounds in which each contestant is timed, fewer for what takes long; default: 50, quick 5",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: shows that it works, no more")
    parser.add_argument(
        "--output_dir",
        "--output-dir",
        type=Path,
        help="folder for NAME.json, in which ops measured earlier stay, NAME.png and NAME-trainer.png; default: none",
    )
    parser.add_argument("--name", help="stem of these files; default: the processor's name")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for op in arguments.op:
        if op not in OPS:
            raise ValueError(f"bench: expected an op among {', '.join(OPS)}, got {op!r}")
        if _lacks(op):
            raise ValueError(f"bench {op}: {_lacks(op)}")
    if arguments.device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {arguments.device!r}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a device that torch sees, got cuda and torch sees no GPU")
    for name in ("threads", "repeats"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected a number from 1, got {value}")
    if arguments.name is not None and (not arguments.name or Path(arguments.name).name != arguments.name):
        raise ValueError(f"--name: expected a file name without folders, got {arguments.name!r}")


def _lacks(op: str) -> str | None:
    """Which package an op needs that is not there."""
    package = NEEDS.get(op)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"needs {package}, which is not installed: pip install rewardfuse[{package}]"


def _measurable() -> list[str]:
    for op in filter(_lacks, OPS):
        print(f"left out: {op} {_lacks(op)}", file=sys.stderr)
    return [op for op in OPS if not _lacks(op)]


def _measure_op(name: str, settings: Any, *, show: bool) -> dict[str, Any]:
    from rewardfuse.bench import report
    from rewardfuse.bench.measure import run_case

    module = importlib.import_module(OPS[name])
    if hasattr(module, "measure"):
        return module.measure(settings, show=show)
    measured = []
    started = time.monotonic()
    for case in module.cases(settings):
        report.progress(f"{name}, case {len(measured) + 1}: {case.name} ({time.monotonic() - started:.0f} s so far)")
        measured.append(run_case(case, settings.rounds))
        report.progress("")
        if show:
            print(report.table(name, measured[-1]))
    if show:
        print(f"{module.NOTE}\n")
    return {"note": module.NOTE, "cases": measured}


def _plain(settings: Any) -> dict[str, Any]:
    return {**settings._asdict(), "device": str(settings.device)}
