"""plackett_luce_loss_packed: lists of any length end to end, against the equations and against padding."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import list_oracles
import lists
import rewardfuse
from lists import GRADIENT_TOLERANCE, SPREADS, TOLERANCE
from pairs import DTYPES, assert_close, to_device


def offsets(lengths, dtype=torch.int64):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def split(values, lengths):
    """Values laid end to end as the oracle takes them: one row a list."""
    return [row.tolist() for row in values.detach().cpu().double().split(lengths)] if lengths else []


def assert_equations(scores, lengths, arguments, backend, index_dtype=torch.int64):
    """Loss and gradient of one call equal the oracle's."""
    leaf = scores.to(backend.device, copy=True).requires_grad_()
    cu_seqlens = offsets(lengths, index_dtype).to(backend.device)
    loss = rewardfuse.plackett_luce_loss_packed(leaf, cu_seqlens, **to_device(arguments, backend.device))
    loss.sum().backward()
    numbers = lists.numbers({k: v for k, v in arguments.items() if k != "ranks"}, (len(lengths), -1))
    if arguments.get("ranks") is not None:
        numbers["ranks"] = split(arguments["ranks"], lengths)
    expected = list_oracles.plackett_luce(split(scores, lengths), **numbers)
    assert loss.dtype is (torch.float64 if scores.dtype is torch.float64 else torch.float32)
    assert loss.shape == ((len(lengths),) if arguments["reduction"] == "none" else ())
    assert leaf.grad.dtype is scores.dtype
    slack = 4 * lists.rounding(scores, arguments, backend)
    assert_close(loss, expected["loss"], TOLERANCE[scores.dtype] + slack, "loss")
    gradient = list(itertools.chain(*expected["d_scores"]))
    assert_close(leaf.grad, gradient, GRADIENT_TOLERANCE[scores.dtype] + slack, "gradient")


def drawn_arguments(draw, lengths):
    """Everything but scores and cu_seqlens."""
    total, longest = sum(lengths), max(lengths, default=0)
    reduction = draw(st.sampled_from(["none", "sum", "mean"]))
    ranking = {}
    if draw(st.booleans()):
        ranks = lists.draw_ranks(draw, torch.ones(total, dtype=torch.bool))
        ranking = {"ranks": ranks, "ties": draw(st.sampled_from(["breslow", "efron"]))}
    per_list = torch.randint(1, longest + 3, (len(lengths),))
    return {
        **ranking,
        "top_k": draw(st.sampled_from([None, 1, longest // 2 + 1, per_list, per_list.int()])),
        "position_weight": draw(st.sampled_from([None, torch.rand(longest), torch.rand(longest + 3).double()])),
        "weight": lists.draw_weight(draw, (len(lengths),)),
        "reduction": reduction,
        "normalizer": draw(st.sampled_from([None, 3.0, torch.tensor(5.0)])) if reduction == "mean" else None,
    }


@settings(max_examples=40)
@given(data=st.data())
def test_value_or_gradient_differs_from_the_equations(backend, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    if backend.interpreted and dtype is torch.bfloat16:
        dtype = torch.float32  # the interpreter truncates where hardware rounds
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 16, 17, 33]), max_size=9))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    scores = lists.scores_of(data.draw(st.sampled_from(SPREADS)), (sum(lengths),), dtype)
    arguments = drawn_arguments(data.draw, lengths)
    index_dtype = data.draw(st.sampled_from([torch.int64, torch.int32]))
    assert_equations(scores, lengths, arguments, backend, index_dtype)


@pytest.mark.parametrize("ties", [None, "breslow", "efron"])
def test_one_long_list_among_short_ones_differs_from_the_equations(compiled_backend, ties):
    lengths = [3, 0, 700, *([2] * 150), 1, 129, 31, *([5] * 50)]
    total = sum(lengths)
    arguments = {"reduction": "none"}
    if ties:
        arguments |= {"ranks": torch.randint(1, 20, (total,)), "ties": ties}
    for dtype in (torch.float32, torch.float64):
        assert_equations(torch.randn(total).to(dtype), lengths, arguments, compiled_backend)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("ties", [None, "breslow", "efron"])
def test_packed_differs_from_padded(compiled_backend, ties, reduction):
    lengths = torch.randint(0, 40, (60,))
    valid = torch.arange(40) < lengths[:, None]
    padded = torch.randn(60, 40, dtype=torch.float64).to(compiled_backend.device).requires_grad_()
    packed = padded.detach()[valid].requires_grad_()
    per_list = {"weight": torch.rand(60), "top_k": torch.randint(1, 50, (60,)), "position_weight": torch.rand(40)}
    options = to_device(per_list, compiled_backend.device) | {"reduction": reduction}
    ranks = torch.randint(1, 9, (60, 40), device=compiled_backend.device)
    by_pad, by_pack = ({"ranks": r, "ties": ties} if ties else {} for r in (ranks, ranks[valid]))
    lengths = lengths.to(compiled_backend.device)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    loss = rewardfuse.plackett_luce_loss(padded, lengths=lengths, **by_pad, **options)
    other = rewardfuse.plackett_luce_loss_packed(packed, cu_seqlens, **by_pack, **options)
    torch.testing.assert_close(other, loss, rtol=1e-13, atol=1e-13)
    loss.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(packed.grad, padded.grad[valid], rtol=1e-13, atol=1e-13)
    assert (padded.grad[~valid] == 0).all()


@pytest.mark.parametrize("ties", [None, "breslow", "efron"])
def test_nan_leaves_its_list(backend, ties):
    lengths = [4, 3, 1, 5, 2]
    scores = torch.randn(sum(lengths))
    scores[5] = torch.nan
    clean = scores.nan_to_num()
    options = {"ranks": torch.randint(1, 4, (15,), device=backend.device), "ties": ties} if ties else {}
    results = []
    for values in (clean, scores):
        leaf = values.to(backend.device, copy=True).requires_grad_()
        loss = rewardfuse.plackett_luce_loss_packed(
            leaf, offsets(lengths).to(backend.device), **options, reduction="none"
        )
        loss.sum().backward()
        results.append((loss.detach().cpu(), leaf.grad.cpu()))
    (loss, gradient), (bad_loss, bad_gradient) = results
    others = torch.arange(5) != 1
    assert bad_loss.isnan().tolist() == (~others).tolist()
    assert torch.equal(bad_loss[others], loss[others])
    kept = others.repeat_interleave(torch.tensor(lengths))
    assert torch.equal(bad_gradient[kept], gradient[kept])


def test_a_list_of_weight_0_is_read(backend):
    lengths = [4, 3, 2]
    scores = torch.randn(9)
    scores[4:7] = torch.nan
    weight = torch.tensor([1.0, 0.0, 2.0], device=backend.device)
    leaf = scores.to(backend.device, copy=True).requires_grad_()
    loss = rewardfuse.plackett_luce_loss_packed(leaf, offsets(lengths).to(backend.device), weight=weight)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all() and (leaf.grad[4:7] == 0).all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [1, 0, 1]], ids=str)
def test_no_list_or_empty_ones_give_nan_or_a_gradient(backend, lengths, reduction):
    leaf = torch.randn(sum(lengths), device=backend.device, requires_grad=True)
    loss = rewardfuse.plackett_luce_loss_packed(leaf, offsets(lengths).to(backend.device), reduction=reduction)
    loss.sum().backward()
    assert loss.shape == ((len(lengths),) if reduction == "none" else ())
    assert (loss == 0).all() and (leaf.grad == 0).all()


def test_strided_scores_or_ranks_are_misread(backend):
    lengths, device = [5, 1, 7], backend.device
    scores, ranks = torch.randn(13, 2, device=device), torch.randint(1, 4, (13, 2), device=device)
    cu_seqlens = torch.stack([offsets(lengths), -offsets(lengths)], -1).to(device)[:, 0]
    leaf = scores[:, 0].requires_grad_()
    assert not leaf.is_contiguous() and not cu_seqlens.is_contiguous()
    loss = rewardfuse.plackett_luce_loss_packed(leaf, cu_seqlens, ranks=ranks[:, 1], ties="efron")
    dense = scores[:, 0].detach().contiguous().requires_grad_()
    other = rewardfuse.plackett_luce_loss_packed(
        dense, cu_seqlens.contiguous(), ranks=ranks[:, 1].contiguous(), ties="efron"
    )
    assert torch.equal(*torch.autograd.grad(loss, leaf), *torch.autograd.grad(other, dense))
    assert torch.equal(loss, other)
