"""The CUDA kernels of the KL ops, run on the CPU: values and gradients against the equations; rows that a block takes;
what the device may hold where nothing checks it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rewardfuse
import rewardfuse.reference
import test_approx_kl
import test_kl_penalized_rewards
from kl import GRADIENT_TOLERANCE, TOLERANCE
from pairs import DTYPES, assert_close
from rewardfuse import _backend
from simt import emulator
from simt.ops import GRIDS, draw_launch, serve

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

OUTPUTS = ("rewards", "kl", "sequence_kl", "sequence_reward")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulator.build_once(tmp_path_factory.getbasetemp())


@pytest.fixture
def kernels(library, monkeypatch):
    return serve(library, monkeypatch)


def equations_of(module):
    """The test that holds every backend to the equations, for one seed."""
    return module.test_value_or_gradient_differs_from_the_equations.hypothesis.inner_test


@settings(max_examples=60)
@given(data=st.data())
def test_approx_kl_differs_from_the_equations(kernels, data):
    draw_launch(data.draw, kernels)
    equations_of(test_approx_kl)(kernels, data.draw(st.integers(0, 2**31)))


@settings(max_examples=100)
@given(data=st.data())
def test_rewards_differ_from_the_equations(kernels, data):
    draw_launch(data.draw, kernels)
    equations_of(test_kl_penalized_rewards)(kernels, data.draw(st.integers(0, 2**31)))


def shaped(logprobs, ref, mask, differentiable=True, **options):
    """All results, and gradients of the log-probs and of scores that want one."""
    leaves = [logprobs.clone().requires_grad_()]
    if options.get("scores") is not None:
        leaves.append(options["scores"].clone().requires_grad_())
        options["scores"] = leaves[1]
    result = rewardfuse.kl_penalized_rewards(leaves[0], ref, mask, **options, differentiable_rewards=differentiable)
    outputs = [getattr(result, name) for name in OUTPUTS]
    torch.manual_seed(3)
    upstream = [torch.randn(o.shape).to(o.dtype) for o in outputs]
    if not differentiable:
        outputs, upstream, leaves = outputs[1:3], upstream[1:3], leaves[:1]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return [getattr(result, name).detach() for name in OUTPUTS], torch.stack(result.stats), gradients


def assert_like_reference(logprobs, ref, mask, dtype, **options):
    """Equal to plain torch in float64 on the same numbers."""
    values, stats, gradients = shaped(logprobs, ref, mask, **options)
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in options.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "namespace_for", lambda tensor: rewardfuse.reference)
        expected = shaped(logprobs.double(), ref.double(), mask, **exact)
    for name, value, other in zip(OUTPUTS, values, expected[0], strict=True):
        assert_close(value, other.flatten().tolist(), 2 * TOLERANCE[dtype], name)
    assert_close(stats, expected[1].tolist(), 2 * TOLERANCE[dtype], "stats")
    for leaf, gradient, other in zip(("logprobs", "scores"), gradients, expected[2], strict=False):
        assert_close(gradient, other.flatten().tolist(), 2 * GRADIENT_TOLERANCE[gradient.dtype], f"d_{leaf}")


@pytest.mark.parametrize("size", [500, 512, 513, 1028, 2500])
@pytest.mark.parametrize("kind", ["no mask", "holes", "left", "right"])
def test_a_row_of_a_whole_warp_or_block_differs_from_plain_torch(kernels, kind, size):
    steps = torch.arange(size)
    lengths = torch.tensor([[size], [0], [1], [size // 2], [size - 1]])
    mask = {
        "no mask": None,
        "holes": (torch.rand(5, size) > 0.3) & (lengths > 0),
        "left": steps >= size - lengths,
        "right": steps < lengths,
    }[kind]
    for i, dtype in enumerate(DTYPES):
        kernels.emulator.blocks, kernels.emulator.at_end = GRIDS[i % len(GRIDS)], i % 2 == 0
        logprobs, ref = (torch.randn(5, size).to(dtype) for _ in "ab")
        options = {"kl_coef": torch.tensor(0.3), "estimator": "k3", "score_clip": 1.0, "scores": torch.randn(5)}
        options |= {"ended": torch.rand(5) > 0.5, "missing_eos_penalty": 1.5}
        terminal = ("last", "one_past")[i % 2]
        assert_like_reference(logprobs, ref, mask, dtype, **options, terminal=terminal)
        missing_eos = ("subtract", "replace")[i // 2]
        options |= {"scores": torch.randn(5, size), "missing_eos": missing_eos}
        assert_like_reference(logprobs, ref, mask, dtype, **options)
        assert_like_reference(logprobs, ref, mask, dtype, kl_coef=0.1, differentiable=False)


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("size", [8, 600])
def test_a_coefficient_that_cannot_be_gives_a_number_or_leaves_the_valid_tokens(kernels, value, size):
    mask = torch.rand(4, size) > 0.3
    mask[2] = False
    logprobs, ref, scores, coefficient = torch.randn(4, size), torch.randn(4, size), torch.randn(4), torch.tensor(value)
    none = (-torch.inf, torch.inf)
    numbers = (0.0, 0.0, *none, 0, -1, *none, *none, False, False, False)
    for kernels.emulator.blocks in GRIDS:
        rewards, kl, sequence_kl, sequence_reward, stats = kernels.kl_penalized_rewards(
            logprobs, ref, mask, scores, None, coefficient, *numbers
        )
        assert torch.equal(rewards.isnan(), mask) and (rewards[~mask] == 0).all()
        assert sequence_reward.isnan().tolist() == [True, True, False, True]
        assert kl.isfinite().all() and sequence_kl.isfinite().all()
        assert stats.isnan().tolist() == [False, False, False, True, False, False]
