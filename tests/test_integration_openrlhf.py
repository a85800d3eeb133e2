"""OpenRLHF's losses, KL and rewards: equal to the originals where these are right, right where they are not."""

import doctest
import importlib.util
import inspect
import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import oracles
from preset_batches import BETA, CLOSE, responses, same_on_valid_tokens
from rewardfuse.integrations import openrlhf as ours
from rewardfuse.integrations._patching import HookChangedError

LOSSES = ["PairWiseLoss", "LogExpLoss"]
FUNCTIONS = ["compute_approx_kl", "compute_reward"]
ESTIMATORS = ["k1", "k2", "k3"]


@pytest.fixture(scope="module")
def modules():
    """OpenRLHF's ``models/utils.py`` and ``loss.py`` by their paths, under their names: the package itself imports
    peft at once, and deepspeed, of which nothing is called here."""
    package = importlib.util.find_spec("openrlhf")
    if package is None:
        pytest.skip("OpenRLHF is not installed: pip install --no-deps openrlhf==0.11.2")
    folder = Path(package.submodule_search_locations[0]) / "models"
    loaded = {}
    with pytest.MonkeyPatch.context() as patch:  # not patch.dict, which forgets what torch imports meanwhile
        for name in ("openrlhf", "openrlhf.models", "deepspeed"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        for name in ("openrlhf.models.utils", "openrlhf.models.loss"):
            spec = importlib.util.spec_from_file_location(name, folder / f"{name.split('.')[-1]}.py")
            loaded[name] = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, loaded[name])
            spec.loader.exec_module(loaded[name])
    return loaded


@pytest.fixture
def original(modules):
    return modules["openrlhf.models.loss"]


@pytest.fixture
def utils(modules):
    return modules["openrlhf.models.utils"]


@pytest.fixture
def batch():
    return responses()


def pairs(dtype=torch.float32, count=37):
    generator = torch.Generator().manual_seed(0)
    rewards = 2 * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return [side.to(dtype).requires_grad_() for side in rewards.unbind()]


def value_and_gradients(loss_fn, chosen, rejected, *margin):
    loss = loss_fn(chosen, rejected, *margin)
    return loss, *torch.autograd.grad(loss, (chosen, rejected))


@pytest.mark.parametrize("name", LOSSES + FUNCTIONS)
def test_signature_differs_from_the_original(original, utils, name):
    def parameters(module):
        function = getattr(module, name)
        signature = inspect.signature(function().forward if name in LOSSES else function)
        return [(p.name, p.default) for p in signature.parameters.values()]

    assert parameters(ours) == parameters(original if name in LOSSES else utils)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_or_gradient_differs_from_the_original(original, name, dtype):
    expected = value_and_gradients(getattr(original, name)(), *pairs(dtype))
    got = value_and_gradients(getattr(ours, name)(), *pairs(dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "margin",
    [torch.linspace(-1, 2, 37), torch.arange(37) % 4, torch.tensor(0.5), 0.5],
    ids=["float", "integer, as from a list of integers", "0-d", "number"],
)
def test_margin_counts_otherwise_than_in_the_original(original, margin):
    expected = value_and_gradients(original.PairWiseLoss(), *pairs(), margin)
    got = value_and_gradients(ours.PairWiseLoss(), *pairs(), margin)
    assert abs(got[0] - ours.PairWiseLoss()(*pairs())) > 0.1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_log_exp_loss_ignores_margin(original):
    chosen, rejected = pairs()
    margin = torch.linspace(-1, 2, 37)
    loss_fn = original.LogExpLoss()
    assert loss_fn(chosen, rejected, margin) == loss_fn(chosen, rejected)  # the defect that the docstring reports
    expected = oracles.bradley_terry(chosen.detach(), rejected.detach(), margin)["loss"]
    assert ours.LogExpLoss()(chosen, rejected, margin).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gap", [-1e30, -1e4, -100.0, -89.0, 20.0, 80.0, 1e30])
def test_wide_gap_overflows_or_rounds_to_zero(name, gap):
    chosen, rejected = torch.tensor([gap], requires_grad=True), torch.zeros(1, requires_grad=True)
    loss, d_chosen, d_rejected = value_and_gradients(getattr(ours, name)(), chosen, rejected)
    expected = oracles.bradley_terry([gap], [0.0])
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert d_chosen.item() == pytest.approx(expected["d_chosen"][0], rel=1e-6)
    assert d_rejected.item() == pytest.approx(expected["d_rejected"][0], rel=1e-6)


def test_docstring_reports_a_defect_that_the_original_no_longer_has(original):
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.full((1,), 100.0, requires_grad=True)
    loss, d_chosen, _ = value_and_gradients(original.LogExpLoss(), chosen, rejected)
    assert loss.item() == math.inf
    assert d_chosen.isnan().all()
    assert original.LogExpLoss()(torch.tensor([17.0]), torch.zeros(1)).item() == 0.0
    assert original.PairWiseLoss()(torch.zeros(0), torch.zeros(0)).isnan()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rewards_lose_more_than_the_original(original, name, dtype):
    chosen, rejected = pairs(dtype)
    exact = oracles.bradley_terry(chosen.detach().double(), rejected.detach().double())["loss"]
    loss, d_chosen, _ = value_and_gradients(getattr(ours, name)(), chosen, rejected)
    assert loss.dtype == torch.float32
    assert d_chosen.dtype == dtype
    assert abs(loss.item() - exact) <= abs(getattr(original, name)()(chosen, rejected).item() - exact)
    assert loss.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batch_is_nan(name):
    loss, d_chosen, _ = value_and_gradients(getattr(ours, name)(), *pairs(count=0))
    assert loss.item() == 0.0
    assert d_chosen.shape == (0,)


@pytest.mark.parametrize("name", LOSSES)
def test_margin_of_another_shape_broadcasts(name):
    with pytest.raises(ValueError, match="margin"):
        getattr(ours, name)()(*pairs(), torch.zeros(37, 1))


# the KL


def everywhere(batch):
    """The same responses, every token valid: the KL functions know no mask."""
    return SimpleNamespace(**{**vars(batch), "mask": torch.ones_like(batch.mask)})


@pytest.mark.parametrize("unbiased_gradient", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_or_its_gradient_differs_from_the_original(batch, utils, estimator, unbiased_gradient):
    old = batch.logprobs.detach() - 3 * batch.weights  # ratios from 1e-4 to 1e4, far beyond the bound of 10
    options = {"kl_estimator": estimator, "unbiased_gradient": unbiased_gradient}
    for log_probs_old in (None, old):
        arguments = (batch.logprobs, batch.ref, log_probs_old)
        got, expected = (module.compute_approx_kl(*arguments, **options) for module in (ours, utils))
        same_on_valid_tokens(everywhere(batch), got, expected)


def test_ratio_is_not_bounded_as_in_the_original(utils):
    log_probs = torch.tensor([-1.0], requires_grad=True)
    kl = ours.compute_approx_kl(log_probs, torch.tensor([-3.0]), torch.tensor([-50.0]), unbiased_gradient=True)
    kl.backward()
    assert log_probs.grad.item() == pytest.approx(utils.KL_IS_WEIGHT_CLIP * 2)


def test_ratio_counts_without_the_unbiased_gradient(batch):
    plain = ours.compute_approx_kl(batch.logprobs, batch.ref)
    with_old = ours.compute_approx_kl(batch.logprobs, batch.ref, batch.ref)
    for a, b in zip(*((kl, torch.autograd.grad(kl.sum(), batch.logprobs)[0]) for kl in (plain, with_old)), strict=True):
        assert torch.equal(a, b)


def test_old_log_probs_of_another_shape_broadcast(batch):
    with pytest.raises(ValueError, match="log_probs_old"):
        ours.compute_approx_kl(batch.logprobs, batch.ref, batch.ref[0], unbiased_gradient=True)


def test_float64_is_cut_to_float32(batch, utils):
    doubles = [x.detach().double() for x in (batch.logprobs, batch.ref)]
    assert utils.compute_approx_kl(*doubles).dtype is torch.float32  # as the docstring says
    kl = ours.compute_approx_kl(*doubles, doubles[1], "k3", True)
    assert kl.dtype is torch.float64
    exact = utils.compute_approx_kl(*doubles, kl_estimator="k3").double()
    torch.testing.assert_close(kl, exact, rtol=1e-5, atol=1e-5)


def test_unknown_estimator_is_taken(batch):
    with pytest.raises(ValueError, match="kl_estimator"):
        ours.compute_approx_kl(batch.logprobs, batch.ref, kl_estimator="k4")


# the rewards


@pytest.mark.parametrize("clip", [None, (-10.0, 10.0), [-1, 2]], ids=["no clip", "clip", "a list"])
@pytest.mark.parametrize("kl_coef", [BETA, 0.0, -1.0])
def test_reward_differs_from_the_original(batch, utils, kl_coef, clip):
    kl, scores = (batch.logprobs - batch.ref), batch.scores.clone().requires_grad_()
    arguments = (scores, kl_coef, kl, batch.mask.long(), clip)
    rewards = [module.compute_reward(*arguments) for module in (ours, utils)]
    torch.testing.assert_close(rewards[0][batch.mask], rewards[1][batch.mask], **CLOSE)
    totals = [(batch.weights * reward)[batch.mask].sum() for reward in rewards]
    found = [torch.autograd.grad(total, (batch.logprobs, scores), retain_graph=True) for total in totals]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_masked_nan_reaches_a_reward_or_a_gradient(batch, utils):
    kl = (batch.logprobs - batch.ref).detach()
    clean = ours.compute_reward(batch.scores, BETA, kl, batch.mask)
    kl[~batch.mask] = math.nan
    assert utils.compute_reward(batch.scores, BETA, kl, batch.mask).isnan().any()  # as the docstring says
    kl.requires_grad_()
    rewards = ours.compute_reward(batch.scores, BETA, kl, batch.mask)
    assert torch.equal(rewards, clean)
    assert not rewards[~batch.mask].any()
    rewards.sum().backward()
    assert torch.equal(kl.grad, torch.where(batch.mask, -BETA, 0.0))


def test_score_of_an_empty_response_is_paid(batch, utils):
    batch.mask[3] = False
    batch.scores[3] = math.nan  # not even read
    kl = torch.ones(6, 24)
    assert utils.compute_reward(batch.scores, BETA, kl, batch.mask)[3, -1].isnan()  # as the docstring says
    rewards = ours.compute_reward(batch.scores, BETA, kl, batch.mask)
    assert not rewards[3].any()
    assert not rewards.isnan().any()


def test_infinite_kl_counts_without_a_coefficient(utils):
    kl, mask = torch.tensor([[math.inf, 1.0]]), torch.ones(1, 2)
    assert utils.compute_reward(torch.ones(1), 0.0, kl, mask).isnan().any()  # 0·inf
    assert ours.compute_reward(torch.ones(1), 0.0, kl, mask).tolist() == [[0.0, 1.0]]


def test_what_the_annotations_promise_is_refused(batch, utils):
    kl = (batch.logprobs - batch.ref).detach()
    table = ours.compute_reward(batch.scores, BETA, kl, batch.mask, (-5, 5))
    rows = ours.compute_reward(batch.scores, BETA, list(kl), list(batch.mask), (-5, 5))
    assert isinstance(rows, list)
    assert all(torch.equal(a, b) for a, b in zip(rows, table, strict=True))
    one = ours.compute_reward(2.0, BETA, kl, batch.mask)
    assert torch.equal(one, ours.compute_reward(torch.full((6,), 2.0), BETA, kl, batch.mask))
    assert torch.equal(ours.compute_reward(2.0, BETA, kl), ours.compute_reward(2.0, BETA, kl, torch.ones(6, 24)))
    ragged = ours.compute_reward(torch.tensor([3, 4]), 0.5, [torch.ones(3), torch.ones(1)])
    assert [row.tolist() for row in ragged] == [[-0.5, -0.5, 2.5], [3.5]]
    assert ours.compute_reward(torch.zeros(0), 0.5, []) == []
    for arguments in (
        (batch.scores, BETA, list(kl), batch.mask),
        (2.0, BETA, kl, batch.mask),
        (batch.scores, BETA, kl),
    ):
        with pytest.raises((TypeError, AttributeError)):
            utils.compute_reward(*arguments)


def test_a_list_loses_its_last_responses():
    with pytest.raises(ValueError, match="as many"):
        ours.compute_reward(torch.zeros(2), 0.1, [torch.zeros(2)] * 3)
    with pytest.raises(ValueError, match="as many"):
        ours.compute_reward(torch.zeros(2), 0.1, [torch.zeros(2)] * 2, [torch.ones(2)])


def test_clip_without_a_range_is_not_named():
    with pytest.raises(ValueError, match="reward_clip_range"):
        ours.compute_reward(torch.zeros(1), 0.1, torch.zeros(1, 2), torch.ones(1, 2), (3.0, -3.0))


@pytest.mark.parametrize("r", [0.1, 1001, torch.tensor([1001]), torch.tensor([100000])], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_score_is_rounded_to_sixteen_bits(r, dtype):
    reward = ours.compute_reward(r, 0.0, torch.zeros(1, 2, dtype=dtype))
    assert reward.dtype is torch.float32
    assert reward[0, 1].item() == torch.as_tensor(r, dtype=torch.float32).item()


def test_score_of_a_response_goes_to_every_token():
    kl = torch.zeros(2, 3)
    for r in (torch.ones(2, 3), torch.ones(2, 1), torch.tensor(1.0), torch.ones(3)):
        with pytest.raises(ValueError, match=r"^r: expected"):
            ours.compute_reward(r, 0.1, kl)
    with pytest.raises(ValueError, match=r"^r: expected"):
        ours.compute_reward(torch.ones(3), 0.1, [])
    with pytest.raises(ValueError, match=r"^kl: expected"):
        ours.compute_reward(torch.ones(3), 0.1, torch.zeros(3))


KL = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call, error, name",
    [
        (lambda: ours.PairWiseLoss()([1.0], torch.zeros(1)), TypeError, "chosen_reward"),
        (lambda: ours.PairWiseLoss()(torch.zeros(3), torch.zeros(4)), ValueError, "reject_reward"),
        (lambda: ours.PairWiseLoss()(torch.zeros(3), torch.zeros(3).double()), TypeError, "reject_reward"),
        (lambda: ours.PairWiseLoss()(*torch.zeros(2, 3), torch.zeros(4)), ValueError, "margin.* chosen_reward"),
        (lambda: ours.compute_approx_kl(KL, KL[0]), ValueError, "log_probs_base.* log_probs"),
        (lambda: ours.compute_approx_kl(KL, None), TypeError, "log_probs_base"),
        (lambda: ours.compute_approx_kl(KL, KL, [0.0], "k1", True), TypeError, "log_probs_old"),
        (lambda: ours.compute_reward([1.0, 2.0], 0.1, KL), TypeError, "r:"),
        (lambda: ours.compute_reward(None, 0.1, KL), TypeError, "r:"),
        (lambda: ours.compute_reward(1.0, 0.1, None), TypeError, "kl:"),
        (lambda: ours.compute_reward(1.0, 0.1, KL.long()), TypeError, "kl:"),
        (lambda: ours.compute_reward(1.0, 0.1, [[0.0]]), TypeError, "kl:"),
        (lambda: ours.compute_reward(1.0, "a", KL), TypeError, "kl_coef"),
        (lambda: ours.compute_reward(1.0, None, KL), TypeError, "kl_coef"),
        (lambda: ours.compute_reward(1.0, 0.1, KL, [1, 2]), TypeError, "action_mask"),
        (lambda: ours.compute_reward(1.0, 0.1, KL, KL[:, :2]), ValueError, "action_mask.* kl"),
        (lambda: ours.compute_reward(1.0, 0.1, KL, None, 5.0), TypeError, "reward_clip_range"),
        (lambda: ours.compute_reward(1.0, 0.1, KL, None, KL[0]), TypeError, "reward_clip_range"),
    ],
)
def test_argument_is_named_otherwise_than_by_the_trainer(call, error, name):
    with pytest.raises(error, match=f"^{name}"):
        call()


# in OpenRLHF's place


@pytest.fixture
def in_place(modules, monkeypatch):
    """OpenRLHF's two modules among the loaded ones, and two that imported from them by name."""
    loss, utils = modules["openrlhf.models.loss"], modules["openrlhf.models.utils"]
    models, maker = (types.ModuleType(f"openrlhf.{name}") for name in ("models", "trainer.ppo_utils.experience_maker"))
    models.PairWiseLoss, models.LogExpLoss = loss.PairWiseLoss, loss.LogExpLoss
    maker.compute_approx_kl, maker.compute_reward = utils.compute_approx_kl, utils.compute_reward
    for module in (types.ModuleType("openrlhf"), loss, utils, models, maker):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield SimpleNamespace(loss=loss, utils=utils, models=models, maker=maker)
    ours.uninstall()


def held(where):
    """What all those modules hold under the names that are replaced."""
    pairs = [(where.loss, LOSSES), (where.models, LOSSES), (where.utils, FUNCTIONS), (where.maker, FUNCTIONS)]
    return [getattr(module, name) for module, names in pairs for name in names]


def test_names_imported_before_stay_the_originals(in_place, monkeypatch):
    before = held(in_place)
    ours.install()
    ours.install()
    losses, functions = ([getattr(ours, name) for name in names] for names in (LOSSES, FUNCTIONS))
    assert held(in_place) == losses * 2 + functions * 2
    later = types.ModuleType("openrlhf.later")
    later.PairWiseLoss = in_place.models.PairWiseLoss
    monkeypatch.setitem(sys.modules, later.__name__, later)
    ours.uninstall()
    assert held(in_place) == before
    assert later.PairWiseLoss is in_place.loss.PairWiseLoss


@pytest.mark.parametrize("module, name", [("utils", "compute_reward"), ("loss", "LogExpLoss")])
def test_changed_hook_is_half_installed(in_place, module, name):
    class Changed(torch.nn.Module):
        def forward(self, chosen_reward):
            return chosen_reward

    with mock.patch.object(getattr(in_place, module), name, Changed if name in LOSSES else lambda r, kl: r):
        before = held(in_place)
        with pytest.raises(HookChangedError, match=r"takes \(.*\), expected \("):
            ours.install()
        assert held(in_place) == before


def test_missing_hook_is_passed_over(in_place):
    with mock.patch.object(in_place.utils, "compute_reward"):
        del in_place.utils.compute_reward
        with pytest.raises(HookChangedError, match="compute_reward"):
            ours.install()
        in_place.utils.compute_reward = None  # for mock to take away


def test_untested_version_is_not_reported(in_place):
    with (
        mock.patch("importlib.metadata.version", return_value="0.12.0"),
        pytest.warns(UserWarning, match=r"openrlhf 0\.11, but openrlhf 0\.12\.0"),
    ):
        ours.install()


def test_documented_examples_are_wrong():
    result = doctest.testmod(ours)
    assert result.attempted >= 5
    assert not result.failed
