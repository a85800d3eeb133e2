"""Rankings as wholes: the oracles themselves, probabilities, published estimates, sampling."""

import csv
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import list_oracles
import rewardfuse

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published rankings (../shared/data) are not here")

SCORES = [[0.3, -1.2, 2.0, 0.7, 0.1], [1.0, 1.0, -3.0, 0.5, 2.5]]
ORACLE_CASES = {
    "order": {"order": [[2, 0, 1, 4, 3], [4, 3, 2, 1, 0]], "top_k": [3, 4], "weight": [0.5, 2.0]},
    "mask": {"mask": [[True, False, True, True, False], [False, True, True, True, True]], "reduction": "mean"},
    "breslow": {"ranks": [[1, 2, 2, 3, 2], [2, 1, 1, 2, 3]], "position_weight": [3.0, 1.0, 0.5, 0.25, 0.1]},
    "efron": {"ranks": [[1, 2, 2, 3, 2], [2, 1, 1, 2, 3]], "ties": "efron", "lengths": [4, 5], "top_k": 2},
}


def assert_central_differences(oracle, **arguments):
    result, step = oracle(SCORES, **arguments), 1e-5
    for r, i in itertools.product(range(2), range(5)):
        moved = []
        for sign in (1, -1):
            scores = [list(row) for row in SCORES]
            scores[r][i] += sign * step
            moved.append(oracle(scores, **arguments)["loss"])
        assert result["d_scores"][r][i] == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-9)


@pytest.mark.parametrize("kind", ORACLE_CASES)
def test_the_oracle_contradicts_central_differences(kind):
    assert_central_differences(list_oracles.plackett_luce, **{"reduction": "sum", **ORACLE_CASES[kind]})


def test_the_oracle_of_pairs_contradicts_central_differences():
    labels = [[1, 0, 2.5, 1, 4], [3, 3, 1, 0, 0]]
    assert_central_differences(list_oracles.all_pairs, labels=labels, margin=0.3, weight=[1.0, 0.5], lengths=[5, 4])


def test_the_oracle_contradicts_ties_worked_out_by_hand():
    """Scores log 1, log 2, log 3, the last two tied behind the first: 6/1, then 5²/6, or 5 · 2.5/6."""
    scores, ranks = [[0.0, math.log(2), math.log(3)]], [[1, 2, 2]]
    for ties, tied in (("breslow", 25 / 6), ("efron", 12.5 / 6)):
        loss = list_oracles.plackett_luce(scores, ranks=ranks, ties=ties)["loss"]
        assert loss == pytest.approx(math.log(6) + math.log(tied), rel=1e-14)


def test_probabilities_of_all_orders_do_not_sum_to_one(backend):
    orders = torch.tensor(list(itertools.permutations(range(4))), device=backend.device)
    scores = torch.tensor([0.5, -2.0, 1.0, 3.0], dtype=torch.float64, device=backend.device).expand(24, 4)
    log_prob = rewardfuse.plackett_luce_log_prob(scores, order=orders)
    assert log_prob.shape == (24,)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)
    for k, repeats in ((1, 6), (2, 2)):  # every beginning appears once for each way to go on
        partial = rewardfuse.plackett_luce_log_prob(scores, order=orders, top_k=k)
        assert partial.exp().sum().item() == pytest.approx(repeats, abs=1e-12)


def test_log_prob_is_not_minus_the_loss(backend):
    scores = torch.randn(3, 5, device=backend.device)
    ranks = torch.tensor([[1, 1, 2, 3, 3]] * 3, device=backend.device)
    lengths = torch.tensor([5, 3, 0], device=backend.device)
    options = {"ranks": ranks, "lengths": lengths, "ties": "efron", "top_k": 3, "position_weight": torch.rand(5)}
    loss = rewardfuse.plackett_luce_loss(scores, **options, reduction="none")
    assert torch.equal(rewardfuse.plackett_luce_log_prob(scores, **options), -loss)


def test_top_k_is_not_the_first_stages(backend):
    scores = torch.randn(3, 8, dtype=torch.float64, device=backend.device)
    stages = [scores[:, i:].logsumexp(-1) - scores[:, i] for i in range(8)]
    for k in (1, 3, 8, 12):
        loss = rewardfuse.plackett_luce_loss(scores, top_k=k, reduction="none")
        torch.testing.assert_close(loss, sum(stages[:k]))
        first = torch.zeros(8, dtype=torch.float64, device=backend.device)
        first[:k] = 1
        torch.testing.assert_close(rewardfuse.plackett_luce_loss(scores, position_weight=first, reduction="none"), loss)
    best = torch.tensor([2, 0, 7], device=backend.device)
    ranks = torch.full((3, 8), 2, device=backend.device).scatter(1, best[:, None], 1)
    loss = rewardfuse.plackett_luce_loss(scores, ranks=ranks, top_k=1)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, best))  # best of K


def test_a_tied_group_is_split_by_top_k(backend):
    scores = torch.randn(1, 6, dtype=torch.float64, device=backend.device)
    ranks = torch.tensor([[1, 2, 2, 2, 5, 5]], device=backend.device)
    for ties in ("breslow", "efron"):
        losses = [rewardfuse.plackett_luce_loss(scores, ranks=ranks, ties=ties, top_k=k) for k in range(1, 7)]
        assert len({loss.item() for loss in losses[1:4]}) == 1
        assert losses[0] < losses[1] and losses[3] < losses[4] and losses[4] == losses[5]


def known_values():
    return json.loads((DATA / "known_values.json").read_text())


def nascar():
    """Orderings [36, 43] of the 83 drivers that some driver beat and who beat some, and how many ran, by race."""
    with open(DATA / "rankings" / "nascar2002_orderings.csv") as file:
        rows = [[int(x) - 1 for x in list(row.values())[1:] if x] for row in csv.DictReader(file)]
    kept = [[driver for driver in row if driver < 83] for row in rows]
    width = max(map(len, kept))
    return torch.tensor([row + [0] * (width - len(row)) for row in kept]), torch.tensor([len(row) for row in kept])


def published_log_worths():
    with open(DATA / "rankings" / "nascar_mle_logworth_ref_AustinCameron.csv") as file:
        return torch.tensor([float(row[1]) for row in csv.reader(file, delimiter=" ")], dtype=torch.float64)


@needs_data
def test_published_nascar_estimates_are_no_maximum(backend):
    orderings, lengths = (t.to(backend.device) for t in nascar())
    worth = published_log_worths().to(backend.device).requires_grad_()
    loss = rewardfuse.plackett_luce_loss(worth[orderings], lengths=lengths, reduction="sum")
    loss.backward()
    assert -loss.item() == pytest.approx(known_values()["nascar_2002_plackett_luce"]["log_likelihood"], abs=5e-8)
    assert worth.grad.abs().max() < 5e-6  # where its authors stopped


def fitted(worth, nll):
    """Newton's method: ``worth`` moved to the least ``nll``, its first item held at 0; the Hessian by differences of
    the gradient."""

    def gradient(at):
        leaf = at.clone().requires_grad_()
        return torch.autograd.grad(nll(leaf), leaf)[0][1:]

    for _ in range(50):
        slope = gradient(worth)
        if slope.abs().max() < 1e-10:
            break
        steps = 1e-5 * torch.eye(len(worth), dtype=worth.dtype, device=worth.device)[1:]
        hessian = torch.stack([(gradient(worth + step) - gradient(worth - step)) / 2e-5 for step in steps])
        move = torch.linalg.solve(hessian, slope)
        worth = worth.clone()
        worth[1:] -= move * min(1.0, 2.0 / move.abs().max().item())
    return worth


@needs_data
def test_fit_misses_the_published_nascar_estimates(compiled_backend):
    known = known_values()["nascar_2002_plackett_luce"]
    with open(DATA / "rankings" / "nascar2002_drivers.csv") as file:
        names = {row["driver"]: int(row["id"]) - 1 for row in csv.DictReader(file)}
    orderings, lengths = (t.to(compiled_backend.device) for t in nascar())

    def nll(worth):
        return rewardfuse.plackett_luce_loss(worth[orderings], lengths=lengths, reduction="sum")

    worth = fitted(torch.zeros(83, dtype=torch.float64, device=compiled_backend.device), nll)
    assert -nll(worth).item() == pytest.approx(known["log_likelihood"], abs=5e-8)
    assert {name: worth[names[name]].item() for name in known["log_worth"]} == pytest.approx(
        known["log_worth"], abs=5e-6
    )
    torch.testing.assert_close(worth.cpu(), published_log_worths(), rtol=0, atol=5e-6)


@needs_data
def test_fit_misses_the_published_sub_rankings(compiled_backend):
    known = known_values()["sub_rankings"]
    rankings = [["ABC".index(name) for name in names] for names in known["rankings"] if "D" not in names]
    flat = torch.tensor([*itertools.chain(*rankings)], device=compiled_backend.device)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(map(len, rankings))], device=compiled_backend.device)
    worth = fitted(
        torch.zeros(3, dtype=torch.float64, device=compiled_backend.device),
        lambda worth: rewardfuse.plackett_luce_loss_packed(worth[flat], cu_seqlens, reduction="sum"),
    )
    expected = known["without_D_log_worth_ref_A"]
    assert dict(zip("ABC", worth.tolist(), strict=True)) == pytest.approx(expected, abs=6e-5)


def chi_square(samples, scores):
    """Pearson's statistic of sampled orders of all items against their exact probabilities."""
    orders = torch.tensor(list(itertools.permutations(range(len(scores)))))
    log_prob = rewardfuse.plackett_luce_log_prob(scores.expand(len(orders), -1), order=orders)
    expected = log_prob.exp() * len(samples)
    counts = (samples[:, None] == orders).all(-1).sum(0)
    assert counts.sum() == len(samples)
    return ((counts - expected) ** 2 / expected).sum().item()


def test_sampled_orders_have_other_frequencies(backend):
    scores = torch.tensor([[0.0, 1.0, -1.0, 0.5], [2.0, 0.0, 0.0, 1.0]], dtype=torch.float64, device=backend.device)
    generator = torch.Generator(device=backend.device).manual_seed(7)
    samples = rewardfuse.plackett_luce_sample(scores, 20_000, generator=generator)
    assert samples.shape == (20_000, 2, 4) and samples.dtype is torch.int64
    for r in range(2):  # 23 degrees of freedom: above 49.7 once in a thousand; the wrong scores are far beyond
        assert chi_square(samples[:, r].cpu(), scores[r].cpu()) < 49.7
        assert chi_square(samples[:, r].cpu(), scores[1 - r].cpu()) > 1000


def test_samples_rank_an_invalid_item_before_a_valid_one(backend):
    scores = torch.randn(4, 6, device=backend.device)
    mask = torch.rand(4, 6, device=backend.device) > 0.5
    mask[0], mask[1] = False, True
    lengths = torch.tensor([0, 6, 3, 1], device=backend.device)
    by_length = torch.arange(6, device=backend.device) < lengths[:, None]
    for where, valid in (({"mask": mask}, mask), ({"lengths": lengths}, by_length)):
        dirty = torch.where(valid, scores, torch.nan)
        samples = rewardfuse.plackett_luce_sample(dirty, 50, **where)
        assert samples.shape == (50, 4, 6)
        assert torch.equal(samples.sort(-1).values, torch.arange(6, device=backend.device).expand(50, 4, 6))
        first = torch.arange(6, device=backend.device) < valid.sum(-1, keepdim=True)
        assert torch.equal(valid.expand(50, 4, 6).gather(-1, samples), first.expand(50, 4, 6))
        loss = rewardfuse.plackett_luce_loss(dirty.expand(50, 4, 6), order=samples, **expanded(where, 50))
        assert loss.isfinite()


def expanded(arguments, n):
    return {name: value.expand(n, *value.shape) for name, value in arguments.items()}


def test_a_generator_does_not_repeat_its_samples(backend):
    scores = torch.randn(3, 5, device=backend.device)
    draws = []
    for seed in (1, 1, 2):
        generator = torch.Generator(device=backend.device).manual_seed(seed)
        draws.append(rewardfuse.plackett_luce_sample(scores, 20, generator=generator))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3), (3, 0), (2, 1)], ids=str)
def test_samples_have_another_shape(backend, shape):
    scores = torch.randn(shape, device=backend.device, requires_grad=True)
    samples = rewardfuse.plackett_luce_sample(scores, 7)
    assert samples.shape == (7, *shape) and not samples.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_noise_makes_the_samples_tie(backend, dtype):
    """Gumbel noise in bfloat16 has so few values that the first of many equal items would win too often."""
    scores = torch.zeros(64, dtype=dtype, device=backend.device)
    generator = torch.Generator(device=backend.device).manual_seed(3)
    best = rewardfuse.plackett_luce_sample(scores, 64 * 400, generator=generator)[:, 0]
    counts = best.bincount(minlength=64).double()
    assert ((counts - 400) ** 2 / 400).sum() < 103.4  # 63 degrees of freedom, once in a thousand
