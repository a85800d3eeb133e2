"""OpenRLHF's pair losses: equal to the originals where these are right, right where they are not."""

import importlib.util
import inspect
import math
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

import oracles
from rewardfuse.integrations import openrlhf as ours

LOSSES = ["PairWiseLoss", "LogExpLoss"]


@pytest.fixture(scope="module")
def original():
    """OpenRLHF's ``models/loss.py`` by its path: the package itself imports deepspeed and peft at once."""
    package = importlib.util.find_spec("openrlhf")
    if package is None:
        pytest.skip("OpenRLHF is not installed: pip install --no-deps openrlhf==0.11.2")
    path = Path(package.submodule_search_locations[0]) / "models" / "loss.py"
    parent, utils = types.ModuleType("openrlhf_models"), types.ModuleType("openrlhf_models.utils")
    utils.masked_mean = None  # imported by the file, used by its policy losses alone
    spec = importlib.util.spec_from_file_location("openrlhf_models.loss", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"openrlhf_models": parent, "openrlhf_models.utils": utils}):
        spec.loader.exec_module(module)
    return module


def pairs(dtype=torch.float32, count=37):
    generator = torch.Generator().manual_seed(0)
    rewards = 2 * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return [side.to(dtype).requires_grad_() for side in rewards.unbind()]


def value_and_gradients(loss_fn, chosen, rejected, *margin):
    loss = loss_fn(chosen, rejected, *margin)
    return loss, *torch.autograd.grad(loss, (chosen, rejected))


@pytest.mark.parametrize("name", LOSSES)
def test_signature_differs_from_the_original(original, name):
    def parameters(module):
        return [(p.name, p.default) for p in inspect.signature(getattr(module, name)().forward).parameters.values()]

    assert parameters(ours) == parameters(original)


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
