"""The CUDA kernels on pairs, run on the CPU: values and gradients against the equations, sums over several blocks,
replays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import pairs
import rewardfuse
from pairs import assert_close, strided
from simt import emulator
from simt.emulator import NONCE
from simt.ops import GRIDS, Pairs, draw_launch, draw_layout, serve

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
op_cases = pytest.mark.parametrize("op", pairs.OPS, ids=lambda op: op.name)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulator.build_once(tmp_path_factory.getbasetemp())


@pytest.fixture
def kernels(library, monkeypatch):
    return serve(library, monkeypatch)


@op_cases
@settings(max_examples=60)
@given(data=st.data())
def test_pairs_differ_from_the_equations(op, kernels, data):
    draw_launch(data.draw, kernels)
    dtype = data.draw(st.sampled_from(pairs.DTYPES))
    shape = data.draw(st.sampled_from([(0,), (1,), (7,), (64,), (3, 5), (2, 0), (2, 3, 17)]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    tensors, options = op.draw(data.draw, shape, dtype)
    options["reduction"] = data.draw(st.sampled_from(["none", "sum", "mean"]))
    tensors["normalizer"] = data.draw(st.sampled_from([None, 3.0])) if options["reduction"] == "mean" else None
    layout, tensors = draw_layout(data.draw, tensors)
    a, b = (strided(torch.randn(shape).to(dtype), layout).requires_grad_() for _ in "ab")
    assert_pair_equations(op, a, b, tensors, options)


def assert_pair_equations(op, a, b, tensors, options):
    """Loss and all gradients of one call equal the oracle's."""
    p = tensors.get(op.names[2])
    if isinstance(p, torch.Tensor):
        tensors[op.names[2]] = p = p.detach().requires_grad_()
    loss = op.function(a, b, **tensors, **options)
    loss.sum().backward()
    numbers = {k: v.detach().tolist() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
    expected = op.oracle(a.tolist(), b.tolist(), numbers, options)
    tolerance, of_gradient = pairs.TOLERANCE[a.dtype], pairs.GRADIENT_TOLERANCE[a.dtype]
    assert_close(loss, expected["loss"], tolerance, "loss")
    for tensor, name in ((a, op.names[0]), (b, op.names[1])):
        assert_close(tensor.grad, expected[f"d_{name}"], of_gradient, f"d_{name}")
    if isinstance(p, torch.Tensor):
        d_p = torch.tensor(expected[f"d_{op.names[2]}"], dtype=torch.float64)
        size = max(1.0, d_p.abs().sum().item())
        worst = max(tolerance, pairs.GRADIENT_TOLERANCE[p.dtype])
        assert_close(p.grad / size, (d_p if p.dim() else d_p.sum()) / size, worst, f"d_{op.names[2]}")


@op_cases
@pytest.mark.parametrize("n", [3000, 3003])
def test_several_accesses_a_thread_miss_pairs(op, kernels, n):
    for kernels.emulator.blocks, dtype in zip((1, 2, 5, 2), pairs.DTYPES, strict=True):
        a, b = (torch.randn(n).to(dtype).requires_grad_() for _ in "ab")
        plain = {name: t if t.dim() == 0 else 0.5 for name, t in op.plain((n,)).items()}
        assert_pair_equations(op, a, b, plain or {"margin": torch.tensor(0.5)}, {})


@pytest.mark.parametrize("model", [0, 1])
def test_an_outcome_that_cannot_be_spoils_other_pairs(kernels, model):
    outcome = torch.tensor([1.0, 0.5, 0.3, 0.0, torch.nan, 2.0, 1.0] * 100)
    a, b = (torch.randn(700).requires_grad_() for _ in "ab")
    loss = kernels.bradley_terry_tie_loss(a, b, outcome, None, None, None, None, 1.0, 0.5, 1.0, 0.0, model, 0)
    loss.sum().backward()
    bad = [False, False, True, False, True, True, False] * 100
    for found in (loss, a.grad, b.grad):
        assert found.isnan().tolist() == bad


@pytest.mark.parametrize("blocks", GRIDS)
def test_stats_differ_from_the_equations(kernels, blocks):
    kernels.emulator.blocks = blocks
    a, b = torch.randint(-3, 4, (2, 1000)).float()
    arguments = {"mask": torch.rand(1000) > 0.3, "weight": torch.randint(0, 2, (1000,))}
    loss, stats = rewardfuse.bradley_terry_loss(a, b, **arguments, return_stats=True)
    expected = oracles.bradley_terry(a.tolist(), b.tolist(), **arguments)
    assert_close(loss, expected["loss"], 1e-6, "loss")
    for name, value in stats._asdict().items():
        assert_close(value, expected[name], 1e-6, name)


@pytest.mark.parametrize("blocks", [2, 5, 260])
def test_a_replayed_launch_finds_its_flags_up_or_stale_sums(kernels, blocks):
    kernels.emulator.blocks = blocks
    a, b, scratch = torch.randn(2000), torch.zeros(2000), None
    for _ in range(3):
        a.normal_()
        call = Pairs(kernels.emulator, "bradley_terry", a, b, None, None, None, None, (0, 1, 1, 0, 0, 1, 0), 1, False)
        call.scratch = scratch = scratch or call.scratch  # as a graph keeps it, with the nonce
        expected = oracles.bradley_terry(a.tolist(), b.tolist(), reduction="sum")["loss"]
        assert_close(call.forward(), expected, 1e-6, "loss")
        assert NONCE not in scratch["flags"].tensor.tolist()
