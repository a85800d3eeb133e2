"""How exact the SIMD maths is, measured through the ops over the whole range of a pair's logit."""

import doctest
import importlib

import pytest
import torch

import rewardfuse


def logits(dtype):
    """Densely spaced where exp and log turn, and down to where σ(−z) is subnormal."""
    wide = dtype is torch.float64
    top = 745.0 if wide else 103.0
    spread = torch.cat(
        [torch.linspace(-top, top, 100_001), torch.logspace(-30, 2, 20_001), -torch.logspace(-30, 2, 20_001)]
    )
    return spread.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_or_gradient_is_off_by_more_than_a_few_ulp(compiled_backend, dtype):
    z = logits(dtype).to(compiled_backend.device).requires_grad_()
    loss = rewardfuse.bradley_terry_loss(z, torch.zeros_like(z), reduction="none")
    loss.sum().backward()
    exact = z.detach().double().requires_grad_()
    exact_loss = -torch.nn.functional.logsigmoid(exact)
    exact_loss.sum().backward()
    info = torch.finfo(dtype)
    ulps = 4 if dtype is torch.float32 else 8  # in float64 the comparison errs as well
    for value, expected in ((loss, exact_loss), (z.grad, exact.grad)):
        error = (value.double() - expected).abs()
        allowed = ulps * info.eps * expected.abs() + 2 * info.smallest_normal * info.eps
        assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times what is allowed"


@pytest.mark.parametrize("n", [3, 100, 5000, 300_000])
def test_a_sum_overflows_or_drifts(compiled_backend, n):
    device = compiled_backend.device
    loss, stats = rewardfuse.bradley_terry_loss(
        torch.full((n,), -1e38, device=device), torch.full((n,), 2e38, device=device), return_stats=True
    )
    torch.testing.assert_close(loss.item(), 3e38, rtol=5e-6, atol=0)
    torch.testing.assert_close(stats.chosen.item(), -1e38, rtol=5e-6, atol=0)
    torch.testing.assert_close(stats.reward_margin.item(), -3e38, rtol=5e-6, atol=0)
    zeros = torch.zeros(n, device=device)
    torch.testing.assert_close(
        rewardfuse.bradley_terry_loss(zeros, zeros).item(), 0.6931471805599453, rtol=5e-6, atol=0
    )


def test_a_number_loses_digits_on_its_way_to_float64(backend):
    a = torch.zeros(3, dtype=torch.float64, device=backend.device)
    loss = rewardfuse.bradley_terry_loss(a, a, 0.1, weight=0.3, target=0.7, label_smoothing=0.01)
    t = 0.7 * 0.98 + 0.01
    z = torch.tensor(-0.1, dtype=torch.float64)
    expected = -0.3 * (t * torch.nn.functional.logsigmoid(z) + (1 - t) * torch.nn.functional.logsigmoid(-z))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)


@pytest.mark.parametrize("module", ["bradley_terry", "bradley_terry_tie"])
def test_a_docstring_example_does_not_run(native, module):
    result = doctest.testmod(importlib.import_module(f"rewardfuse.ops.{module}"), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.large
def test_more_than_2_31_pairs_overflow_an_index(compiled_backend):
    if compiled_backend.name == "reference" or compiled_backend.instruction_set == "baseline":
        pytest.skip("materializes [2^31] in float32, or takes minutes")
    n = 2**31 + 64
    chosen = torch.zeros(n, dtype=torch.bfloat16, device=compiled_backend.device)
    chosen[-64:] = 8.0  # only beyond 2^31
    rejected = torch.zeros((), dtype=torch.bfloat16, device=compiled_backend.device).expand(n)
    mask = torch.zeros((), dtype=torch.bool, device=compiled_backend.device).expand(n)
    loss = rewardfuse.bradley_terry_loss(chosen, rejected, reduction="sum")
    expected = 2**31 * 0.6931471805599453 + 64 * 3.353627e-4
    assert loss.item() == pytest.approx(expected, rel=5e-6)
    assert rewardfuse.bradley_terry_loss(chosen, rejected, mask=mask) == 0
    chosen.requires_grad_()
    torch.set_num_threads(2)
    rewardfuse.bradley_terry_loss(chosen, rejected, reduction="sum").backward()
    assert chosen.grad[0] == -0.5 and chosen.grad[-1].item() == pytest.approx(-3.352e-4, rel=1e-2)
