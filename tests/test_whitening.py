"""masked_whiten against the equations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kl_oracles
import rewardfuse
from pairs import DTYPES, assert_close, strided

SHAPES = [(), (1,), (0,), (7,), (64,), (3, 5), (2, 0), (4, 1, 3)]


@settings(max_examples=60)
@given(data=st.data())
def test_value_differs_from_the_equations(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(DTYPES))
    scale, offset = data.draw(st.sampled_from([(1.0, 0.0), (1e-3, 0.0), (100.0, 7.0), (1.0, 1000.0)]))
    shift_mean = data.draw(st.booleans())
    mask = data.draw(st.sampled_from([None, torch.rand(shape) > 0.4, torch.rand(shape) > 0.9]))
    values = (torch.randn(shape, dtype=torch.float64) * scale + offset).to(dtype)
    if mask is not None:
        values = torch.where(mask, values, data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf])))
    layout = data.draw(st.sampled_from(["contiguous", "transposed", "every second", "three strides"]))
    result = rewardfuse.masked_whiten(strided(values, layout), mask, shift_mean=shift_mean)
    flat_mask = None if mask is None else mask.flatten().tolist()
    expected = kl_oracles.masked_whiten(values.double().flatten().tolist(), flat_mask, shift_mean)
    assert result.shape == shape and result.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    # Values near 1000 leave 13 digits of their differences, which a small variance magnifies.
    assert_close(result, expected, 1e-10 if dtype is torch.float64 else 1e-6, "whitened")


def test_the_variance_is_biased_or_the_mean_is_lost():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 50.0])
    mask = torch.tensor([True, True, True, True, False])
    for shift_mean, mean in ((True, 0.0), (False, 2.5)):
        valid = rewardfuse.masked_whiten(values, mask, shift_mean)[mask]
        assert valid.mean().item() == pytest.approx(mean, abs=1e-6)
        assert valid.var(unbiased=True).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_masked_nan_reaches_a_value_or_a_gradient(bad, shift_mean):
    mask, values = torch.tensor([True, False, True, True, False]), torch.randn(5)
    results = []
    for fill in (0.0, bad):
        leaf = torch.where(mask, values, fill).requires_grad_()
        result = rewardfuse.masked_whiten(leaf, mask, shift_mean)
        results.append((result.detach(), *torch.autograd.grad((result * torch.arange(5)).sum(), leaf)))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right) and (right[~mask] == 0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("valid", [0, 1])
def test_one_or_no_valid_value_gives_nan(valid, shift_mean):
    leaf = torch.tensor([3.0, torch.nan, torch.inf], requires_grad=True)
    mask = torch.tensor([valid == 1, False, False])
    result = rewardfuse.masked_whiten(leaf, mask, shift_mean)
    assert result.tolist() == [3.0 if valid and not shift_mean else 0.0, 0, 0]
    assert torch.autograd.grad(result.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_fails(masked, shift_mean):
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4) > 0.3 if masked else None
    torch.autograd.gradcheck(lambda v: rewardfuse.masked_whiten(v, mask, shift_mean), values)


def test_equal_values_give_nan():
    leaf = torch.full((4,), 2.0, requires_grad=True)
    result = rewardfuse.masked_whiten(leaf)
    assert result.tolist() == [0] * 4 and torch.autograd.grad(result.square().sum(), leaf)[0].isfinite().all()


def test_the_input_is_written_to_or_a_large_offset_costs_digits():
    values = torch.randn(1000) + 4096
    before = values.clone()
    result = rewardfuse.masked_whiten(values)
    exact = values.double()
    torch.testing.assert_close(result, ((exact - exact.mean()) / exact.std()).float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(values, before)


def test_a_graph_breaks():
    torch._dynamo.reset()
    compiled = torch.compile(rewardfuse.masked_whiten, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 9):
        values, mask = torch.randn(3, n), torch.rand(3, n) > 0.3
        torch.testing.assert_close(compiled(values, mask), rewardfuse.masked_whiten(values, mask))
