"""``rewardfuse bench trainer``: the same work for every contestant, parts that add up, failures by name."""

import contextlib
import importlib.util
import json
import os
import signal
import statistics

import pytest

from rewardfuse import bench, cli
from rewardfuse.bench import report, results, trainer, trainer_parts, trainer_picture
from rewardfuse.bench.trainer_parts import BACKWARD, FORWARD, LOSS, PARTS, REST, ROUND, Job, Stopwatch

NEEDS_TRL = "TRL is not installed: pip install rewardfuse[trl]"


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    pytest.importorskip("trl", reason=NEEDS_TRL)
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--quick", "--repeats", "2", "--threads", "1", "--output_dir", str(folder), "--name", "here"]
    assert bench.main(["trainer", *arguments]) == 0
    return folder


def op_of(folder):
    return json.loads((folder / "here.json").read_text(encoding="utf-8"))["ops"]["trainer"]


def test_a_contestant_or_a_data_set_is_lost(quick_run):
    op = op_of(quick_run)
    much, little = op["runs"]
    assert much["padding"] > 0.4 and little["padding"] < 0.2
    for run in op["runs"]:
        assert list(run["contestants"]) == [run["baseline"], trainer.LOSS, trainer.GROUPED, trainer.PACKED]
        assert run["rounds"] == 2 and run["threads"] == 1 and run["left_out"] == {}
        for name, of in run["contestants"].items():
            speed = of["tokens_per_second"]
            assert 0 < speed["lower_quartile"] <= speed["median"] <= speed["upper_quartile"]
            assert of["peak_bytes"] > 0 and ("speed_ratio" in of) == (name != run["baseline"])
            lowest, highest = (1e-3 * of["ms_per_step"][f"{end}_quartile"] for end in ("lower", "upper"))
            tokens_per_step = run["tokens_per_round"] / run["steps_per_round"]
            assert speed["lower_quartile"] * lowest <= tokens_per_step <= speed["upper_quartile"] * highest
        text = report.run_table("trainer", run)
        assert all(f"  {name} " in text for name in run["contestants"])


def test_parts_are_counted_twice_or_not_at_all(quick_run):
    off = []
    for run in op_of(quick_run)["runs"]:
        for of in run["contestants"].values():
            spent = of["parts_ms_per_step"]
            assert list(spent) == list(PARTS) and min(spent.values()) > 0
            off.append(abs(sum(spent.values()) / of["ms_per_step_with_parts"] - 1))
    assert statistics.median(off) < 0.02  # some other process may come between two clocks now and then


def test_contestants_start_from_different_weights_or_pool_elsewhere(quick_run):
    for run in op_of(quick_run)["runs"]:
        losses = [of["first_loss"] for of in run["contestants"].values()]
        assert losses == pytest.approx([losses[0]] * 4, abs=1e-4)
        assert abs(losses[0] - 0.6931) > 1e-3  # where weights and pooling make no difference


def test_a_training_run_takes_the_picture_of_the_ops(quick_run, tmp_path):
    assert {path.name for path in quick_run.iterdir()} == {"here.json", "here-trainer.png"}
    assert (quick_run / "here-trainer.png").read_bytes().startswith(b"\x89PNG")
    whole = json.loads((quick_run / "here.json").read_text(encoding="utf-8"))
    old = {"machine": whole["machine"], "settings": whole["settings"], "note": "", "cases": []}
    written = results.write(whole, {"old": old}, tmp_path, "here")
    assert [path.name for path in written] == ["here.json", "here.png", "here-trainer.png"]
    assert list(json.loads(written[0].read_text(encoding="utf-8"))["ops"]) == ["old", "trainer"]


def a_job(folder, **options):
    pairs = trainer._pairs([5, 4, 3, 6])
    return Job("trl", options, pairs, 2, 2, 16, 1, trainer.VOCABULARY, "cpu", 1, str(folder))


def test_a_contestant_that_fails_hangs_the_run(quick_run, tmp_path):
    words = r"odd: TypeError: .*unexpected keyword argument 'rows'"
    with (
        contextlib.closing(trainer._Worker("odd", a_job(tmp_path, rows="spiral"))) as worker,
        pytest.raises(RuntimeError, match=words),
    ):
        worker.answer()
    with contextlib.closing(trainer._Worker("gone", a_job(tmp_path))) as worker:
        assert worker.answer() == {}
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="gone: its process ended with exit code -9"):
            worker.round(ROUND)


class Scripted:
    """In the place of a contestant's process: rounds from a list of lengths in seconds, or a failure."""

    def __init__(self, seconds=1.0, failure=None):
        self.commands, self.seconds, self.failure = [], seconds, failure

    def answer(self):
        if self.failure:
            raise RuntimeError(self.failure)
        return {}

    def round(self, command):
        self.commands.append(command)
        parts = {"parts": dict.fromkeys(PARTS, self.seconds / len(PARTS))}
        return {"seconds": self.seconds, "peak_bytes": 10, "tokens_so_far": 100, "losses": [0.5], **parts}


def test_packed_rows_that_a_model_cannot_take_end_the_run():
    left_out = {}
    racing = {"TRL": Scripted(2.0), trainer.PACKED: Scripted(failure="ValueError: reads its neighbours")}
    rounds = trainer._take_turns(racing, left_out, "title", most=3)
    assert left_out == {trainer.PACKED: "ValueError: reads its neighbours"} and list(rounds) == ["TRL"]
    with pytest.raises(RuntimeError, match="broken"):
        trainer._take_turns({"TRL": Scripted(), trainer.GROUPED: Scripted(failure="broken")}, {}, "title", most=3)


def test_a_slow_machine_takes_all_day(monkeypatch):
    monkeypatch.setattr(trainer, "SECONDS", 0.0)
    slow = Scripted()
    trainer._take_turns({"TRL": slow}, {}, "title", most=50)
    assert len(slow.commands) == 1 + trainer.FEWEST_ROUNDS + trainer.ROUNDS_OF_PARTS


def summary_of(**changes):
    racing = {"TRL": Scripted(2.0), "ours": Scripted(1.0)}
    rounds = trainer._take_turns(racing, {}, "title", most=3)
    rounds["ours"]["warm-up"][0].update(changes)
    return trainer._summary(rounds, 100, 4, 1e-4)


def test_a_faster_contestant_is_the_slower_one():
    contestants = summary_of()["contestants"]
    assert contestants["ours"]["speed_ratio"]["median"] == 2.0
    assert contestants["ours"]["tokens_per_second"]["median"] == 100
    assert contestants["TRL"]["ms_per_step"]["median"] == 500


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"losses": [0.5002]}, "ours and TRL compute different things: the first loss is 0.5002, expected 0.5"),
        ({"losses": [float("nan")]}, "the first loss is nan"),
        ({"tokens_so_far": 99}, "ours counts 99 tokens in a round, expected 100"),
    ],
)
def test_contestants_that_do_other_work_are_compared(changes, words):
    with pytest.raises(RuntimeError, match=words):
        summary_of(**changes)


def test_a_part_that_is_no_longer_called_costs_nothing():
    rounds = trainer._take_turns({"TRL": Scripted()}, {}, "title", most=3)
    rounds["TRL"]["parts"][0]["parts"][BACKWARD] = 0.0
    with pytest.raises(RuntimeError, match="TRL: no time was seen in 'backward'"):
        trainer._summary(rounds, 100, 4, 1e-4)


def test_a_part_holds_the_time_of_the_parts_inside_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(trainer_parts.time, "perf_counter", lambda: now[0])

    class Trainer:
        def forward(self):
            now[0] += 5.0
            raise KeyError("out of memory, say")

        def loss(self):
            now[0] += 1.0
            with contextlib.suppress(KeyError):
                self.forward()
            now[0] += 2.0
            return "loss"

    watch, one = Stopwatch(lambda: None), Trainer()
    watch.watch(one, "forward", FORWARD)
    watch.watch(one, "loss", LOSS)
    watch.enter(REST)
    now[0] += 0.5
    assert one.loss() == "loss"
    now[0] += 0.25
    watch.leave()
    now[0] += 100.0
    assert {part: spent for part, spent in watch.seconds.items() if spent} == {FORWARD: 5.0, LOSS: 3.0, REST: 0.75}


@pytest.mark.parametrize("wide", range(len(PARTS)))
def test_labels_of_the_picture_lie_on_one_another(wide):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    spent = {part: 12345.6 if place == wide else 1234.5 for place, part in enumerate(PARTS)}
    of = {"parts_ms_per_step": spent, "tokens_per_second": {"median": 12345.6}, "speed_ratio": {"median": 1.0}}
    name = "log-normal lengths, median 1,024, at most 16,384 tokens, 100% padding"
    run = {"name": name, "pairs_per_step": 8, "dtype": "float32", "threads": 2}
    run["contestants"] = {"TRL 1.16.0": of, trainer.GROUPED: {**of, "parts_ms_per_step": dict.fromkeys(PARTS, 1e3)}}
    machine = {"cpu": "AMD EPYC", "torch": "2.13.0", "date": "2026-01-01"}
    figure = trainer_picture.figure_of({"machine": machine, "ops": {"trainer": {"runs": [run, run]}}})
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in [*axes.texts, axes._left_title]]
        assert len(boxes) >= 2 * len(run["contestants"])
        assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]
        assert all(box.x1 <= axes.bbox.x1 + 1 for box in boxes)


def test_a_run_without_trl_is_a_traceback(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else found(name))
    assert cli.main(["bench", "trainer", "--quick"]) == 2
    error = capsys.readouterr().err
    assert "bench trainer: needs trl, which is not installed: pip install rewardfuse[trl]" in error
    assert error.count("\n") == 1
    assert "trainer" not in bench._measurable() and "bradley_terry" in bench._measurable()
    assert "left out: trainer needs trl" in capsys.readouterr().err
