"""NeMo-RL's preference loss and KL by its names: equal to naive float64 formulas, and put in a stand-in's place."""

import doctest
import enum
import importlib.util
import math
import pickle
import sys
import types

import pytest
import torch

from preset_batches import responses
from rewardfuse.integrations import nemo_rl as ours
from rewardfuse.integrations._patching import HookChangedError

LOSS, UTILS = "nemo_rl.algorithms.loss.loss_functions", "nemo_rl.algorithms.utils"


def naive(rewards, mask, valid_seqs, beta=1.0):
    """(loss, gradient, metrics) in plain Python, pair by pair."""
    divisor = valid_seqs / 2 + 1e-8
    sums, gradient = dict.fromkeys(("loss", "accuracy", "rewards_chosen_mean", "rewards_rejected_mean"), 0.0), []
    for c, r, w, v in zip(rewards[::2], rewards[1::2], mask[::2], mask[1::2], strict=True):
        slope = 0.0
        if w:
            z = beta * (c - r)
            sums["loss"] += w * (math.log1p(math.exp(-abs(z))) + max(-z, 0))
            slope = -w * beta / (1 + math.exp(z)) / divisor
            sums["accuracy"] += w * (c > r)
            sums["rewards_chosen_mean"] += w * c
        if v:
            sums["rewards_rejected_mean"] += v * r
        gradient += [slope, -slope]
    metrics = {name: total / divisor for name, total in sums.items()}
    return metrics["loss"], gradient, {**metrics, "num_valid_samples": sum(mask) / 2}


def batch(rows=14, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    rewards = (3 * torch.randn(rows, generator=generator, dtype=torch.float64)).to(dtype)
    rewards[1] = rewards[0]  # a tie, which is no hit
    mask = torch.ones(rows)
    mask[4:6] = 0
    return rewards.requires_grad_(), mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("column", [False, True], ids=["[2B]", "[2B, 1]"])
@pytest.mark.parametrize("valid_seqs", [torch.tensor(40), torch.tensor(40.0, dtype=torch.float64), 40])
def test_loss_gradient_or_metric_differs_from_the_formula(valid_seqs, column, dtype):
    rewards, mask = batch(dtype=dtype)
    logits = rewards[:, None] if column else rewards
    data = {"sample_mask": mask}
    loss, metrics = ours.PreferenceLossFn()(
        logits=logits, data=data, global_valid_seqs=valid_seqs, global_valid_toks=None
    )
    expected, gradient, means = naive(rewards.double().tolist(), mask.tolist(), 40)
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert metrics == pytest.approx(means, rel=1e-6)
    assert all(type(value) is float for value in metrics.values())
    [found] = torch.autograd.grad(loss, rewards)
    close = 1e-2 if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(found.double(), torch.tensor(gradient).double(), rtol=close, atol=1e-7)


def test_micro_batches_do_not_add_up():
    rewards, mask = batch()
    loss_fn, valid = ours.PreferenceLossFn(), torch.tensor(12)
    whole, metrics = loss_fn(rewards, {"sample_mask": mask}, valid, None)
    parts = [loss_fn(rewards[rows], {"sample_mask": mask[rows]}, valid, None) for rows in (slice(0, 4), slice(4, 14))]
    assert sum(part.item() for part, _ in parts) == pytest.approx(whole.item(), rel=1e-6)
    for name, value in metrics.items():
        assert sum(part[name] for _, part in parts) == pytest.approx(value, rel=1e-6)


def test_masked_nan_reaches_loss_gradient_or_metric():
    rewards, mask = batch()
    expected = ours.PreferenceLossFn()(rewards, {"sample_mask": mask}, 12, None)
    with torch.no_grad():
        rewards[4:6] = math.nan
    loss, metrics = ours.PreferenceLossFn()(rewards, {"sample_mask": mask}, 12, None)
    assert loss == expected[0]
    assert metrics == expected[1]
    loss.backward()
    assert not rewards.grad.isnan().any()
    assert not rewards.grad[4:6].any()


def test_nothing_valid_divides_by_zero():
    rewards = torch.full((4,), math.nan, requires_grad=True)
    loss, metrics = ours.PreferenceLossFn()(rewards, {"sample_mask": torch.zeros(4)}, torch.tensor(0), None)
    loss.backward()
    assert loss.item() == 0
    assert set(metrics.values()) == {0.0}
    assert not rewards.grad.any()


def test_rows_in_another_order_make_other_pairs():
    rewards, mask = batch()
    order = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    data = {
        "sample_mask": mask[order],
        "pair_index": torch.arange(7).repeat_interleave(2)[order],
        "is_chosen": torch.tensor([True, False]).repeat(7)[order],
    }
    expected = ours.PreferenceLossFn()(rewards, {"sample_mask": mask}, 12, None)
    loss, metrics = ours.PreferenceLossFn()(rewards[order], data, 12, None)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert metrics == pytest.approx(expected[1], rel=1e-6)
    data["is_chosen"] = torch.ones(14, dtype=torch.bool)
    with pytest.raises(ValueError, match="one chosen and one rejected"):
        ours.PreferenceLossFn()(rewards[order], data, 12, None)
    with pytest.raises(ValueError, match="pair_index"):
        ours.PreferenceLossFn()(rewards[order], {**data, "pair_index": torch.arange(7)}, 12, None)


@pytest.mark.parametrize("rewards, mask", [(torch.zeros(3), torch.ones(3)), (torch.zeros(4), torch.ones(2))])
def test_rows_that_make_no_pairs_are_taken(rewards, mask):
    with pytest.raises(ValueError, match="logits"):
        ours.PreferenceLossFn()(rewards, {"sample_mask": mask}, 2, None)


TWO = {"sample_mask": torch.ones(2)}


@pytest.mark.parametrize(
    "call, error, name",
    [
        (lambda loss: loss([1.0, 2.0], TWO, 2, None), TypeError, "logits"),
        (lambda loss: loss(torch.zeros(2).long(), TWO, 2, None), TypeError, "logits"),
        (lambda loss: loss(torch.zeros(2), {}, 2, None), TypeError, "sample_mask"),
        (
            lambda loss: loss(torch.zeros(2), {"sample_mask": torch.tensor([1.0, -1.0])}, 2, None),
            ValueError,
            "sample_mask",
        ),
        (lambda loss: loss(torch.zeros(2), TWO, None, None), TypeError, "global_valid_seqs"),
        (lambda loss: loss(torch.zeros(2), TWO, -4, None), ValueError, "global_valid_seqs"),
        (lambda loss: loss(torch.zeros(2), TWO, torch.tensor(-4), None), ValueError, "global_valid_seqs"),
        (lambda loss: loss(torch.zeros(2), TWO, torch.ones(2), None), ValueError, "global_valid_seqs"),
        (
            lambda loss: loss(torch.zeros(2), {**TWO, "pair_index": [0, 0], "is_chosen": [1, 0]}, 2, None),
            TypeError,
            "pair_index",
        ),
        (lambda loss: ours.calculate_kl(torch.zeros(3), torch.zeros(4)), ValueError, "logprobs_reference"),
    ],
)
def test_argument_that_spoils_the_loss_is_taken_or_not_named(call, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        call(ours.PreferenceLossFn())


def test_loss_of_log_ratios_ignores_beta():
    rewards, mask = batch()
    loss, *_ = ours.PreferenceLossFn()._preference_loss(rewards, mask, torch.tensor(12), 0.1)
    assert loss.item() == pytest.approx(naive(rewards.tolist(), mask.tolist(), 12, beta=0.1)[0], rel=1e-6)


def test_loss_does_not_travel_to_a_worker():
    assert type(pickle.loads(pickle.dumps(ours.PreferenceLossFn()))) is ours.PreferenceLossFn
    assert ours.PreferenceLossFn.loss_type.value == "sequence_level"
    assert ours.PreferenceLossFn.input_type.value == "logit"


def test_enums_of_the_trainer_are_not_taken(monkeypatch):
    interfaces = types.ModuleType("nemo_rl.algorithms.loss.interfaces")
    interfaces.LossType, interfaces.LossInputType = (
        enum.Enum(name, {kind: kind.lower()})
        for name, kind in (("LossType", "SEQUENCE_LEVEL"), ("LossInputType", "LOGIT"))
    )
    for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interfaces.__name__, interfaces)
    spec = importlib.util.spec_from_file_location("a_second_copy", ours.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.PreferenceLossFn.loss_type is interfaces.LossType.SEQUENCE_LEVEL
    assert again.PreferenceLossFn.input_type is interfaces.LossInputType.LOGIT


# the KL


def naive_kl(x, kl_type, low, high):
    """(value, slope) of one token."""
    inside = low is None or abs(x) <= low
    x = x if inside else math.copysign(low, x)
    value = {"k1": x, "k2": x * x / 2, "k3": math.expm1(-x) + x}[kl_type]
    slope = {"k1": 1.0, "k2": x, "k3": -math.expm1(-x)}[kl_type]
    if high is not None and abs(value) > high:
        return math.copysign(high, value), 0.0
    return value, slope if inside else 0.0


@pytest.mark.parametrize("clamps", [(), (None, None), (5.0, None), (None, 3.0)])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_kl_or_gradient_differs_from_the_formula(kl_type, clamps):
    drawn = responses()
    policy, ref = drawn.logprobs.detach().double().requires_grad_(), drawn.ref.double()
    kl = ours.calculate_kl(policy, ref, kl_type, *clamps)
    kl.sum().backward()
    low, high = clamps or (20.0, 10.0)
    expected = [naive_kl(x, kl_type, low, high) for x in (policy - ref).flatten().tolist()]
    values, slopes = (torch.tensor(column, dtype=torch.float64).view(6, 24) for column in zip(*expected, strict=True))
    torch.testing.assert_close(kl, values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(policy.grad, slopes, rtol=1e-12, atol=1e-12)


def test_unknown_type_is_taken():
    with pytest.raises(ValueError, match="kl_type"):
        ours.calculate_kl(torch.zeros(2), torch.zeros(2), "k4")


# in NeMo-RL's place


class PreferenceLossFn:
    """A stand-in with the parameters of NeMo-RL's."""

    def __call__(self, logits, data, global_valid_seqs, global_valid_toks):
        raise AssertionError("not to be called")


def calculate_kl(logprobs, logprobs_reference, kl_type="k3", input_clamp_value=20.0, output_clamp_value=10.0):
    raise AssertionError("not to be called")


@pytest.fixture
def stand_in(monkeypatch):
    modules = {name: types.ModuleType(name) for name in (LOSS, UTILS, "nemo_rl.algorithms.rm")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules[LOSS].PreferenceLossFn = modules["nemo_rl.algorithms.rm"].PreferenceLossFn = PreferenceLossFn
    modules[UTILS].calculate_kl = modules[LOSS].calculate_kl = calculate_kl
    yield modules
    ours.uninstall()


def held(modules):
    return [vars(module).get(name) for module in modules.values() for name in ("PreferenceLossFn", "calculate_kl")]


def test_names_imported_before_stay_the_originals(stand_in):
    before = held(stand_in)
    ours.install()
    ours.install()
    mine = {PreferenceLossFn: ours.PreferenceLossFn, calculate_kl: ours.calculate_kl, None: None}
    assert held(stand_in) == [mine[value] for value in before]
    ours.uninstall()
    assert held(stand_in) == before


@pytest.mark.parametrize("where, name", [(LOSS, "PreferenceLossFn"), (UTILS, "calculate_kl")])
@pytest.mark.parametrize("change", ["other parameters", "gone"])
def test_changed_hook_is_half_installed(stand_in, where, name, change):
    if change == "gone":
        delattr(stand_in[where], name)
    else:
        other = type(name, (), {"__call__": lambda self, rewards: rewards})
        setattr(stand_in[where], name, other if where == LOSS else lambda logprobs: logprobs)
    before = held(stand_in)
    with pytest.raises(HookChangedError):
        ours.install()
    assert held(stand_in) == before


def test_documented_examples_are_wrong():
    result = doctest.testmod(ours)
    assert result.attempted >= 3
    assert not result.failed
