"""plackett_luce_loss on padded lists against the equations, on every backend that the machine has."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import list_oracles
import lists
import rewardfuse
from lists import GRADIENT_TOLERANCE, SPREADS, TOLERANCE
from pairs import DTYPES, assert_close, strided, to_device

LISTS = [(), (1,), (5,), (0,), (2, 3), (2, 0), (4, 1, 3)]


def assert_equations(scores, arguments, backend, layout="contiguous"):
    """Loss and gradient of one call equal the oracle's."""
    leaf = strided(scores.to(backend.device, copy=True), layout).requires_grad_()
    loss = rewardfuse.plackett_luce_loss(leaf, **to_device(arguments, backend.device))
    loss.sum().backward()
    expected = list_oracles.plackett_luce(lists.rows_of(scores), **lists.numbers(arguments, scores.shape))
    assert loss.dtype is (torch.float64 if scores.dtype is torch.float64 else torch.float32)
    assert loss.shape == (scores.shape[:-1] if arguments["reduction"] == "none" else ())
    assert leaf.grad.dtype is scores.dtype
    slack = 4 * lists.rounding(scores, arguments, backend)
    assert_close(loss, expected["loss"], TOLERANCE[scores.dtype] + slack, "loss")
    gradient = list(itertools.chain(*expected["d_scores"]))
    assert_close(leaf.grad, gradient, GRADIENT_TOLERANCE[scores.dtype] + slack, "gradient")


def drawn_case(draw, shape, dtype):
    """Scores with rubbish where nothing is to be read, and all other arguments."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    scores = lists.scores_of(draw(st.sampled_from(SPREADS)), shape, dtype)
    by_length, valid = lists.draw_valid(draw, shape)
    arguments = by_length | lists.draw_ranking(draw, valid) | lists.draw_options(draw, valid)
    return lists.poisoned(draw, scores, valid, arguments["weight"]), arguments


@settings(max_examples=50)
@given(data=st.data())
def test_value_or_gradient_differs_from_the_equations(backend, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    if backend.interpreted and dtype is torch.bfloat16:
        dtype = torch.float32  # the interpreter truncates where hardware rounds
    shape = (*data.draw(st.sampled_from(LISTS)), data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33])))
    scores, arguments = drawn_case(data.draw, shape, dtype)
    layout = data.draw(st.sampled_from(["contiguous", "transposed", "every second", "three strides"]))
    arguments = {k: strided(v, layout) if torch.is_tensor(v) and v.dim() else v for k, v in arguments.items()}
    assert_equations(scores, arguments, backend, layout)


@settings(max_examples=80)
@given(data=st.data())
def test_a_list_of_up_to_hundreds_differs_from_the_equations(compiled_backend, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    n = data.draw(st.sampled_from([2, 3, 5, 8, 16, 31, 32, 63, 64, 65, 127, 128, 129, 200, 257]))
    scores, arguments = drawn_case(data.draw, (data.draw(st.sampled_from([1, 3])), n), dtype)
    assert_equations(scores, arguments, compiled_backend)


LONG = {
    "given": {},
    "top_k": {"top_k": 100},
    "breslow": {"ties": "breslow", "levels": 40},
    "efron": {"ties": "efron", "levels": 40},
}


@functools.cache
def long_case(n, kind):
    """A long list, its arguments and what the oracle says of it, computed once for all backends."""
    torch.manual_seed(n)
    arguments = {"reduction": "sum", **LONG[kind]}
    if levels := arguments.pop("levels", None):
        arguments["ranks"] = torch.randint(1, levels, (1, n))
    scores = torch.randn(1, n) * 3
    expected = list_oracles.plackett_luce(lists.rows_of(scores), **lists.numbers(arguments, scores.shape))
    return scores, arguments, expected


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("n", [1023, 1024, 1025, 2050])
def test_a_list_of_thousands_differs_from_the_equations(compiled_backend, n, kind):
    scores, arguments, expected = long_case(n, kind)
    for dtype in (torch.float32, torch.float64):
        leaf = scores.to(compiled_backend.device, dtype, copy=True).requires_grad_()
        loss = rewardfuse.plackett_luce_loss(leaf, **to_device(arguments, compiled_backend.device))
        loss.backward()
        assert_close(loss, expected["loss"], TOLERANCE[dtype], "loss")
        assert_close(leaf.grad, expected["d_scores"], 4 * GRADIENT_TOLERANCE[dtype], "gradient")


@pytest.mark.parametrize("n", [4096, 16385, 65536, 70001])
def test_a_list_beyond_every_block_differs_from_plain_torch(compiled_backend, n):
    scores = torch.randn(2, n, device=compiled_backend.device)
    exact = scores.double().requires_grad_()
    suffix = exact.flip(-1).logcumsumexp(-1).flip(-1)
    (suffix - exact).sum(-1).mean().backward()
    leaf = scores.requires_grad_()
    loss = rewardfuse.plackett_luce_loss(leaf)
    loss.backward()
    assert_close(loss, (suffix - exact).sum(-1).mean().item(), TOLERANCE[torch.float32], "loss")
    assert_close(leaf.grad, exact.grad.tolist(), 4 * GRADIENT_TOLERANCE[torch.float32], "gradient")


@pytest.mark.parametrize("is_sorted", [False, True], ids=["random", "sorted"])
@pytest.mark.parametrize("spread", [1.0, 1000.0])
@pytest.mark.parametrize("n", [16, 1000, 20_000])
def test_error_exceeds_four_times_that_of_logcumsumexp(compiled_backend, n, spread, is_sorted):
    scores = (torch.rand(8, n) * 2 - 1).mul(spread)
    if is_sorted:  # as a trained model gives them: every score is the largest so far
        scores = torch.linspace(spread, -spread, n).expand(8, n).clone()
    scores = scores.to(compiled_backend.device)

    def plain(s):
        s = s.detach().requires_grad_()
        loss = (s.flip(-1).logcumsumexp(-1).flip(-1) - s).sum(-1)
        return loss.detach().double(), torch.autograd.grad(loss.sum(), s)[0].double()

    exact, torch_error = plain(scores.double()), []
    for value, truth in zip(plain(scores), exact, strict=True):
        torch_error.append((value - truth).abs().max().item())
    leaf = scores.requires_grad_()
    loss = rewardfuse.plackett_luce_loss(leaf, reduction="none")
    loss.sum().backward()
    for value, truth, allowed in zip((loss, leaf.grad), exact, torch_error, strict=True):
        rounding = torch.finfo(torch.float32).eps * truth.abs().max().item()
        assert (value.double() - truth).abs().max().item() <= 4 * max(allowed, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [2, 8, 33])
def test_a_small_loss_of_large_scores_is_lost(backend, n, dtype):
    """Scores in their own order, in clusters far apart: a log-sum-exp near ±1000 rounded to its type loses 3e-5."""
    clusters = torch.tensor([[1000.0, 1000.0], [-1000.0, -1000.0], [900.0, -900.0], [3.0, -1000.0]])
    middle = torch.arange(n) < (n + 1) // 2
    scores = (torch.rand(4, n) * 4 + torch.where(middle, clusters[:, :1], clusters[:, 1:])).to(dtype)
    scores = scores.sort(descending=True).values
    leaf = scores.to(backend.device, copy=True).requires_grad_()
    loss = rewardfuse.plackett_luce_loss(leaf, reduction="none")
    loss.sum().backward()
    expected = list_oracles.plackett_luce(lists.rows_of(scores), reduction="none")
    slack = 4 * lists.rounding(scores, {}, backend)
    assert_close(loss, expected["loss"], TOLERANCE[dtype] + slack, "loss")
    assert_close(leaf.grad, expected["d_scores"], GRADIENT_TOLERANCE[dtype] + slack, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["all", "lengths", "mask"])
def test_extreme_scores_overflow_or_lose_to_invalid_ones(backend, where, dtype):
    # The reference gives invalid items a score of max / 4 below 0.
    top = torch.finfo(dtype).max / (16 if backend.name == "reference" else 4)
    pairs = [[-top, top], [top, -top], [top, top], [-top, -top], [-3 * top, -2 * top], [-2 * top, -3 * top], [0, -top]]
    scores = torch.tensor([[first, 0.0, second] for first, second in pairs], dtype=dtype)
    mask = torch.tensor([True, False, True]).expand(len(pairs), 3)
    arguments = {"mask": mask, "reduction": "none"}
    if where == "lengths":
        scores, arguments = scores[:, [0, 2, 1]], {"lengths": torch.full((len(pairs),), 2), "reduction": "none"}
    elif where == "all":
        scores, arguments = scores[:, [0, 2]], {"reduction": "none"}
    leaf = scores.to(backend.device, copy=True).requires_grad_()
    loss = rewardfuse.plackett_luce_loss(leaf, **to_device(arguments, backend.device))
    loss.sum().backward()
    expected = list_oracles.plackett_luce(lists.rows_of(scores), **lists.numbers(arguments, scores.shape))
    near = torch.tensor([row[0] == row[-1] for row in pairs])  # a sum as large as these loses log 2
    assert loss.isfinite().all() and leaf.grad.isfinite().all() and leaf.grad.abs().max() <= 1
    for value, exact, what in ((loss, expected["loss"], "loss"), (leaf.grad, expected["d_scores"], "gradient")):
        assert_close(value.cpu()[~near], torch.tensor(exact, dtype=torch.float64)[~near], 1e-6, what)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how", ["lengths", "mask", "weight"])
@pytest.mark.parametrize("kind", ["given", "order", "breslow", "efron"])
def test_nan_in_an_invalid_or_weightless_place_leaks(backend, kind, how, bad):
    shape = (6, 9)
    valid = torch.ones(shape, dtype=torch.bool)
    if how == "lengths":
        valid = torch.arange(9) < torch.tensor([0, 1, 2, 5, 8, 9])[:, None]
    elif how == "mask":
        valid = torch.rand(shape) > 0.5
    where = {"lengths": valid.sum(-1)} if how == "lengths" else {"mask": valid} if how == "mask" else {}
    if how == "weight":
        where["weight"] = torch.tensor([1, 0, 2, 0, 0, 1.0])
        valid = (where["weight"] != 0)[:, None].expand(shape)
    if kind == "order":
        where["order"] = lists.random_order(valid if how != "weight" else torch.ones_like(valid), 0)
    elif kind != "given":
        where |= {"ranks": torch.randint(1, 4, shape), "ties": kind}
    scores = torch.randn(shape)
    for reduction in ("none", "sum", "mean"):
        results = []
        for values in (scores, torch.where(valid, scores, bad)):
            leaf = values.clone().to(backend.device).requires_grad_()
            loss = rewardfuse.plackett_luce_loss(leaf, **to_device(where, backend.device), reduction=reduction)
            loss.sum().backward()
            results.append((loss.detach(), leaf.grad))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
        assert (results[1][1].cpu()[~valid] == 0).all()
        assert results[1][0].isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_nothing_valid_gives_nan_or_a_gradient(backend, reduction):
    empty = torch.zeros(3, 5, dtype=torch.bool)
    for shape, where in (
        ((0, 4), {}),
        ((3, 0), {}),
        ((0,), {}),
        ((2, 0, 3), {}),
        ((3, 5), {"mask": empty}),
        ((3, 5), {"lengths": torch.zeros(3, dtype=torch.long)}),
        ((3, 5), {"lengths": torch.zeros(3, dtype=torch.long), "ranks": torch.ones(3, 5), "ties": "efron"}),
    ):
        leaf = torch.randn(shape, device=backend.device, requires_grad=True)
        loss = rewardfuse.plackett_luce_loss(leaf, **to_device(where, backend.device), reduction=reduction)
        loss.sum().backward()
        assert loss.shape == (shape[:-1] if reduction == "none" else ())
        assert (loss == 0).all() and (leaf.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_list_of_one_item_has_a_loss(backend, dtype):
    leaf = torch.randn(5, 1, dtype=dtype, device=backend.device, requires_grad=True)
    loss = rewardfuse.plackett_luce_loss(leaf, reduction="none")
    loss.sum().backward()
    assert (loss == 0).all() and leaf.grad.abs().max() <= 4 * torch.finfo(dtype).eps


def test_a_list_with_nothing_valid_counts_in_the_mean(backend):
    scores = torch.randn(4, 3, device=backend.device)
    lengths = torch.tensor([3, 0, 1, 2], device=backend.device)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0], device=backend.device)
    first = rewardfuse.plackett_luce_loss(scores[:1], reduction="sum")
    mean = rewardfuse.plackett_luce_loss(scores, lengths=lengths, weight=weight)
    torch.testing.assert_close(mean, first / 3)  # one item and weight 0 count, no item does not


def tied_pairs(n, device):
    return (1 + torch.arange(n, device=device) // 2).expand(4, n)


@pytest.mark.parametrize("shift", [0.0, 50.0, -1e4])
def test_a_common_shift_changes_the_loss(backend, shift):
    scores = torch.randn(4, 7, dtype=torch.float64, device=backend.device)
    for options in ({}, {"ranks": tied_pairs(7, backend.device), "ties": "efron"}, {"top_k": 3}):
        torch.testing.assert_close(
            rewardfuse.plackett_luce_loss(scores + shift, **options), rewardfuse.plackett_luce_loss(scores, **options)
        )


def test_two_items_differ_from_bradley_terry(backend):
    scores = torch.randn(50, 2, dtype=torch.float64, device=backend.device) * 5
    loss = rewardfuse.plackett_luce_loss(scores, reduction="none")
    pairs = rewardfuse.bradley_terry_loss(scores[:, 0], scores[:, 1], reduction="none")
    torch.testing.assert_close(loss, pairs, rtol=1e-13, atol=1e-14)


def test_rankings_of_the_same_list_differ(backend):
    scores = torch.randn(5, 9, dtype=torch.float64, device=backend.device)
    order = torch.rand(5, 9).argsort(-1).to(backend.device)
    expected = rewardfuse.plackett_luce_loss(scores.gather(-1, order), reduction="none", top_k=6)
    ranks = order.argsort(-1) * 2.5 + 1
    for ranking in ({"order": order}, {"ranks": ranks, "ties": "breslow"}, {"ranks": ranks, "ties": "efron"}):
        loss = rewardfuse.plackett_luce_loss(scores, **ranking, reduction="none", top_k=6)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)


def test_mask_and_lengths_that_say_the_same_differ(backend):
    scores = torch.randn(6, 9, dtype=torch.float64, device=backend.device)
    lengths = torch.tensor([0, 1, 3, 5, 8, 9], device=backend.device)
    mask = torch.arange(9, device=backend.device) < lengths[:, None]
    by_length = rewardfuse.plackett_luce_loss(scores, lengths=lengths, reduction="none")
    by_mask = rewardfuse.plackett_luce_loss(scores, mask=mask, reduction="none")
    torch.testing.assert_close(by_length, by_mask, rtol=1e-14, atol=0)


def test_module_differs_from_function(backend):
    scores = torch.randn(3, 5, device=backend.device)
    ranks = torch.tensor([[1, 1, 2, 2, 3]] * 3, device=backend.device)
    options = {"ties": "efron", "top_k": 3, "reduction": "sum"}
    module = rewardfuse.PlackettLuceLoss(**options)
    assert torch.equal(module(scores, ranks=ranks), rewardfuse.plackett_luce_loss(scores, ranks=ranks, **options))
    assert "efron" in repr(module)
