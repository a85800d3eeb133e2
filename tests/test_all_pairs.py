"""all_pairs_loss against the equations, on every backend that the machine has."""

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


def assert_equations(scores, arguments, device, layout="contiguous"):
    """Loss and gradient of one call equal the oracle's."""
    leaf = strided(scores.to(device, copy=True), layout).requires_grad_()
    loss = rewardfuse.all_pairs_loss(leaf, **to_device(arguments, device))
    loss.sum().backward()
    numbers = lists.numbers(arguments, scores.shape)
    numbers["margin"] = numbers["margin"] or 0.0
    expected = list_oracles.all_pairs(lists.rows_of(scores), **numbers)
    assert loss.dtype is (torch.float64 if scores.dtype is torch.float64 else torch.float32)
    assert loss.shape == (scores.shape[:-1] if arguments["reduction"] == "none" else ())
    assert leaf.grad.dtype is scores.dtype
    assert_close(loss, expected["loss"], TOLERANCE[scores.dtype], "loss")
    gradient = list(itertools.chain(*expected["d_scores"]))
    assert_close(leaf.grad, gradient, GRADIENT_TOLERANCE[scores.dtype], "gradient")


def drawn_case(draw, shape, dtype):
    """Scores and labels with rubbish where nothing is to be read, and all other arguments."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    by_length, valid = lists.draw_valid(draw, shape)
    labels = torch.randint(-2, draw(st.sampled_from([-1, 1, 5, 60])), shape) * 0.5
    label_dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.int64, torch.float16, torch.int8]))
    labels = torch.where(valid, labels.to(label_dtype), torch.nan if label_dtype.is_floating_point else 100)
    reduction = draw(st.sampled_from(["none", "sum", "mean"]))
    arguments = by_length | {
        "labels": labels,
        "margin": draw(st.sampled_from([None, 0.5, torch.tensor(0.25), 0.0])),
        "weight": lists.draw_weight(draw, shape[:-1]),
        "reduction": reduction,
        "normalizer": draw(st.sampled_from([None, 3.0, torch.tensor(5.0)])) if reduction == "mean" else None,
    }
    scores = lists.scores_of(draw(st.sampled_from(SPREADS)), shape, dtype)
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
    assert_equations(scores, arguments, backend.device, layout)


@settings(max_examples=80)
@given(data=st.data())
def test_a_list_of_up_to_hundreds_differs_from_the_equations(compiled_backend, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    k = data.draw(st.sampled_from([2, 3, 5, 8, 16, 31, 32, 63, 64, 65, 127, 128, 129, 200]))
    scores, arguments = drawn_case(data.draw, (data.draw(st.sampled_from([1, 2])), k), dtype)
    assert_equations(scores, arguments, compiled_backend.device)


@pytest.mark.parametrize("k", [512, 1000, 1024, 1100])
def test_a_list_of_a_thousand_differs_from_plain_torch(compiled_backend, k):
    scores = torch.randn(2, k).to(compiled_backend.device) * 3
    labels = torch.randint(0, 7, (2, k)).to(compiled_backend.device)
    exact = scores.double().requires_grad_()
    z = exact[:, :, None] - exact[:, None] - 0.1 * (labels[:, :, None] - labels[:, None])
    better = labels[:, :, None] > labels[:, None]
    expected = torch.where(better, -torch.nn.functional.logsigmoid(z), 0.0).sum((1, 2)) / better.sum((1, 2))
    expected.sum().backward()
    leaf = scores.requires_grad_()
    loss = rewardfuse.all_pairs_loss(leaf, labels, margin=0.1, reduction="none")
    loss.sum().backward()
    assert_close(loss, expected.tolist(), TOLERANCE[torch.float32], "loss")
    assert_close(leaf.grad * k, (exact.grad * k).tolist(), 4 * GRADIENT_TOLERANCE[torch.float32], "gradient")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how", ["lengths", "mask", "weight"])
def test_nan_in_an_invalid_or_weightless_place_leaks(backend, how, bad):
    shape = (6, 9)
    valid = torch.arange(9) < torch.tensor([0, 1, 2, 5, 8, 9])[:, None]
    if how == "mask":
        valid = torch.rand(shape) > 0.5
    where = {"lengths": valid.sum(-1)} if how == "lengths" else {"mask": valid} if how == "mask" else {}
    if how == "weight":
        where["weight"] = torch.tensor([1, 0, 2, 0, 0, 1.0])
        valid = (where["weight"] != 0)[:, None].expand(shape)
    scores, labels = torch.randn(shape), torch.randint(0, 4, shape).float()
    dirty_labels = labels if how == "weight" else torch.where(valid, labels, bad)
    for reduction in ("none", "sum", "mean"):
        results = []
        for values, label in ((scores, labels), (torch.where(valid, scores, bad), dirty_labels)):
            leaf = values.clone().to(backend.device).requires_grad_()
            options = to_device({"labels": label, **where}, backend.device)
            loss = rewardfuse.all_pairs_loss(leaf, **options, margin=0.5, reduction=reduction)
            loss.sum().backward()
            results.append((loss.detach(), leaf.grad))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
        assert (results[1][1].cpu()[~valid] == 0).all()
        assert results[1][0].isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_pair_gives_nan_or_a_gradient(backend, reduction):
    for shape, where in (
        ((0, 4), {}),
        ((3, 0), {}),
        ((0,), {}),
        ((2, 0, 3), {}),
        ((3, 1), {}),
        ((3, 5), {"mask": torch.zeros(3, 5, dtype=torch.bool)}),
        ((3, 5), {"lengths": torch.ones(3, dtype=torch.long)}),
        ((3, 5), {"labels": torch.ones(3, 5)}),
    ):
        leaf = torch.randn(shape, device=backend.device, requires_grad=True)
        arguments = to_device({"labels": torch.rand(shape), **where}, backend.device)
        loss = rewardfuse.all_pairs_loss(leaf, **arguments, reduction=reduction)
        loss.sum().backward()
        assert loss.shape == (shape[:-1] if reduction == "none" else ())
        assert (loss == 0).all() and (leaf.grad == 0).all()


def test_a_list_without_a_pair_counts_in_the_mean(backend):
    scores = torch.randn(4, 3, device=backend.device)
    labels = torch.tensor([[0, 1, 2], [1, 1, 1], [0, 0, 1], [2, 0, 1]], device=backend.device)
    lengths = torch.tensor([3, 3, 2, 3], device=backend.device)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0], device=backend.device)
    first = rewardfuse.all_pairs_loss(scores[:1], labels[:1], reduction="sum")
    mean = rewardfuse.all_pairs_loss(scores, labels, lengths=lengths, weight=weight)
    torch.testing.assert_close(mean, first / 2)  # a list of weight 0 has pairs, the second and the third have none


def test_two_items_differ_from_bradley_terry(backend):
    scores = torch.randn(50, 2, dtype=torch.float64, device=backend.device) * 5
    labels = torch.tensor([[3.0, 1.0]], dtype=torch.float64, device=backend.device).expand(50, 2)
    for margin in (None, 0.75):
        loss = rewardfuse.all_pairs_loss(scores, labels, margin=margin, reduction="none")
        pairs = rewardfuse.bradley_terry_loss(scores[:, 0], scores[:, 1], 2 * (margin or 0.0), reduction="none")
        torch.testing.assert_close(loss, pairs, rtol=1e-13, atol=1e-300)


def test_all_pairs_differ_from_bradley_terry_on_each(backend):
    scores = torch.randn(1, 6, dtype=torch.float64, device=backend.device)
    labels = torch.tensor([[2, 0, 2, 1, 5, 0]], device=backend.device)
    better = [(i, j) for i, j in itertools.permutations(range(6), 2) if labels[0, i] > labels[0, j]]
    chosen, rejected = scores[0][torch.tensor(better, device=backend.device).T]
    gap = torch.tensor([float(labels[0, i] - labels[0, j]) for i, j in better], device=backend.device)
    loss = rewardfuse.all_pairs_loss(scores, labels, margin=0.5)
    torch.testing.assert_close(loss, rewardfuse.bradley_terry_loss(chosen, rejected, 0.5 * gap))


def test_scale_or_order_of_labels_matters_without_a_margin(backend):
    scores = torch.randn(4, 7, dtype=torch.float64, device=backend.device)
    labels = torch.randint(0, 4, (4, 7), device=backend.device)
    loss = rewardfuse.all_pairs_loss(scores, labels)
    torch.testing.assert_close(rewardfuse.all_pairs_loss(scores + 30, labels.double().exp()), loss)
    flipped = rewardfuse.all_pairs_loss(scores.flip(-1), labels.flip(-1))
    torch.testing.assert_close(flipped, loss, rtol=1e-13, atol=0)


def test_module_differs_from_function(backend):
    scores, labels = torch.randn(3, 5, device=backend.device), torch.randint(0, 4, (3, 5), device=backend.device)
    module = rewardfuse.AllPairsLoss(margin=0.5, reduction="sum")
    expected = rewardfuse.all_pairs_loss(scores, labels, margin=0.5, reduction="sum")
    assert torch.equal(module(scores, labels), expected)
    assert "0.5" in repr(module)
