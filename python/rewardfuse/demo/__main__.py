"""Command line of the demo; see `python -m rewardfuse.demo --help`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

REQUIRED = ("transformers", "accelerate", "scipy", "matplotlib")
OUTLINE = """\
A world whose truth is known: a prompt asks for something ("2 tea+jam?"), answers meet the wish more or less and are
more or less courteous ("3 tea+fig. Enjoy!"). An oracle rewards both; biased annotators, each right with a probability
that rises with the gap, label {pairs} pairs. A transformer of {layers} layers learns from these labels alone.
Then, {repetitions} times, smaller models learn by three losses from the same rankings of {list_size} answers.
Last, a policy that has learned to imitate such answers takes RLOO steps towards the reward model's favour, with KL
penalties β = {kl_coefs}: what becomes of the oracle's reward?
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code, 2 with one line on stderr for bad input or a full disk."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (ValueError, OSError) as error:
        print(f"rewardfuse.demo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rewardfuse.demo",
        description="Train small reward models and policies where the truth is known, and hold them to the truth.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world, the model and the training (default: 0)")
    folder = "folder for the model, the report and the pictures (default: demo-output)"
    parser.add_argument("--output_dir", "--output-dir", default="demo-output", help=folder)
    parser.add_argument("--quick", action="store_true", help="a run of seconds that learns little: does it work?")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, and nothing else on stdout")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.seed < 0:
        raise ValueError(f"--seed: expected an int of at least 0, got {arguments.seed}")
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the demo needs {', '.join(missing)}: pip install 'rewardfuse[train]'")
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # first: a folder that cannot be made is an error before any work

    from rewardfuse.demo.plot import (
        draw,
        draw_policies,
        draw_rankings,
    )  # here, so that --help does not wait for transformers
    from rewardfuse.demo.report import OWN_TRAINER, print_report
    from rewardfuse.demo.run import DemoOptions, run_demo

    make = DemoOptions.quick if arguments.quick else DemoOptions
    options = make(seed=arguments.seed, output_dir=arguments.output_dir)
    if not arguments.json:
        lists = options.rankings
        sizes = {"repetitions": lists.repetitions, "list_size": lists.list_size}
        sizes["kl_coefs"] = ", ".join(f"{kl_coef:g}" for kl_coef in options.policy.kl_coefs)
        print(OUTLINE.format(pairs=options.train_pairs, layers=options.layers, **sizes), flush=True)
    report, arrays = run_demo(options)
    pictures = folder / "demo.png", folder / "rankings.png", folder / "goodhart.png"
    draw(report, arrays, pictures[0])
    draw_rankings(report["rankings"], pictures[1])
    draw_policies(report["policy"], pictures[2])
    if arguments.json:
        print(json.dumps(report))
        return 0
    print_report(report)
    print(f"\n{OWN_TRAINER}")
    written = [f"{folder / 'model'} (the model)", *map(str, (folder / "report.json", *pictures))]
    print(f"Written in {report['seconds']:.0f} s: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
