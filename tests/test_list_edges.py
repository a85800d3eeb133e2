"""Edges of the ops on lists that were once wrong."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rewardfuse
from rewardfuse import all_pairs_loss, plackett_luce_loss, plackett_luce_loss_packed, plackett_luce_sample


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_an_unobserved_weight_of_another_list_enters(backend, ties):
    scores, bounds, ranks = torch.zeros(5), torch.tensor([0, 3, 5]), torch.tensor([1, 1, 2, 1, 1])
    for beyond in (torch.nan, 1e30):
        weight = torch.tensor([1.0, 1.0, beyond])
        options = {"top_k": 2, "ties": ties, "position_weight": weight, "reduction": "none"}
        loss = plackett_luce_loss_packed(
            scores.to(backend.device),
            bounds.to(backend.device),
            ranks=ranks.to(backend.device),
            **{**options, "position_weight": weight.to(backend.device)},
        )
        three, two = (2 * math.log(3), 2 * math.log(2)) if ties == "breslow" else (math.log(6), math.log(2))
        assert loss.tolist() == pytest.approx([three, two], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_a_narrow_length_is_compared_with_a_wrapped_size(backend, dtype):
    lengths = torch.tensor([100], dtype=dtype, device=backend.device)
    scores = torch.zeros(1, 300, device=backend.device)
    expected = math.lgamma(101)
    assert plackett_luce_loss(scores, lengths=lengths).item() == pytest.approx(expected, rel=1e-5)
    ranks = torch.arange(1, 301, device=backend.device).expand(1, 300)
    assert plackett_luce_loss(scores, lengths=lengths, ranks=ranks).item() == pytest.approx(expected, rel=1e-5)
    assert plackett_luce_sample(scores, 1, lengths=lengths)[0, 0, :100].max() < 100


def test_integer_labels_overflow_or_a_nan_label_is_counted(backend):
    def loss(scores, labels, **options):
        tensors = {k: torch.tensor(v, device=backend.device) for k, v in (("scores", scores), ("labels", labels))}
        return all_pairs_loss(**tensors, **options).item()

    assert loss([[5.0, 0.0]], [[2**63 - 1, -(2**63)]]) == pytest.approx(math.log1p(math.exp(-5)), rel=1e-5)
    weight = torch.tensor([0.0, 1.0], device=backend.device)
    nan_in_a_list_of_weight_0 = loss([[0.0, 1, 2]] * 2, [[math.nan, 1, 2], [0, 1, 2]], weight=weight)
    alone = loss([[0.0, 1, 2]], [[0.0, 1, 2]])
    assert nan_in_a_list_of_weight_0 == pytest.approx(alone / 2, rel=1e-5)


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_dynamic_shapes_of_ranks_do_not_compile(native, ties):
    def step(scores, ranks):
        return plackett_luce_loss(scores, ranks=ranks, ties=ties)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((4, 7), (3, 9)):
        scores, ranks = torch.randn(shape), torch.randint(1, 4, shape)
        torch.testing.assert_close(compiled(scores, ranks), step(scores, ranks))


def test_fake_tensors_are_read(native):
    with FakeTensorMode():
        scores, ranks = torch.randn(4, 6, requires_grad=True), torch.ones(4, 6)
        plackett_luce_loss(scores, ranks=ranks).backward()
        assert scores.grad.shape == scores.shape
        assert plackett_luce_sample(scores, 2, lengths=torch.ones(4, dtype=torch.long)).shape == (2, 4, 6)


def test_large_scores_swallow_the_noise_of_a_sample():
    orders = plackett_luce_sample(torch.full((2,), 1e7), 20_000, generator=torch.Generator().manual_seed(0))
    assert abs((orders[:, 0] == 0).float().mean() - 0.5) < 0.02


def test_a_nan_score_is_sampled_or_hidden(compiled_backend):
    scores = torch.tensor([[math.nan, 0.0, 0.0], [1.0, 0.0, 0.0]], device=compiled_backend.device)
    with pytest.raises(ValueError, match="scores: expected numbers, got nan at index 0"), rewardfuse.checks(True):
        plackett_luce_sample(scores, 1)
    weight = torch.zeros(3, device=compiled_backend.device)
    loss = plackett_luce_loss(scores, position_weight=weight, reduction="none")
    assert loss[0].isnan() and loss[1] == 0


def test_a_score_of_minus_infinity_that_nobody_ranked_makes_nan(backend):
    scores = torch.tensor([[0.0, 1.0, -torch.inf]], device=backend.device, requires_grad=True)
    loss = plackett_luce_loss(scores, top_k=1)
    loss.backward()
    expected = torch.softmax(scores.detach(), -1) - torch.tensor([1.0, 0, 0], device=backend.device)
    torch.testing.assert_close(scores.grad, expected)
    assert loss.item() == pytest.approx(math.log1p(math.e), rel=1e-6)
    assert plackett_luce_loss(scores.detach()).item() == math.inf


@pytest.mark.parametrize(
    "make",
    [
        lambda: rewardfuse.PlackettLuceLoss(top_k=0),
        lambda: rewardfuse.PlackettLuceLoss(ties="both"),
        lambda: rewardfuse.PlackettLuceLoss(reduction="x"),
        lambda: rewardfuse.AllPairsLoss(margin="x"),
        lambda: rewardfuse.AllPairsLoss(reduction="x"),
    ],
)
def test_a_module_with_a_wrong_option_is_made(make):
    with pytest.raises((ValueError, TypeError)):
        make()


def test_a_module_ignores_top_k_of_the_batch():
    scores, top_k = torch.randn(3, 4), torch.tensor([1, 2, 4])
    module = rewardfuse.PlackettLuceLoss(top_k=3)
    assert module(scores, top_k=top_k) == plackett_luce_loss(scores, top_k=top_k)
    assert module(scores) == plackett_luce_loss(scores, top_k=3)
