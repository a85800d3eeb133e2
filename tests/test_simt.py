"""The CUDA kernels on lists, run on the CPU (tests/simt): values and gradients against the equations, and no access out
of bounds whatever lengths, bounds and orders the device holds. Those on pairs: simt/test_pair_kernels.py."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lists
import rewardfuse
import rewardfuse.reference
import test_all_pairs
import test_plackett_luce
import test_plackett_luce_packed
from pairs import DTYPES, assert_close
from rewardfuse import _backend
from simt import emulator
from simt.ops import GRIDS, draw_launch, draw_layout, serve

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

SHAPES = [(0, 3), (3, 0), (1, 1), (1, 7), (3, 5), (2, 3, 8), (40, 4), (5, 17), (2, 64), (3, 65), (2, 100), (1, 131)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulator.build_once(tmp_path_factory.getbasetemp())


@pytest.fixture
def kernels(library, monkeypatch):
    return serve(library, monkeypatch)


@settings(max_examples=150)
@given(data=st.data())
def test_plackett_luce_differs_from_the_equations(kernels, data):
    draw_launch(data.draw, kernels)
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.sampled_from(SHAPES))
    scores, arguments = test_plackett_luce.drawn_case(data.draw, shape, dtype)
    layout, arguments = draw_layout(data.draw, arguments)
    test_plackett_luce.assert_equations(scores, arguments, kernels, layout)


def long_rankings(n):
    """Arguments for two lists of n items."""
    weights, ranks = {"position_weight": torch.rand(n)}, {"ranks": torch.randint(1, 40, (2, n))}
    return {
        "given": {},
        "order": {"order": torch.rand(2, n).argsort(-1), "top_k": 1500} | weights,
        "mask": {"mask": torch.rand(2, n) > 0.3} | weights,
        "lengths": {"lengths": torch.tensor([1025, n - 1]).clamp(max=n)},
        "breslow": ranks,
        "efron": ranks | {"ties": "efron"} | weights,
    }


@pytest.mark.parametrize("kind", long_rankings(1))
@pytest.mark.parametrize("n, dtype", [(1024, torch.float32), (2052, torch.float64), (2052, torch.bfloat16)], ids=str)
def test_a_list_of_several_tiles_differs_from_the_reference(kernels, kind, n, dtype):
    kernels.emulator.blocks = 2
    arguments = long_rankings(n)[kind]
    leaf = (3 * torch.randn(2, n)).to(dtype).requires_grad_()
    loss = rewardfuse.plackett_luce_loss(leaf, **arguments)
    loss.backward()
    exact = leaf.detach().double().requires_grad_()
    expected = from_reference(exact, arguments)
    assert_close(loss, expected.item(), lists.TOLERANCE[dtype], "loss")
    assert_close(leaf.grad, exact.grad.tolist(), 4 * lists.GRADIENT_TOLERANCE[dtype], "gradient")


def from_reference(exact, arguments):
    """The loss from plain torch, which leaves its gradient in `exact`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "namespace_for", lambda tensor: rewardfuse.reference)
        loss = rewardfuse.plackett_luce_loss(exact, **arguments)
    loss.backward()
    return loss


@settings(max_examples=80)
@given(data=st.data())
def test_packed_lists_differ_from_the_equations(kernels, data):
    draw_launch(data.draw, kernels)
    dtype = data.draw(st.sampled_from(DTYPES))
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33, 140]), max_size=9))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    scores = lists.scores_of(data.draw(st.sampled_from(lists.SPREADS)), (sum(lengths),), dtype)
    arguments = test_plackett_luce_packed.drawn_arguments(data.draw, lengths)
    test_plackett_luce_packed.assert_equations(scores, lengths, arguments, kernels)


@pytest.mark.parametrize("blocks", GRIDS)
def test_packed_lists_longer_than_their_team_differ_from_the_equations(kernels, blocks):
    kernels.emulator.blocks = blocks
    lengths = [3, 0, 1100, *([2] * 150), 1, 129, 31, *([5] * 50)]
    arguments = {"reduction": "none", "ranks": torch.randint(1, 20, (sum(lengths),)), "ties": "efron"}
    test_plackett_luce_packed.assert_equations(torch.randn(sum(lengths)), lengths, arguments, kernels)


def call_plackett_luce(kernels, scores, reduction=0, **arguments):
    """The kernels without the checks that ops make on the CPU; (loss, gradient of its sum)."""
    names = ("order", "cu_seqlens", "lengths", "mask", "top_k", "position_weight", "item_weight", "weight")
    leaf = scores.clone().requires_grad_()
    loss = kernels.plackett_luce_loss(leaf, *map(arguments.get, names), None, 0, 1.0, 0.0, reduction)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [40, 300])
@pytest.mark.parametrize("entry", [-1, "n", 1 << 40, -(1 << 62), "repeated"])
def test_an_order_that_is_none_is_followed_or_spoils_its_neighbours(kernels, entry, n, masked):
    scores, order = torch.randn(5, n), torch.rand(5, n).argsort(-1)
    items = {"mask": torch.rand(5, n) > 0.2} if masked else {"lengths": torch.full((5,), n)}
    if masked:
        order = lists.random_order(items["mask"], rubbish=-9)
    good, good_gradient = call_plackett_luce(kernels, scores, order=order, **items)
    for r in (0, 4):  # next to the fences
        order[r, 3] = {"n": n, "repeated": order[r, 4].item()}.get(entry, entry)
    for kernels.emulator.blocks, kernels.emulator.at_end in itertools.product((1, 2), (True, False)):
        loss, gradient = call_plackett_luce(kernels, scores, order=order, **items)
        assert loss.isnan().tolist() == [True, False, False, False, True]
        valid = items.get("mask", torch.ones(5, n, dtype=torch.bool))
        assert gradient[4][valid[4]].isnan().all() and (gradient[~valid] == 0).all()
        assert torch.equal(loss[1:4], good[1:4]) and torch.equal(gradient[1:4], good_gradient[1:4])


@pytest.mark.parametrize("n", [40, 300])
def test_lengths_or_top_k_that_cannot_be_are_followed_or_spoil_their_neighbours(kernels, n):
    scores, top_k = torch.randn(6, n), torch.tensor([3, 3, 3, 0, -(1 << 62), 3])
    lengths = torch.tensor([n + 1, -1, 1 << 40, n, n, n - 1])
    for kernels.emulator.blocks, kernels.emulator.at_end in itertools.product((1, 2), (True, False)):
        loss, gradient = call_plackett_luce(kernels, scores, lengths=lengths, top_k=top_k)
        alone, alone_gradient = call_plackett_luce(kernels, scores[5:], lengths=lengths[5:], top_k=top_k[5:])
        assert loss.isnan().tolist() == [True] * 5 + [False]
        assert torch.equal(loss[5:], alone) and torch.equal(gradient[5:], alone_gradient)
        mean, _ = call_plackett_luce(kernels, scores, reduction=2, lengths=lengths, top_k=top_k)
        assert mean.isnan()


@pytest.mark.parametrize("observed", ["all", "the first stage", "stages that NaN is no part of"])
@pytest.mark.parametrize("n", [40, 300, 1100])
def test_nan_leaves_its_list_or_stays_unseen(kernels, n, observed):
    clean = torch.randn(3, n)
    scores = clean.clone()
    scores[1, n // 2] = torch.nan
    options = {
        "all": {},
        "the first stage": {"top_k": torch.ones(3)},
        "stages that NaN is no part of": {"position_weight": (torch.arange(n) > n // 2).float()},
    }[observed]
    good, good_gradient = call_plackett_luce(kernels, clean, **options)
    loss, gradient = call_plackett_luce(kernels, scores, **options)
    assert loss.isnan().tolist() == [False, True, False] and gradient[1].isnan().all()
    assert torch.equal(loss[::2], good[::2]) and torch.equal(gradient[::2], good_gradient[::2])


@pytest.mark.parametrize("value", [0, -1, torch.nan])
def test_a_normalizer_that_cannot_be_gives_a_number(kernels, value):
    a, b, normalizer = torch.randn(5, 4), torch.randn(5, 4), torch.tensor(value)
    found = [
        kernels.plackett_luce_loss(a, *[None] * 8, normalizer, 0, 1.0, 0.0, 2),
        kernels.all_pairs_loss(a, b, *[None] * 4, normalizer, 0.0, 1.0, 0.0, 2),
        kernels.bradley_terry_loss(a, b, *[None] * 4, normalizer, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 2, False)[0],
    ]
    assert all(loss.isnan() for loss in found)


@pytest.mark.parametrize("size", [100, 3000])
@pytest.mark.parametrize(
    "bounds",
    [
        [10, 30, 20, 60, 90],
        [0, 1 << 40, 60, 100, -(1 << 40)],
        [-5, 40, 60, 1 << 62, 1 << 62],
        [-(1 << 62), -7, 1 << 62, 50, 2900],
    ],
    ids=str,
)
def test_bounds_that_cannot_be_are_followed_or_leave_gradients_unwritten(kernels, bounds, size):
    scores, last = torch.randn(size), slice(*bounds[3:])
    bad = [not 0 <= begin <= end <= size for begin, end in itertools.pairwise(bounds)]
    outside = torch.ones(size, dtype=torch.bool)
    for begin, end in itertools.pairwise(bounds):
        outside[max(begin, 0) : max(end, 0)] = False
    for kernels.emulator.blocks, kernels.emulator.at_end in itertools.product((1, 2), (True, False)):
        loss, gradient = call_plackett_luce(kernels, scores, cu_seqlens=torch.tensor(bounds))
        assert loss.isnan().tolist() == bad
        assert (gradient[outside] == 0).all()
        if not bad[3]:
            alone, alone_gradient = call_plackett_luce(kernels, scores[None, last])
            assert_close(loss[3], alone, 1e-6, "loss")
            assert_close(gradient[last], alone_gradient, 1e-6, "gradient")


@settings(max_examples=100)
@given(data=st.data())
def test_all_pairs_differ_from_the_equations(kernels, data):
    draw_launch(data.draw, kernels)
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.sampled_from(SHAPES))
    scores, arguments = test_all_pairs.drawn_case(data.draw, shape, dtype)
    layout, arguments = draw_layout(data.draw, arguments)
    test_all_pairs.assert_equations(scores, arguments, "cpu", layout)


@pytest.mark.parametrize("blocks", GRIDS)
def test_a_list_of_several_tiles_misses_pairs(kernels, blocks):
    kernels.emulator.blocks = blocks
    labels, lengths = torch.randint(0, 9, (3, 300)), torch.tensor([300, 257, 256])
    arguments = {"labels": labels, "lengths": lengths, "margin": 0.25, "weight": None, "reduction": "mean"}
    test_all_pairs.assert_equations(torch.randn(3, 300), arguments, "cpu")


@pytest.mark.parametrize("n", [20, 70])
def test_lengths_or_labels_that_cannot_be_spoil_other_lists_of_pairs(kernels, n):
    labels = torch.randint(0, 5, (6, n)).float()
    labels[3, n // 2] = torch.nan
    lengths, scores = torch.tensor([n, n + 1, -1, n, 1 << 40, n]), torch.randn(6, n)

    def call(rows):
        leaf = scores[rows].clone().requires_grad_()
        loss = kernels.all_pairs_loss(leaf, labels[rows], lengths[rows], None, None, None, None, 0.5, 1.0, 0.0, 0)
        loss.sum().backward()
        return loss.detach(), leaf.grad

    alone = call([0, 5])
    for kernels.emulator.blocks, kernels.emulator.at_end in itertools.product((1, 2), (True, False)):
        loss, gradient = call(range(6))
        assert loss.isnan().tolist() == [False, True, True, True, True, False]
        assert torch.equal(loss[[0, 5]], alone[0]) and torch.equal(gradient[[0, 5]], alone[1])
