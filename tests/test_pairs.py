"""The contract of every op on pairs (Bradley–Terry, Rao–Kupper, Davidson), on every backend that the machine has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rewardfuse
from pairs import DTYPES, GRADIENT_TOLERANCE, OPS, TOLERANCE, assert_close, strided, to_device

op_cases = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
SHAPES = [(), (1,), (0,), (7,), (64,), (3, 5), (2, 0), (2, 0, 0), (4, 1, 3), (2, 3, 17)]


@op_cases
@settings(max_examples=60)
@given(data=st.data())
def test_value_or_gradient_differs_from_the_equations(op, backend, data):
    shape = data.draw(st.sampled_from(SHAPES))
    dtype = data.draw(st.sampled_from(DTYPES))
    if backend.interpreted and dtype is torch.bfloat16:
        dtype = torch.float32  # the interpreter truncates where hardware rounds
    scale = data.draw(st.sampled_from([1.0, 10.0, 100.0]))
    layout = data.draw(st.sampled_from(["contiguous", "transposed", "every second", "three strides"]))
    reduction = data.draw(st.sampled_from(["none", "sum", "mean"]))
    tensors, options = op.draw(data.draw, shape, dtype)
    normalizer = data.draw(st.sampled_from([None, 3.0, torch.tensor(5.0)])) if reduction == "mean" else None
    a, b = (strided((torch.randn(shape) * scale).to(dtype).to(backend.device), layout).requires_grad_() for _ in "ab")
    arguments = to_device({**tensors, "normalizer": normalizer}, backend.device)
    arguments = {k: strided(v, layout) if torch.is_tensor(v) and v.shape == shape else v for k, v in arguments.items()}
    p = arguments.get(op.names[2])
    if isinstance(p, torch.Tensor):
        arguments[op.names[2]] = p = p.detach().requires_grad_()
    loss = op.function(a, b, **arguments, **options, reduction=reduction)
    loss.sum().backward()

    numbers = {k: v.detach().tolist() if isinstance(v, torch.Tensor) else v for k, v in {**arguments}.items()}
    expected = op.oracle(a.tolist(), b.tolist(), numbers, {**options, "reduction": reduction})
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert loss.shape == (shape if reduction == "none" else ())
    tolerance = TOLERANCE[dtype]
    assert_close(loss, expected["loss"], tolerance, "loss")
    for tensor, name in ((a, op.names[0]), (b, op.names[1])):
        assert tensor.grad.dtype is dtype
        assert_close(tensor.grad, expected[f"d_{name}"], GRADIENT_TOLERANCE[dtype], f"d_{name}")
    if isinstance(p, torch.Tensor):
        d_p = torch.tensor(expected[f"d_{op.names[2]}"], dtype=torch.float64)
        assert p.grad.shape == p.shape
        size = max(1.0, d_p.abs().sum().item())
        p_tolerance = max(tolerance, GRADIENT_TOLERANCE[p.dtype])
        assert_close(p.grad / size, (d_p if p.dim() else d_p.sum()) / size, p_tolerance, f"d_{op.names[2]}")


@op_cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_rewards_overflow_or_lose_the_tail(op, backend, dtype):
    top = torch.finfo(dtype).max
    gaps = torch.tensor([0.0, 1e-3, 20.0, 89.0, 104.0, 1e4, top / 4, top / 2], dtype=dtype)
    a = torch.cat([gaps, -gaps]).to(backend.device).requires_grad_()
    b = torch.zeros_like(a).requires_grad_()
    for outcome in (1.0,) if op.name == "bradley_terry" else (1.0, 0.5, 0.0):
        options = {} if op.name == "bradley_terry" else {"outcome": outcome, "log_tie": 0.5}
        a.grad = None
        loss = op.function(a, b, **options, reduction="none")
        loss.sum().backward()
        expected = op.oracle(a.tolist(), b.tolist(), options, {"reduction": "none"})
        assert loss.isfinite().all() and a.grad.isfinite().all()
        assert_close(loss, expected["loss"], TOLERANCE[dtype], "loss")
        assert_close(a.grad, expected[f"d_{op.names[0]}"], GRADIENT_TOLERANCE[dtype], "gradient")


def test_halves_of_the_largest_float_overflow(backend):
    top = torch.tensor([3e38, -3e38], device=backend.device)
    loss = rewardfuse.bradley_terry_loss(top, -top, beta=0.1, reduction="none")
    assert_close(loss, [0.0, 6e37], 1e-6, "loss")
    loss = rewardfuse.bradley_terry_loss(top, top, center_rewards_coefficient=0.0, reduction="none")
    assert_close(loss, [0.6931471805599453] * 2, 1e-6, "loss")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how", ["mask", "weight"])
@op_cases
def test_nan_in_a_masked_or_weightless_place_leaks(op, backend, how, bad):
    n = 40
    live = torch.arange(n) % 3 != 0
    plain = {k: v.expand(n).clone() for k, v in op.plain((n,)).items()}
    a, b = torch.randn(n), torch.randn(n)
    poisoned = [torch.where(live, t, bad) for t in (a, b, *plain.values())]
    where = {"mask": live} if how == "mask" else {"weight": live.float()}
    for reduction in ("none", "sum", "mean"):
        clean = [t.clone().to(backend.device).requires_grad_(i < 2) for i, t in enumerate((a, b, *plain.values()))]
        dirty = [t.clone().to(backend.device).requires_grad_(i < 2) for i, t in enumerate(poisoned)]
        results = []
        for tensors in (clean, dirty):
            named = dict(zip(plain, tensors[2:], strict=True))
            loss = op.function(*tensors[:2], **named, **to_device(where, backend.device), reduction=reduction)
            loss.sum().backward()
            results.append((loss.detach(), tensors[0].grad, tensors[1].grad))
        for left, right in zip(*results, strict=True):
            assert torch.equal(left, right)
        assert (results[1][1].cpu()[~live] == 0).all()


def test_stats_differ_from_the_equations_or_count_what_does_not_count(backend):
    import oracles

    chosen = torch.tensor([1.0, 2.0, torch.nan, 3.0, torch.inf], device=backend.device)
    rejected = torch.tensor([0.0, 2.0, 1.0, 4.0, 0.0], device=backend.device)
    mask = torch.tensor([True, True, False, True, True], device=backend.device)
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0], device=backend.device)
    loss, stats = rewardfuse.bradley_terry_loss(chosen, rejected, mask=mask, weight=weight, return_stats=True)
    expected = oracles.bradley_terry(chosen, rejected, mask=mask, weight=weight)
    assert_close(loss, expected["loss"], 1e-6, "loss")
    for name, value in stats._asdict().items():
        assert value.dim() == 0 and value.device.type == backend.device and not value.requires_grad
        assert_close(value, expected[name], 1e-6, name)


@op_cases
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_nothing_valid_gives_nan_or_a_gradient(op, backend, reduction):
    for shape, mask in (((0,), None), ((5,), torch.zeros(5, dtype=torch.bool)), ((2, 0, 3), None)):
        a, b = (torch.randn(shape, device=backend.device, requires_grad=True) for _ in "ab")
        mask = mask if mask is None else mask.to(backend.device)
        loss = op.function(a, b, **to_device(op.plain(shape), backend.device), mask=mask, reduction=reduction)
        loss.sum().backward()
        assert (loss == 0).all() and (a.grad == 0).all() and (b.grad == 0).all()
    if op.name == "bradley_terry":
        _, stats = rewardfuse.bradley_terry_loss(a, b, return_stats=True)
        assert all(value == 0 for value in stats)


@op_cases
def test_inputs_are_written_to(op, backend):
    a, b = (torch.randn(100, device=backend.device, requires_grad=True) for _ in "ab")
    arguments = to_device(
        {**op.plain((100,)), "weight": torch.rand(100), "mask": torch.rand(100) > 0.5}, backend.device
    )
    tensors = [a, b, *arguments.values()]
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    op.function(a, b, **arguments).backward()
    assert all(torch.equal(x, y) for x, y in zip(before, tensors, strict=True))
    assert versions == [t._version for t in tensors]


@op_cases
def test_expanded_inputs_or_stride_0_grad_output_are_misread(op, backend):
    a = torch.randn(1, 6, device=backend.device, requires_grad=True)
    b = torch.randn(4, 1, device=backend.device, requires_grad=True)
    grad = torch.tensor(0.5, device=backend.device).expand(4, 6)
    plain = to_device(op.plain((4, 6)), backend.device)
    op.function(a.expand(4, 6), b.expand(4, 6), **plain, reduction="none").backward(grad)
    first = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    dense = op.function(a.expand(4, 6).contiguous(), b.expand(4, 6).contiguous(), **plain, reduction="none")
    dense.backward(grad.contiguous())
    torch.testing.assert_close(first, (a.grad, b.grad), rtol=1e-6, atol=1e-7)


@op_cases
def test_the_number_of_threads_changes_the_bits(op, compiled_backend):
    n = 100_003
    a, b = (torch.randn(n, device=compiled_backend.device, requires_grad=True) for _ in "ab")
    plain = to_device(op.plain((n,)), compiled_backend.device)
    p = plain.get("log_tie", torch.tensor(0.1)).to(compiled_backend.device).requires_grad_()
    results = []
    for threads in (1, 2, 2, 1):
        if compiled_backend.name == "reference" and threads == 2:
            continue  # torch's own sums; each thread count repeats, but they differ
        torch.set_num_threads(threads)
        a.grad = b.grad = p.grad = None
        loss = op.function(a, b, **{**plain, op.names[2]: p})
        loss.backward()
        results.append((loss.detach(), a.grad, b.grad, p.grad))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@op_cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_error_on_16_bit_inputs_exceeds_plain_torch(op, compiled_backend, dtype):
    n = 4000
    a, b = ((torch.randn(n) * 4).to(dtype).to(compiled_backend.device) for _ in "ab")
    options = {} if op.name == "bradley_terry" else {"outcome": 1.0, "log_tie": 0.25}
    exact = torch.tensor(op.oracle(a.tolist(), b.tolist(), options, {"reduction": "none"})["loss"], dtype=torch.float64)

    def error(loss):
        return (loss.double().cpu() - exact).abs().max()

    torch_loss = torch.nn.functional.softplus(options.get("log_tie", 0.0) - (a - b))
    if op.name == "davidson":
        half = (a - b) / 2
        torch_loss = torch.logsumexp(torch.stack([half, -half, torch.full_like(half, 0.25)]), 0) - half
    assert error(op.function(a, b, **options, reduction="none")) <= error(torch_loss)


def test_bradley_terry_identities_fail(backend):
    a, b, shift = torch.randn(50), torch.randn(50), 3.0
    a, b = a.double().to(backend.device), b.double().to(backend.device)
    loss = rewardfuse.bradley_terry_loss(a, b, reduction="none")
    swapped = rewardfuse.bradley_terry_loss(b, a, target=0.0, reduction="none")
    torch.testing.assert_close(loss, swapped)  # antisymmetry
    torch.testing.assert_close(loss, rewardfuse.bradley_terry_loss(a + shift, b + shift, reduction="none"))
    other = rewardfuse.bradley_terry_loss(b, a, reduction="none")
    torch.testing.assert_close((-loss).exp() + (-other).exp(), torch.ones_like(loss))
    torch.testing.assert_close(rewardfuse.bradley_terry_log_prob(a, b), -loss)
    tied = rewardfuse.bradley_terry_tie_loss(a, b, 1.0, log_tie=0.0, reduction="none")
    torch.testing.assert_close(loss, tied)  # Rao–Kupper without ties is Bradley–Terry


@pytest.mark.parametrize("model", ["rao_kupper", "davidson"])
def test_probabilities_of_the_three_outcomes_do_not_sum_to_one(backend, model):
    a, b = (torch.randn(50, dtype=torch.float64, device=backend.device) * 5 for _ in "ab")
    log_tie = torch.rand(50, dtype=torch.float64, device=backend.device)
    losses = [
        rewardfuse.bradley_terry_tie_loss(a, b, outcome, log_tie=log_tie, model=model, reduction="none")
        for outcome in (1.0, 0.5, 0.0)
    ]
    torch.testing.assert_close(sum((-loss).exp() for loss in losses), torch.ones_like(a))


def test_an_impossible_tie_is_not_infinite(backend):
    zero = torch.zeros(1, device=backend.device)
    assert rewardfuse.bradley_terry_tie_loss(zero, zero, 0.5, log_tie=0.0) == torch.inf
    outcome = torch.tensor([1.0, 0.0], device=backend.device)
    log_tie = torch.zeros((), device=backend.device, requires_grad=True)
    rewardfuse.bradley_terry_tie_loss(zero.expand(2), zero.expand(2), outcome, log_tie=log_tie).backward()
    assert log_tie.grad.isfinite()
    log_tie.grad = None
    rewardfuse.bradley_terry_tie_loss(zero, zero, 0.5, log_tie=log_tie).backward()
    assert log_tie.grad == -torch.inf  # more room for ties lowers the loss


# Davidson 1970, table 2: two of six puddings, how many preferred the first, the second, neither.
PUDDING = """1 2 19 22 16|1 3 16 19 12|2 3 19 19 10|1 4 18 23 13|2 4 23 19 9|3 4 19 20 15|1 5 13 19 18|2 5 16 20 12
3 5 16 15 17|4 5 17 14 16|1 6 18 21 12|2 6 22 20 12|3 6 13 18 10|4 6 14 19 18|5 6 11 21 12""".replace("\n", "|")


@pytest.mark.parametrize(
    ("model", "tie", "log_likelihood"),
    [("davidson", 0.74682304, -809.70951), ("rao_kupper", 1.748457, -809.69713)],  # R PlackettLuce; Rao and Kupper 1967
)
def test_fit_misses_the_published_pudding_estimates(compiled_backend, model, tie, log_likelihood):
    rows = torch.tensor([[float(x) for x in row.split()] for row in PUDDING.split("|")], dtype=torch.float64)
    first, second = rows[:, :2].long().T - 1
    counts = rows[:, 2:].T.to(compiled_backend.device)
    worth = torch.zeros(6, dtype=torch.float64, device=compiled_backend.device, requires_grad=True)
    log_tie = torch.full((), 0.5, dtype=torch.float64, device=compiled_backend.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([worth, log_tie], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = sum(
            rewardfuse.bradley_terry_tie_loss(
                worth[first], worth[second], outcome, log_tie=log_tie, model=model, weight=count, reduction="sum"
            )
            for outcome, count in zip((1.0, 0.0, 0.5), counts, strict=True)
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(-log_likelihood, abs=1e-4)
    assert log_tie.exp().item() == pytest.approx(tie, abs=1e-5)
    if model == "davidson":
        expected = torch.tensor([0.13880336, 0.17300150, 0.16174745, 0.16537298, 0.15868540, 0.20238931])
        torch.testing.assert_close(worth.detach().softmax(0).cpu().float(), expected, atol=1e-5, rtol=0)
