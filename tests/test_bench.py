"""``rewardfuse bench``: every contestant is measured, contestants do the same work, bad input is one line."""

import contextlib
import dataclasses
import json
import math

import pytest
import torch

from rewardfuse import backend, bench, cli
from rewardfuse._backend import BACKENDS
from rewardfuse.bench import kl_lines, kl_rewards, measure, report, results
from rewardfuse.bench.case import BACKWARD, BOTH, FORWARD, Aim, Case, Contestant, Memory
from rewardfuse.bench.clocks import WallClock
from rewardfuse.bench.contestants import Settings
from rewardfuse.bench.memory import peak_extra_bytes


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--quick", "--repeats", "3", "--threads", "1", "--output_dir", str(folder), "--name", "here"]
    assert bench.main(["bradley_terry", "plackett_luce", *arguments]) == 0
    assert bench.main(["kl_rewards", *arguments]) == 0
    return folder


def ops_of(folder):
    return json.loads((folder / "here.json").read_text(encoding="utf-8"))["ops"]


def test_a_contestant_is_lost_or_has_no_time(quick_run):
    ops = ops_of(quick_run)
    assert all(len(op["cases"]) >= 2 for op in ops.values())
    for case in (case for op in ops.values() for case in op["cases"]):
        for measurement in case["measurements"]:
            measured = measurement["seconds"]
            assert set(measured) | set(case["left_out"]) >= {*BACKENDS, "torch", "torch.compile"}
            assert {measurement["ours"], "torch"} <= set(measured)
            for summary in measured.values():
                assert 0 < summary["lower_quartile"] <= summary["median"] <= summary["upper_quartile"] < math.inf
            assert set(measurement["ratio_to"]) == set(measured) - {measurement["ours"]}


def test_an_op_measured_before_is_lost(quick_run):
    ops = ops_of(quick_run)
    assert list(ops) == ["bradley_terry", "plackett_luce", "kl_rewards"]
    for op in ops.values():
        assert {"cpu", "cores", "torch", "date"} <= set(op["machine"])
        assert op["settings"]["rounds"] == 3


@pytest.mark.parametrize("text", ["{}", "no figures", '{"machine": {"cpu": "Z80"}, "settings": {}, "ops": {}}'])
def test_figures_of_another_machine_are_overwritten(text, tmp_path, capsys):
    (tmp_path / "here.json").write_text(text, encoding="utf-8")
    arguments = ["bradley_terry", "--quick", "--output_dir", str(tmp_path), "--name", "here"]
    assert cli.main(["bench", *arguments]) == 2
    assert "here.json: expected figures" in capsys.readouterr().err
    assert (tmp_path / "here.json").read_text(encoding="utf-8") == text


def test_figures_of_this_machine_are_refused(tmp_path):
    machine = results.machine_facts(torch.device("cpu"))
    result = {"machine": {**machine, "date": "2001-01-01"}, "settings": {"rounds": 7}, "ops": {"old": {"cases": []}}}
    (tmp_path / "here.json").write_text(json.dumps(result), encoding="utf-8")
    before = results.earlier(machine, tmp_path, "here")
    assert before["old"]["machine"]["date"] == "2001-01-01" and before["old"]["settings"] == {"rounds": 7}
    assert results.earlier(machine, tmp_path, "elsewhere") == {}


def test_packed_lists_do_not_race_against_padded_ones(quick_run):
    cases = ops_of(quick_run)["plackett_luce"]["cases"]
    packed = next(case for case in cases if "packed" in case["name"])
    assert all("padded" in measurement["ratio_to"] for measurement in packed["measurements"])


def test_a_target_of_the_issue_is_not_marked(quick_run):
    case = ops_of(quick_run)["bradley_terry"]["cases"][0]
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
        (["plackett"], "an op among bradley_terry, kl_rewards, plackett_luce, reward_model, trainer, got 'plackett'"),
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
    aims = {FORWARD: Aim(), BOTH: Aim({"c1": 1e9}, copy_bytes=64)}
    return Case("case", x.device, 8, x.dtype, 1, [x], contestants, {}, aims)


def test_contestants_that_compute_different_things_are_compared():
    measure.check_agreement(case_of(lambda x: x.exp().sum(), lambda x: x.exp().sum()))
    with pytest.raises(RuntimeError, match="c1 and c0 compute different things: gradient 0"):
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
    lasts = {"fast": 1e-3, "slow": 0.8, "very slow": 10.0}
    races = [measure.Race(name, lambda: None, contextlib.nullcontext) for name in lasts]

    class NamedStep:
        name = "named step"

        def sample(self, step):
            seconds = next(lasts[race.name] for race in races if race.step is step)
            now[0] += seconds
            return seconds

    seconds = measure.take_turns(races, NamedStep(), rounds=20)
    assert {name: len(values) for name, values in seconds.items()} == {
        "fast": 20,
        "slow": measure.FEWEST_ROUNDS,
        "very slow": measure.FEWEST_LONG_ROUNDS,
    }
    assert measure.ratios([1, 2, 9, 9], [2, 4])["median"] == 0.5  # the rounds that both were in


def test_gradients_of_another_layout_are_not_compared():
    case = case_of(lambda x: x.exp().sum(), lambda x: x.exp().sum())
    found = iter([torch.ones(2), torch.tensor([1.0, 1.5])])
    with pytest.raises(RuntimeError, match=r"compute different things: gradient 0 off by 0\.5"):
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


def test_a_target_of_one_direction_is_marked_in_another():
    case = case_of(lambda x: x.exp().sum(), lambda x: x.exp().sum())
    ours, theirs = case.contestants
    case = dataclasses.replace(case, contestants=[ours._replace(apart=True), theirs])
    aims = {FORWARD: Aim({"c1": 1e9}), BACKWARD: Aim(copy_bytes=1 << 10, reach_bandwidth=1e9), BOTH: Aim({"c1": 0.0})}
    forward, backward, both = measure.run_case(dataclasses.replace(case, aims=aims), rounds=1)["measurements"]
    assert (forward["direction"], backward["direction"], both["direction"]) == tuple(aims)
    assert forward["ratio_to"]["c1"]["reached"] and not both["ratio_to"]["c1"]["reached"]
    assert backward["bandwidth"]["share_of_copy"]["reached"] is False
    assert "bandwidth" not in forward and set(backward["seconds"]) == {"c0", "copy"}


def test_backward_alone_runs_forward_again():
    calls = []

    def loss(x):
        calls.append(None)
        return x.exp().sum()

    case = case_of(loss)
    step = measure.step_of(case.contestants[0], BACKWARD, case.leaves)
    for _ in range(3):
        step()
    assert len(calls) == 1 and case.leaves[0].grad is None


def test_what_a_peer_does_not_compute_is_compared():
    case = case_of(lambda x: x.sum(), lambda x: x.sum())
    first, second = case.contestants
    results_of = {name: [torch.ones(2), *more] for name, more in (("c0", [torch.zeros(3)]), ("c1", []))}
    racing = [c._replace(outputs=lambda name=c.name: results_of[name]) for c in (first, second)]
    case = dataclasses.replace(case, leaves=[], contestants=racing)
    measure.check_agreement(case)
    results_of["c1"] = [torch.ones(2), torch.ones(3)]
    with pytest.raises(RuntimeError, match="result 1 off by 1"):
        measure.check_agreement(case)


def test_memory_that_a_step_gives_back_is_not_seen():
    def step():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        second = torch.empty(3 << 20, dtype=torch.uint8)
        third = torch.empty(1 << 20, dtype=torch.uint8)
        del second
        return third

    assert peak_extra_bytes(step, torch.device("cpu")) == 4 << 20


def test_results_count_as_memory_held():
    def hold(x, size):
        torch.empty(size, dtype=torch.uint8)
        return x.sum()

    case = case_of(lambda x: hold(x, 1 << 16), lambda x: hold(x, 1 << 20))
    memory = Memory(kept_bytes=1 << 15, whole={"logits": 1 << 16}, reach=0.6, reach_peers={"c1": 0.01})
    case = dataclasses.replace(case, aims={FORWARD: Aim(memory=memory)})
    result = measure.run_case(case, rounds=1)
    found = result["measurements"][0]["memory"]
    assert 1 << 20 <= found["peak_extra_bytes"]["c1"] < 1.01 * (1 << 20)
    assert found["share_of"]["logits"]["share"] == pytest.approx(0.5, abs=0.01)
    text = report.table("op", result)
    assert "50.0 % of logits (65.5 kB) ≤ 60 % reached" in text
    assert "c1 1.05 MB (1/16  ≤ 1/100 missed)" in text


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_kl_peers_compute_other_things_on_a_gpu(uncompiled, monkeypatch):
    # in float32, because TRL's log-probs of bfloat16 logits are bfloat16 on a CPU
    monkeypatch.setattr(kl_rewards, "BFLOAT16", torch.float32)
    directions = set()
    for case in kl_rewards.gpu_cases(Settings(torch.device("cpu"), threads=1, quick=True)):
        assert {"torch", "torch.compile", *BACKENDS} <= {c.name for c in case.contestants} | set(case.left_out)
        case = dataclasses.replace(case, tolerance=1e-4, gradient_tolerance=None)
        measure.check_agreement(case)
        if BACKWARD in case.aims and not directions:
            directions = {m["direction"] for m in measure.run_case(case, rounds=1)["measurements"]}
    assert directions == {FORWARD, BACKWARD, BOTH}


def test_a_forward_case_keeps_a_graph(uncompiled):
    for case in kl_rewards.cpu_cases(Settings(torch.device("cpu"), threads=1, quick=True)):
        for contestant in case.contestants:
            with contestant.scope():
                assert contestant.forward().requires_grad == (BOTH in case.aims) == bool(case.leaves)


def test_targets_stand_for_sizes_that_they_were_not_set_for(uncompiled):
    for case in kl_rewards.cpu_cases(Settings(torch.device("cpu"), threads=2, quick=True)):
        assert not any(aim.reach or (aim.memory and aim.memory.reach) for aim in case.aims.values())


def test_matrix_products_are_missing_from_the_race(quick_run):
    cases = [case for case in ops_of(quick_run)["kl_rewards"]["cases"] if case["name"].startswith("hidden")]
    measurements = [m for case in cases for m in case["measurements"]]
    assert {m["direction"] for m in measurements} == {FORWARD, BOTH}
    for measurement in measurements:
        assert measurement["beside"] == [kl_rewards.GEMMS] and kl_rewards.GEMMS in measurement["ratio_to"]
        assert measurement["memory"]["peak_extra_bytes"][measurement["ours"]] > 0


@pytest.mark.skipif(backend("cpu") != "native", reason="plain torch holds float32 copies of its logits")
@pytest.mark.parametrize("estimator", ["k3", "full"])
def test_a_step_from_hidden_states_holds_the_logits(estimator):
    tokens, vocabulary, width = 2048, 32768, 16
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(tokens, width, generator=generator).bfloat16() for _ in range(2))
    weight = torch.randn(vocabulary, width, generator=generator).bfloat16()
    heads = (hidden, weight, ref_hidden, weight.flip(0), torch.arange(tokens))
    of_logits = kl_lines.from_hidden(kl_lines.plain_k3)
    whole = 2 * tokens * vocabulary
    assert peak_extra_bytes(lambda: kl_lines.fused_hidden(estimator)(*heads), torch.device("cpu")) <= 0.1 * whole
    assert peak_extra_bytes(lambda: of_logits(*heads), torch.device("cpu")) >= 2 * whole
