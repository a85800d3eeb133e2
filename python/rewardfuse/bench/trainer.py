"""``rewardfuse bench trainer``: tokens per second, memory and the parts of a step of TRL's ``RewardTrainer``.

It runs as it is, with this library's loss, and with its pooling and layouts too: same model, data, seed and
options. Each contestant is a process of its own (see ``trainer_parts``). In each round every contestant trains on the
same batches once, and the order turns by one from round to round; the first round is a warm-up.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rewardfuse.bench import report
from rewardfuse.bench.contestants import Settings
from rewardfuse.bench.measure import ratios, summarize
from rewardfuse.bench.reward_model import lengths, padding
from rewardfuse.bench.trainer_parts import OURS, PARTS, ROUND, ROUND_OF_PARTS, STOP, Job, work

LOSS, GROUPED, PACKED = "our loss", "our loss, pooling, groups", "our loss, pooling, packed"
#: Contestants beside TRL itself, and what sets them apart from it.
OPTIONS: dict[str, dict[str, Any]] = {
    LOSS: {},
    GROUPED: {"pooling": "attention_mask", "row_layout": "grouped"},
    PACKED: {"pooling": "attention_mask", "row_layout": "packed"},
}
#: Where this one cannot run, the others are measured all the same: not every attention keeps packed rows apart.
MAY_FAIL = (PACKED,)
VOCABULARY, FIRST_TOKEN = 4096, 259  # below that are the tokenizer's bytes and special tokens
#: A data set's timed rounds end after so long, but not before there are this many.
SECONDS, FEWEST_ROUNDS = 120.0, 3
ROUNDS_OF_PARTS = 2
#: How far the losses of the first step may differ: rounding in float32, and of bfloat16 products.
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}
NOTE = (
    "tokens are real ones, without padding, the same for all; a ratio is the median of those within a round;\n"
    "memory is {memory};\n"
    "the parts of a step are of rounds of their own, with every part timed{waits}; forward is the backbone alone.\n"
    "our loss, pooling, groups: pooling='attention_mask', row_layout='grouped'; packed: row_layout='packed', here\n"
    "without an attention kernel for packed rows.\n{limits}"
)
MEMORY = {
    "cpu": "the process's peak (ru_maxrss) beyond its peak when model and trainer stood there",
    "cuda": "torch's peak (max_memory_allocated) beyond what was allocated when model and trainer stood there",
}
LIMITS = {
    "cpu": "Measured on a CPU, where matrix products are nearly all of a step: nothing follows for GPUs.",
    "cuda": "",
}


class Sizes(NamedTuple):
    """Of the model and the batches."""

    width: int
    layers: int
    pairs_per_step: int
    steps: int  #: in a round
    median: int  #: of the log-normal lengths
    longest: int
    longest_even: int  #: of the lengths that differ little


QUICK = Sizes(width=64, layers=1, pairs_per_step=2, steps=2, median=8, longest=48, longest_even=24)
SIZES = {
    "cpu": Sizes(width=512, layers=4, pairs_per_step=8, steps=3, median=32, longest=256, longest_even=128),
    "cuda": Sizes(width=1024, layers=12, pairs_per_step=16, steps=10, median=128, longest=1024, longest_even=512),
}


def measure(settings: Settings, *, show: bool) -> dict[str, Any]:
    """Everything measured, ready for JSON: {"note", "runs"}, a run a data set. Prints tables with ``show``.

    Raises:
        RuntimeError: a contestant fails, counts other tokens, or its first loss differs from TRL's.
    """
    device = settings.device.type
    sizes = QUICK if settings.quick else SIZES[device]
    note = NOTE.format(
        memory=MEMORY[device], waits="; the host waits at each" * (device == "cuda"), limits=LIMITS[device]
    )
    runs = []
    for name, tokens in _data_sets(sizes).items():
        runs.append(_run(name, tokens, sizes, settings))
        if show:
            print(report.run_table("trainer", runs[-1]))
    if show:
        print(f"{note}\n")
    return {"note": note, "runs": runs}


def _data_sets(sizes: Sizes) -> dict[str, list[int]]:
    """Lengths of the texts of a round, chosen and rejected in turn: with much padding, and with little."""
    count = 2 * sizes.pairs_per_step * sizes.steps
    draw = random.Random(5)
    even = [round(sizes.longest_even * draw.uniform(0.8, 1.0)) for _ in range(count)]
    few = round(0.8 * sizes.longest_even)
    return {
        f"log-normal lengths, median {sizes.median}, at most {sizes.longest}": lengths(
            count, sizes.median, sizes.longest, seed=4
        ),
        f"lengths {few} to {sizes.longest_even}": even,
    }


def _pairs(sizes: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Random token ids, none of them the pad token, with eos at the end as TRL adds it."""
    from rewardfuse.byte_tokenizer import byte_tokenizer

    eos, draw = byte_tokenizer().eos_token_id, random.Random(0)
    rows = [[*draw.choices(range(FIRST_TOKEN, VOCABULARY), k=size - 1), eos] for size in sizes]
    return list(zip(rows[::2], rows[1::2], strict=True))


def _run(name: str, tokens: list[int], sizes: Sizes, settings: Settings) -> dict[str, Any]:
    """Let all contestants take turns on one data set."""
    device = settings.device.type
    threads = None if device == "cuda" else settings.threads or 2
    share = padding(tokens, 2 * sizes.pairs_per_step)
    title = f"{name} tokens, {share:.0%} padding"
    contestants = {f"TRL {importlib.metadata.version('trl')}": ("trl", {})}
    contestants |= {contestant: (OURS, options) for contestant, options in OPTIONS.items()}
    most = 1 + settings.rounds + ROUNDS_OF_PARTS
    job = Job(
        "", {}, _pairs(tokens), sizes.pairs_per_step, most, sizes.width, sizes.layers, VOCABULARY, device, threads, ""
    )
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rewardfuse-bench-"))
        racing, left_out = {}, {}
        for number, (contestant, (module, options)) in enumerate(contestants.items()):
            place = Path(folder, str(number))
            place.mkdir()
            worker = _Worker(contestant, job._replace(module=module, options=options, folder=str(place)))
            racing[contestant] = stack.enter_context(contextlib.closing(worker))
        rounds = _take_turns(racing, left_out, f"trainer, {title}", settings.rounds)
    return {
        "name": title,
        "device": device,
        "threads": threads,
        "dtype": "float32" if device == "cpu" else "bfloat16 autocast",
        "model": {"kind": "Llama", "layers": sizes.layers, "width": sizes.width, "vocabulary": VOCABULARY},
        "gradient_checkpointing": False,
        "pairs_per_step": sizes.pairs_per_step,
        "steps_per_round": sizes.steps,
        "tokens_per_round": sum(tokens),
        "padding": share,
        "memory_is": MEMORY[device],
        **_summary(rounds, sum(tokens), sizes.steps, TOLERANCE[device]),
        "left_out": left_out,
    }


class _Worker:
    """A contestant's process."""

    def __init__(self, name: str, job: Job) -> None:
        # On a CPU a server that has imported everything forks: saves seconds each, and a fork's peak memory starts
        # at its own. CUDA does not survive forks, should an import have touched it.
        context = multiprocessing.get_context("spawn" if job.device == "cuda" else "forkserver")
        if job.device != "cuda":
            context.set_forkserver_preload(
                ["rewardfuse.bench.trainer_parts", "datasets", "trl.trainer.reward_trainer", OURS]
            )
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self) -> dict[str, Any]:
        """What the contestant reports next.

        Raises:
            RuntimeError: it failed.
        """
        try:
            kind, facts = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(timeout=10)
            kind, facts = "failed", {"reason": f"its process ended with exit code {self._process.exitcode}"}
        if kind == "failed":
            raise RuntimeError(f"{self.name}: {facts['reason']}")
        return facts

    def round(self, command: str) -> dict[str, Any]:
        """Let it train for a round."""
        with contextlib.suppress(ConnectionError):  # the answer will say so
            self._connection.send(command)
        return self.answer()

    def close(self) -> None:
        """End it, in peace if it waits."""
        with contextlib.suppress(OSError):
            self._connection.send(STOP)
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()


def _take_turns(racing: dict[str, _Worker], left_out: dict[str, str], title: str, most: int) -> dict[str, Any]:
    """What every contestant reports, {"warm-up" | "timed" | "parts": [round]}; those that cannot run are left out."""
    rounds: dict[str, dict[str, list[Any]]] = {name: {"warm-up": [], "timed": [], "parts": []} for name in racing}
    started = time.monotonic()
    for kind, turn in _schedule(most):
        names = list(racing)
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            elapsed = f"{time.monotonic() - started:.0f} s so far"
            report.progress(f"{title}: {name}, {kind}{f', round {turn + 1}' * (kind == 'timed')} ({elapsed})")
            command = ROUND_OF_PARTS if kind == "parts" else ROUND
            try:
                if kind == "warm-up":
                    racing[name].answer()  # it is ready
                rounds[name][kind].append(racing[name].round(command))
            except RuntimeError as error:
                if kind != "warm-up" or name not in MAY_FAIL:
                    raise
                left_out[name] = str(error)
                del racing[name], rounds[name]
    report.progress("")
    return rounds


def _schedule(most: int) -> Iterator[tuple[str, int]]:
    """(kind of round, its number): a warm-up, timed ones while there is time, and those of the parts."""
    yield "warm-up", 0
    started = time.monotonic()
    for turn in range(most):
        if turn >= FEWEST_ROUNDS and time.monotonic() - started > SECONDS:
            break
        yield "timed", turn
    for turn in range(ROUNDS_OF_PARTS):
        yield "parts", turn


def _summary(rounds: dict[str, Any], tokens: int, steps: int, tolerance: float) -> dict[str, Any]:
    """The figures of every contestant, the first being what the others are held against."""
    baseline = next(iter(rounds))
    _check_agreement(rounds, baseline, tokens, tolerance)
    seconds = {name: [r["seconds"] for r in of["timed"]] for name, of in rounds.items()}
    peaks = {name: of["timed"][-1]["peak_bytes"] for name, of in rounds.items()}
    contestants = {}
    for name, of in rounds.items():
        parts = {part: 1e3 / steps * statistics.fmean(r["parts"][part] for r in of["parts"]) for part in PARTS}
        contestants[name] = {
            "tokens_per_second": summarize([tokens / value for value in seconds[name]]),
            "ms_per_step": summarize([1e3 / steps * value for value in seconds[name]]),
            "peak_bytes": peaks[name],
            "parts_ms_per_step": parts,
            "ms_per_step_with_parts": 1e3 / steps * statistics.fmean(r["seconds"] for r in of["parts"]),
            "first_loss": of["warm-up"][0]["losses"][0],
        }
        if name != baseline:
            contestants[name] |= {
                "speed_ratio": ratios(seconds[baseline], seconds[name]),
                "peak_ratio": peaks[name] / peaks[baseline],
            }
    first = contestants[baseline]["first_loss"]
    return {
        "baseline": baseline,
        "rounds": len(seconds[baseline]),
        "largest_loss_difference": max(abs(c["first_loss"] - first) for c in contestants.values()),
        "contestants": contestants,
    }


def _check_agreement(rounds: dict[str, Any], baseline: str, tokens: int, tolerance: float) -> None:
    """Raises RuntimeError where contestants do not train on the same tokens, or to the same loss."""
    expected = rounds[baseline]["warm-up"][0]["losses"][0]
    for name, of in rounds.items():
        warm_up = of["warm-up"][0]
        if warm_up["tokens_so_far"] != tokens:
            raise RuntimeError(f"{name} counts {warm_up['tokens_so_far']} tokens in a round, expected {tokens}")
        loss = warm_up["losses"][0]
        if not abs(loss - expected) <= tolerance:
            raise RuntimeError(
                f"{name} and {baseline} compute different things: the first loss is {loss:.6g}, expected {expected:.6g}"
            )
        for part, spent in of["parts"][0]["parts"].items():
            if not spent > 0:
                raise RuntimeError(f"{name}: no time was seen in {part!r}: its trainer no longer calls what is timed")
