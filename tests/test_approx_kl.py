"""approx_kl against the equations, on every backend that the machine has."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kl_oracles
import rewardfuse
from kl import (
    ESTIMATORS,
    GRADIENT_TOLERANCE,
    TOLERANCE,
    chooser,
    draw_estimators,
    draw_logprobs,
    dtype_of,
    poisoned,
    rounding,
    stored,
    within,
)
from pairs import DTYPES, assert_close, strided

SHAPES = [(), (1,), (0,), (7,), (64,), (3, 5), (2, 0), (2, 0, 0), (4, 1, 3), (2, 3, 17), (1000,)]
BAD = (torch.nan, torch.inf, -torch.inf)
estimators = pytest.mark.parametrize("estimator", ESTIMATORS)


def kl_of(x, backend, dtype=torch.float32, **options):
    """(kl, its gradient) of log-probs ``x`` above a reference of 0."""
    leaf = torch.as_tensor(x, dtype=dtype).to(backend.device, copy=True).requires_grad_()
    kl = rewardfuse.approx_kl(leaf, torch.zeros_like(leaf), **options)
    (gradient,) = torch.autograd.grad(kl.sum(), leaf)
    return kl.detach().cpu(), gradient.cpu()


def draw_weight(pick, shape, mask):
    """An importance weight: none, a number, one tensor for all, or one an item; the last two may want a gradient."""
    kind = pick(["none", "number", "one", "each", "each double"])
    if kind in ("none", "number"):
        return None if kind == "none" else 0.7
    if kind == "one":
        return torch.tensor(1.25, requires_grad=True)
    dtype = torch.float32 if kind == "each" else torch.float64
    return poisoned(pick, 2 * torch.rand(shape, dtype=dtype), mask).requires_grad_()


def assert_equations(backend, seed):
    """Value and gradients of one call, chosen by its seed, equal the oracle's."""
    pick = chooser(seed)
    dtype, shape = dtype_of(pick, backend), pick(SHAPES)
    mask = pick([None, torch.rand(shape) > 0.4])
    logprobs, ref = (poisoned(pick, t, mask) for t in draw_logprobs(pick, shape, dtype))
    weight = draw_weight(pick, shape, mask)
    options, exact = draw_estimators(pick)
    layout = pick(["contiguous", "transposed", "every second", "three strides"])

    on_device = [strided(t.to(backend.device, copy=True), layout) for t in (logprobs, ref)]
    leaf = on_device[0].requires_grad_()
    is_tensor = isinstance(weight, torch.Tensor)
    w = weight.detach().to(backend.device, copy=True).requires_grad_() if is_tensor else weight
    where = mask if mask is None else mask.to(backend.device)
    kl = rewardfuse.approx_kl(leaf, on_device[1], importance_weight=w, mask=where, **options)
    kl.sum().backward()

    expected = kl_oracles.approx_kl(
        logprobs.double().flatten().tolist(),
        ref.double().flatten().tolist(),
        importance_weight=(weight.detach().flatten().tolist() if weight.dim() else weight.item())
        if is_tensor
        else weight,
        mask=mask,
        **exact,
    )
    assert kl.dtype is (torch.float64 if dtype is torch.float64 else torch.float32) and kl.shape == shape
    slack = rounding(logprobs, ref, mask, dtype)
    assert_close(kl, expected["kl"], TOLERANCE[dtype] + slack, "kl")
    assert leaf.grad.dtype is dtype and leaf.grad.shape == shape
    gradient = within(expected["d_logprobs"], dtype)
    assert_close(leaf.grad, gradient, GRADIENT_TOLERANCE[dtype] + slack, "gradient")
    if is_tensor:
        d_weight = torch.tensor(expected["d_importance_weight"], dtype=torch.float64)
        size = max(1.0, d_weight.abs().sum().item())
        assert w.grad.dtype is w.dtype and w.grad.shape == w.shape
        d_weight = d_weight if w.dim() else d_weight.sum()
        assert_close(w.grad / size, d_weight / size, TOLERANCE[dtype] + slack + 5e-6, "d_importance_weight")


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_value_or_gradient_differs_from_the_equations(backend, seed):
    assert_equations(backend, seed)


@settings(max_examples=75)
@given(seed=st.integers(2**31, 2**32))
def test_value_or_gradient_differs_from_the_equations_in_more_cases(compiled_backend, seed):
    assert_equations(compiled_backend, seed)


def series(x, first):
    """sum over n >= 2 of (-x)^n / n!, or with ``first`` 1 the same from n = 1: right to float64 for |x| <= 1."""
    term, result = -x, torch.zeros_like(x)
    for n in range(2, 30):
        result = result + (term if n - 1 >= first else 0.0)
        term = term * -x / n
    return result


def both_signs(low, high, count):
    """Magnitudes spread evenly in their logarithm, of either sign."""
    magnitudes = torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)
    return torch.cat([magnitudes, -magnitudes])


def worst_in_ulp(actual, exact, dtype):
    """The largest error in units in the last place of the exact value."""
    _, exponent = torch.frexp(exact)
    ulp = torch.finfo(dtype).eps * 2.0 ** (exponent.double() - 1)
    return ((actual.double() - exact).abs() / ulp).max().item()


def test_k3_of_a_small_difference_loses_digits(backend):
    x = both_signs(1e-6, 1.0, 300 if backend.interpreted else 40_000).float()
    kl, gradient = kl_of(x, backend, estimator="k3")
    assert worst_in_ulp(kl, series(x.double(), 2), torch.float32) <= 8
    assert worst_in_ulp(gradient, -series(x.double(), 1), torch.float32) <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_k3_is_off_by_more_than_8_ulp_of_mpmath(backend, dtype):
    """From where k3 is subnormal to where it saturates, and around every |x| where the formula may change."""
    turns = [0.125, 0.25, 0.5, math.log(2), 1.0, 2.0]
    x = torch.cat(
        [
            both_signs(1e-18, 79.0, 60),
            torch.tensor(
                [s * t * f for t in turns for s in (1, -1) for f in (1 - 1e-7, 1.0, 1 + 1e-7)], dtype=torch.float64
            ),
        ]
    )
    x = x.to(dtype)
    with mpmath.workprec(400):
        points = [mpmath.mpf(value) for value in x.tolist()]
        exact = [
            torch.tensor([float(f(p)) for p in points], dtype=torch.float64)
            for f in (lambda p: mpmath.expm1(-p) + p, lambda p: -mpmath.expm1(-p))
        ]
    for actual, truth in zip(kl_of(x, backend, dtype, estimator="k3"), exact, strict=True):
        # The exact value is a float64 itself, half a unit off.
        assert worst_in_ulp(actual, truth, dtype) <= 8 + 0.5 * (dtype is torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_k3_overflows_or_has_a_slope_beyond_80_nats(backend, dtype):
    if backend.interpreted and dtype is torch.bfloat16:
        pytest.skip("the interpreter truncates where hardware rounds")
    low, high = -torch.finfo(dtype).max, torch.finfo(dtype).max
    beyond = [-80.5, -81.0, -89.0, -100.0, -720.0, -1e4, low]
    for gradient_estimator in (None, "k3"):
        kl, gradient = kl_of(beyond, backend, dtype, estimator="k3", gradient_estimator=gradient_estimator)
        assert_close(kl, [math.exp(80) - 81] * len(beyond), 1e-6, "saturated k3")
        assert (gradient == 0).all()
    kl, gradient = kl_of([-80.0, 100.0, 1e4, high], backend, dtype, estimator="k3")
    x = stored([-80.0, 100.0, 1e4, high], dtype).tolist()
    assert_close(kl, [math.exp(80) - 81, 99.0, x[2] - 1, x[3] - 1], 1e-5, "k3")
    assert_close(
        gradient, within([1 - math.exp(80), 1.0, 1.0, 1.0], dtype), GRADIENT_TOLERANCE[dtype] + 1e-5, "its slope"
    )  # −80 is still inside


@pytest.mark.parametrize("estimator", ["k1", "k2", "abs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_k1_k2_or_abs_overflows(backend, dtype, estimator):
    x = [1e4, -1e4] + [1e18, -1e18] * (dtype is not torch.float16)
    kl, gradient = kl_of(x, backend, dtype, estimator=estimator)
    expected = kl_oracles.approx_kl(stored(x, dtype).tolist(), [0.0] * len(x), estimator)
    assert kl.isfinite().all() and gradient.isfinite().all()
    assert_close(kl, expected["kl"], 1e-6, "kl")
    assert_close(gradient, within(expected["d_logprobs"], dtype), GRADIENT_TOLERANCE[dtype], "gradient")


@estimators
@pytest.mark.parametrize("gradient_estimator", [None, "k2"])
def test_a_masked_nan_reaches_a_value_or_a_gradient(backend, estimator, gradient_estimator):
    """Every mixture of NaN and infinities in the three inputs; a masked item gets no clamp's end either."""
    mask = (torch.arange(40) % 3 != 0).to(backend.device)
    clean = {name: torch.randn(40) for name in ("logprobs", "ref_logprobs", "importance_weight")}
    bad = torch.cartesian_prod(*[torch.tensor([0.5, *BAD])] * 3)[-14:]  # as many as there are masked items
    options = {"input_clamp": 2.0, "output_clamp": (0.25, 1.0), "mask": mask}
    results = []
    for spoil in (False, True):
        tensors = {name: t.to(backend.device, copy=True) for name, t in clean.items()}
        for t, values in zip(tensors.values(), bad.T, strict=True):
            t[~mask] = values.to(backend.device) if spoil else 0.0
        leaves = [tensors[name].requires_grad_() for name in ("logprobs", "importance_weight")]
        kl = rewardfuse.approx_kl(**tensors, **options, estimator=estimator, gradient_estimator=gradient_estimator)
        results.append((kl.detach(), *torch.autograd.grad(kl.sum(), leaves)))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right) and (right[~mask] == 0).all()


@estimators
@pytest.mark.parametrize("clamps", [{}, {"input_clamp": 1.0, "output_clamp": 1.0}], ids=["open", "clamps"])
def test_a_nan_leaves_its_item_or_is_clamped(backend, estimator, clamps):
    x = torch.tensor([0.5, torch.nan, -0.5])
    kl, gradient = kl_of(x, backend, estimator=estimator, **clamps)
    clean, clean_gradient = kl_of(x.nan_to_num(), backend, estimator=estimator, **clamps)
    assert kl.isnan().tolist() == [False, True, False]
    assert torch.equal(kl[::2], clean[::2]) and torch.equal(gradient[::2], clean_gradient[::2])


@estimators
def test_an_input_clamp_leaves_a_slope_outside_or_takes_one_at_its_boundary(backend, estimator):
    x = [-3.0, -2.0, -1.0, 1.0, 1.5, 1.75]
    kl, gradient = kl_of(x, backend, estimator=estimator, input_clamp=(-2.0, 1.5))
    inside, slope = kl_of([-2.0, -2.0, -1.0, 1.0, 1.5, 1.5], backend, estimator=estimator)
    assert torch.equal(kl, inside)
    slope[[0, 5]] = 0
    assert torch.equal(gradient, slope)


@estimators
def test_an_output_clamp_leaves_a_slope_outside_or_takes_one_at_its_boundary(backend, estimator):
    x = torch.tensor([-4.0, -2.0, -1.0, 0.5, 1.0, 2.0, 4.0])
    value, slope = kl_of(x, backend, estimator=estimator)
    for bound in (value[5].item(), value[1].item()):  # reached exactly at x = 2 and at x = -2
        low, high = min(bound, 0.25), max(bound, 0.25)
        kl, gradient = kl_of(x, backend, estimator=estimator, output_clamp=(low, high))
        assert torch.equal(kl, value.clamp(low, high))
        assert torch.equal(gradient, torch.where((value < low) | (value > high), 0.0, slope))
        assert (gradient == 0).any() and (gradient != 0).any()


@pytest.mark.parametrize("gradient_estimator", ESTIMATORS)
@estimators
def test_a_straight_through_slope_feels_a_clamp_or_the_value_estimator(backend, estimator, gradient_estimator):
    x = [-90.0, -5.0, -0.5, 0.0, 0.5, 5.0, 90.0]
    options = {"estimator": estimator, "gradient_estimator": gradient_estimator, "importance_weight": 3.0}
    kl, gradient = kl_of(x, backend, **options, input_clamp=0.75, output_clamp=(0.1, 0.2))
    weighted = [3 * kl_oracles.value(estimator, max(-0.75, min(0.75, v))) for v in x]
    assert_close(kl, [max(0.1, min(0.2, v)) for v in weighted], 1e-6, "kl")
    assert_close(gradient, [3 * kl_oracles.derivative(gradient_estimator, v) for v in x], 1e-6, "gradient")


def test_abs_has_a_slope_at_0(backend):
    _, gradient = kl_of([0.0, -0.0, 1e-30, -1e-30], backend, estimator="abs")
    assert gradient.tolist() == [0, 0, 1, -1]


@pytest.mark.parametrize("name", ["input_clamp", "output_clamp"])
def test_a_number_or_a_pair_is_another_clamp(backend, name):
    x = torch.tensor([-5.0, -1.0, 1.0, 5.0], device=backend.device)
    for clamp, expected in (
        (2.0, [-2, -1, 1, 2]),
        ((-2.0, 2.0), [-2, -1, 1, 2]),
        ((None, 2.0), [-5, -1, 1, 2]),
        ([-2.0, None], [-2, -1, 1, 5]),
        ((None, None), [-5, -1, 1, 5]),
        (None, [-5, -1, 1, 5]),
    ):
        assert rewardfuse.approx_kl(x, torch.zeros_like(x), **{name: clamp}).tolist() == expected


@estimators
def test_the_weight_comes_after_the_output_clamp_or_keeps_a_slope_beyond_it(backend, estimator):
    x = torch.tensor([2.0, 2.0, 2.0], device=backend.device)
    weight = torch.tensor([0.25, 1.0, 8.0], device=backend.device, requires_grad=True)
    value = kl_oracles.value(estimator, 2.0)
    kl = rewardfuse.approx_kl(
        x, torch.zeros_like(x), estimator=estimator, importance_weight=weight, output_clamp=(0.5 * value, 2 * value)
    )
    assert_close(kl, [0.5 * value, value, 2 * value], 1e-6, "kl")
    (gradient,) = torch.autograd.grad(kl.sum(), weight)
    assert_close(gradient, [0.0, value, 0.0], 1e-6, "d_importance_weight")


def test_the_slope_of_the_weight_is_of_the_unclamped_input(backend):
    x, weight = torch.tensor([-9.0, 9.0], device=backend.device), torch.ones(2, device=backend.device)
    kl = rewardfuse.approx_kl(
        x, torch.zeros_like(x), estimator="k2", input_clamp=3.0, importance_weight=weight.requires_grad_()
    )
    assert torch.autograd.grad(kl.sum(), weight)[0].tolist() == [4.5, 4.5]


def test_one_weight_for_all_gets_the_gradient_of_one_item(backend):
    leaf = torch.tensor(0.5, dtype=torch.float64, device=backend.device, requires_grad=True)
    x = torch.linspace(-2, 2, 301, dtype=torch.float64, device=backend.device)
    mask = torch.arange(301, device=backend.device) % 2 == 0
    kl = rewardfuse.approx_kl(x, torch.zeros_like(x), estimator="k3", importance_weight=leaf, mask=mask)
    (gradient,) = torch.autograd.grad(kl.sum(), leaf)
    assert gradient.shape == () and gradient.item() == pytest.approx(2 * kl.sum().item(), rel=1e-13)


@pytest.mark.parametrize("gradient_estimator", [None, "k3"])
def test_the_reference_gets_a_gradient(backend, gradient_estimator):
    logprobs, ref = (torch.randn(5, device=backend.device, requires_grad=True) for _ in "ab")
    options = {"estimator": "k2", "gradient_estimator": gradient_estimator}
    kl = rewardfuse.approx_kl(logprobs, ref, **options)
    assert torch.autograd.grad(kl.sum(), (logprobs, ref), allow_unused=True)[1] is None
    assert not rewardfuse.approx_kl(logprobs.detach(), ref, **options).requires_grad


def test_one_model_gives_a_k1_without_a_slope(backend):
    """Where policy and reference come from one tensor, only the policy's part has a gradient."""
    logprobs = torch.randn(5, device=backend.device, requires_grad=True)
    kl = rewardfuse.approx_kl(logprobs, logprobs, estimator="k1")
    assert (kl == 0).all() and torch.autograd.grad(kl.sum(), logprobs)[0].tolist() == [1] * 5


class TestIdentities:
    """Exact expectations on a small distribution, by enumeration: no sampling."""

    def model(self, backend):
        logits = torch.tensor([0.3, -1.2, 0.8, 0.0, -0.4], dtype=torch.float64, device=backend.device)
        ref = torch.tensor([-0.2, 0.5, 0.1, -1.0, 0.7], dtype=torch.float64, device=backend.device).log_softmax(-1)
        return logits.requires_grad_(), ref

    def kl(self, logprobs, ref):
        return (logprobs.exp() * (logprobs - ref)).sum()

    @pytest.mark.parametrize("estimator", ["k1", "k3"])
    def test_an_estimator_is_biased(self, backend, estimator):
        logits, ref = self.model(backend)
        logprobs = logits.detach().log_softmax(-1)
        expected = (logprobs.exp() * rewardfuse.approx_kl(logprobs, ref, estimator=estimator)).sum()
        torch.testing.assert_close(expected, self.kl(logprobs, ref), rtol=1e-13, atol=0)

    @pytest.mark.parametrize(
        ("options", "truth"),
        [
            ({"estimator": "k1"}, "nothing"),
            ({"estimator": "k2"}, "reverse"),
            ({"estimator": "k3"}, "forward"),
            ({"estimator": "k3", "gradient_estimator": "k2"}, "reverse"),
            ({"estimator": "k1", "gradient_estimator": "k2", "output_clamp": 0.01}, "reverse"),
        ],
        ids=str,
    )
    def test_a_gradient_follows_another_divergence(self, backend, options, truth):
        """As a loss, k1 has no gradient in expectation, k2 that of KL(pi, ref), k3 that of KL(ref, pi)."""
        logits, ref = self.model(backend)
        logprobs = logits.log_softmax(-1)
        probabilities = logprobs.detach().exp()
        (gradient,) = torch.autograd.grad(
            (probabilities * rewardfuse.approx_kl(logprobs, ref, **options)).sum(), logits
        )
        logprobs = logits.log_softmax(-1)
        divergence = {
            "nothing": 0.0 * logprobs.sum(),
            "reverse": self.kl(logprobs, ref),
            "forward": (ref.exp() * (ref - logprobs)).sum(),
        }[truth]
        (exact,) = torch.autograd.grad(divergence, logits)
        torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-15)
        assert truth == "nothing" or exact.abs().min() > 1e-3
