"""``rewardfuse bench``: every contestant is measured, contestants do the same work, bad input is one line."""

import contextlib
import dataclasses
import json
import math

import pytest
import torch

from rewardfuse import bench, cli
from rewardfuse._backend import BACKENDS
from rewardfuse.bench import measure, report
from rewardfuse.bench.clocks import WallClock
from rewardfuse.bench.measure import Case, Contestant


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--quick", "--repeats", "3", "--output_dir", str(folder), "--name", "here"]
    assert bench.main(["bradley_terry", "plackett_luce", *arguments]) == 0
    return folder


def test_a_contestant_is_lost_or_has_no_time(quick_run):
    result = json.loads((quick_run / "here.json").read_text(encoding="utf-8"))
    assert set(result["ops"]) == {"bradley_terry", "plackett_luce"}
    assert all(len(op["cases"]) >= 2 for op in result["ops"].values())
    for case in (case for op in result["ops"].values() for case in op["cases"]):
        for measurement in case["measurements"]:
            measured = measurement["seconds"]
            assert set(measured) | set(case["left_out"]) >= {*BACKENDS, "torch", "torch.compile"}
            assert {"reference", "torch"} <= set(measured)
            for summary in measured.values():
                assert 0 < summary["lower_quartile"] <= summary["median"] <= summary["upper_quartile"] < math.inf
            assert set(measurement["ratio_to"]) == set(measured) - {measurement["ours"]}
    assert {"cpu", "cores", "torch", "date"} <= set(result["machine"])


def test_packed_lists_do_not_race_against_padded_ones(quick_run):
    cases = json.loads((quick_run / "here.json").read_text(encoding="utf-8"))["ops"]["plackett_luce"]["cases"]
    packed = next(case for case in cases if "packed" in case["name"])
    assert all("padded" in measurement["ratio_to"] for measurement in packed["measurements"])


def test_a_target_of_the_issue_is_not_marked(quick_run):
    case = json.loads((quick_run / "here.json").read_text(encoding="utf-8"))["ops"]["bradley_terry"]["cases"][0]
    ratio = case["measurements"][1]["ratio_to"]["torch"]
    assert case["measurements"][1]["direction"] == "forward + backward"
    assert ratio["reach"] == 0.65 and ratio["reached"] == (ratio["median"] <= 0.65)
    text = report.table("bradley_terry", case)
    assert f"≤ 0.65 {'reached' if ratio['reached'] else 'missed'}" in text


def test_the_picture_is_no_picture(quick_run):
    assert (quick_run / "here.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in quick_run.iterdir()} == {"here.json", "here.png"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plackett"], "an op among bradley_terry, plackett_luce, got 'plackett'"),
        (["--device", "tpu"], "cpu or cuda, got 'tpu'"),
        (["--repeats", "0"], "--repeats: expected a number from 1, got 0"),
        (["--name", "a/b"], "without folders, got 'a/b'"),
    ],
)
def test_bad_input_gives_a_traceback(arguments, words, capsys):
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_run_without_a_gpu_is_a_traceback(capsys):
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def case_of(*forwards):
    x = torch.linspace(0.1, 1, 8).requires_grad_()
    contestants = [Contestant(f"c{i}", lambda forward=forward: forward(x)) for i, forward in enumerate(forwards)]
    return Case(
        "case", x.device, 8, x.dtype, 1, [x], contestants, {}, step_bytes=64, reach={"c1": 1e9}, compare_copy=True
    )


def test_contestants_that_compute_different_things_are_compared():
    measure.check_agreement(case_of(lambda x: x.exp().sum(), lambda x: x.exp().sum()))
    with pytest.raises(RuntimeError, match="c1 and c0 compute different things: gradient"):
        measure.check_agreement(case_of(lambda x: x.sum(), lambda x: 2 * x.sum() - x.sum().detach()))
    with pytest.raises(RuntimeError, match="c1 and c0 compute different things: loss"):
        measure.check_agreement(case_of(lambda x: x.sum() + 1, lambda x: x.sum() + torch.nan))


def test_the_slower_one_wins():
    case = case_of(lambda x: sum(x.sin() for _ in range(200)).sum() / 200, lambda x: x.sin().sum())
    result = measure.run_case(case, rounds=3)
    whole = result["measurements"][1]
    assert whole["ratio_to"]["c1"]["median"] > 5
    assert whole["ratio_to"]["c1"]["reached"] is True
    assert whole["bandwidth"]["bytes"] == 64
    assert case.leaves[0].grad is None


def test_samples_are_too_short_to_time():
    calls = []
    WallClock(torch.device("cpu")).sample(lambda: calls.append(None))
    assert len(calls) > 1000  # an append takes far less than a microsecond, a sample two milliseconds


def test_every_contestant_has_as_many_turns():
    names = []
    races = [measure.Race(name, lambda name=name: names.append(name), contextlib.nullcontext) for name in "abc"]

    class OneStep:
        name = "one step"

        def sample(self, step):
            step()
            return 1e-3

    seconds = measure.take_turns(races, OneStep(), rounds=4)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    firsts = names[:: 2 * len(races)]
    assert set(firsts) == {"a", "b", "c"}  # nobody always goes first


def test_a_slow_contestant_holds_up_the_run(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    lasts = {"fast": 1e-3, "slow": 10.0}
    races = [measure.Race(name, lambda: None, contextlib.nullcontext) for name in lasts]

    class NamedStep:
        name = "named step"

        def sample(self, step):
            seconds = next(lasts[race.name] for race in races if race.step is step)
            now[0] += seconds
            return seconds

    seconds = measure.take_turns(races, NamedStep(), rounds=20)
    assert {name: len(values) for name, values in seconds.items()} == {"fast": 20, "slow": measure.FEWEST_ROUNDS}
    assert measure.ratios([1, 2, 9, 9], [2, 4])["median"] == 0.5  # the rounds that both were in


def test_gradients_of_another_layout_are_not_compared():
    case = case_of(lambda x: x.exp().sum(), lambda x: x.exp().sum())
    found = iter([torch.ones(2), torch.tensor([1.0, 1.5])])
    with pytest.raises(RuntimeError, match=r"compute different things: gradient off by 0\.5"):
        measure.check_agreement(dataclasses.replace(case, gradients=lambda: [next(found)]))


def test_a_small_ratio_reads_as_zero():
    ratio = {"median": 1 / 104, "reach": 1 / 60, "reached": True}
    summary = {"median": 0.3, "lower_quartile": 0.3, "upper_quartile": 0.3, "rounds": 5}
    measurement = {"direction": "forward + backward", "clock": "wall", "rounds": 50}
    measurement |= {"seconds": {"torch": summary}, "ratio_to": {"torch": ratio}}
    text = report.table("plackett_luce", {"name": "lists", "measurements": [measurement], "left_out": {}})
    assert "1/104" in text and "≤ 1/60 reached" in text and "n=5" in text


def test_threads_stay_changed():
    before, used = torch.get_num_threads(), set()

    def loss(x):
        used.add(torch.get_num_threads())
        return x.sum()

    measure.run_case(dataclasses.replace(case_of(loss, loss), threads=before + 1), rounds=1)
    assert used == {before + 1}
    assert torch.get_num_threads() == before
