"""kl_penalized_rewards against the equations, on every backend that the machine has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kl_oracles
import rewardfuse
from kl import (
    CLAMPS,
    GRADIENT_TOLERANCE,
    OUTPUTS,
    TOLERANCE,
    chooser,
    draw_estimators,
    draw_logprobs,
    dtype_of,
    per_row,
    poisoned,
    rewards_of,
    rounding,
    rows,
    stored,
    within,
)
from pairs import assert_close, strided, to_device

ROWS = [(), (0,), (5,), (5,), (2, 3), (4, 1, 3)]
LENGTHS = [0, 1, 2, 3, 5, 8, 9, 16, 17, 33]


def draw_mask(pick, shape):
    """Right- or left-padded rows, rows with holes, or none; empty rows among them."""
    kind, steps = pick(["none", "right", "left", "holes", "empty"]), torch.arange(shape[-1])
    lengths = torch.randint(0, shape[-1] + 1, (*shape[:-1], 1))
    kinds = {
        "none": None,
        "right": steps < lengths,
        "left": steps >= lengths,
        "holes": (torch.rand(shape) > 0.4) & (torch.rand(*shape[:-1], 1) > 0.2),
        "empty": torch.zeros(shape, dtype=torch.bool),
    }
    return kinds[kind]


def draw_scores(pick, shape, mask):
    """None, one a row or one a token, with rubbish where nothing may be read."""
    kind = pick(["none", "sequence", "sequence", "token"])
    if kind == "none":
        return None
    dtype = pick([torch.float32, torch.bfloat16, torch.float64])
    scores = 2 * torch.randn(shape if kind == "token" else shape[:-1], dtype=torch.float64).to(dtype)
    return poisoned(pick, scores, mask if kind == "token" or mask is None else mask.any(-1))


def draw_shaping(pick, shape, mask, backend):
    """Options as the public function takes them, and as the oracle does."""
    scores = draw_scores(pick, shape, mask)
    if backend.interpreted and scores is not None and scores.dtype is torch.bfloat16:
        scores = scores.float()
    clip, exact_clip = CLAMPS[pick([*CLAMPS])]
    coefficient = pick([0.0, 0.05, 2.5, torch.tensor(0.3), torch.tensor(0.7).double()])
    per_token = scores is not None and scores.dim() == len(shape)
    both = {
        "missing_eos": pick(["subtract", "replace"]),
        "terminal": "last" if per_token else pick(["last", "one_past"]),
        "missing_eos_penalty": pick([None, 0.0, 1.5, 1.5]),
    }
    ended = torch.rand(shape[:-1]) > 0.5 if both["missing_eos_penalty"] is not None else None
    public = both | {"scores": scores, "score_clip": clip, "kl_coef": coefficient, "ended": ended}
    exact = both | {
        "scores": rows(scores) if per_token else per_row(scores),
        "score_clip": exact_clip,
        "kl_coef": float(coefficient),
        "ended": per_row(ended, torch.bool),
    }
    return public, exact


def draw_cotangents(pick, shape, differentiable):
    """Random gradients of some outputs, and the same for the oracle."""
    names = pick([OUTPUTS, ("kl",), ("sequence_kl",), ("kl", "sequence_kl"), ("rewards",)])
    names = [name for name in names if differentiable or "kl" in name]
    shapes = {"rewards": shape, "kl": shape, "sequence_kl": shape[:-1], "sequence_reward": shape[:-1]}
    given = {name: torch.randn(shapes[name], dtype=torch.float64) for name in names}
    exact = {name: rows(g) if shapes[name] == shape else per_row(g) for name, g in given.items()}
    return given, exact


def assert_values(result, expected, kl_coef, shape, dtype, tolerance):
    """Tokens are exact by themselves, sums and means by the size of what they add."""
    accumulated = torch.float64 if dtype is torch.float64 else torch.float32
    terms = [sum(map(abs, row)) for row in expected["kl"]]
    sizes = {"sequence_kl": [max(1.0, kl) for kl in terms]}
    sizes["sequence_reward"] = [
        4 + kl_coef * kl + sum(map(abs, row)) for kl, row in zip(terms, expected["rewards"], strict=True)
    ]
    for name in OUTPUTS:
        value, exact = getattr(result, name), stored(expected[name], torch.float64)
        assert value.dtype is accumulated and value.shape == (shape[:-1] if name in sizes else shape)
        size = stored(sizes.get(name, 1.0), torch.float64)
        assert_close(value.detach().cpu().flatten() / size if name in sizes else value, exact / size, tolerance, name)
    size = sum(sizes["sequence_kl"]) + sum(sizes["sequence_reward"])
    for name, exact in expected["stats"].items():
        value = getattr(result.stats, name)
        assert value.shape == () and value.device == result.kl.device and not value.requires_grad
        scale = max(1.0, size / max(1, expected["stats"]["sequences"]))
        assert_close(value / scale, exact / scale, tolerance, name)


def assert_gradients(result, leaves, cotangents, expected, dtype, slack):
    """Gradients of the log-probs and, where they want one, the scores."""
    outputs = [getattr(result, name) for name in cotangents]
    wanting = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    upstream = [g.to(o.device, o.dtype) for g, o in zip(cotangents.values(), outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, wanting, upstream, allow_unused=True)
    for leaf, name in zip(leaves, ("d_logprobs", "d_scores"), strict=True):
        if leaf is None or not leaf.requires_grad:
            continue
        gradient = gradients[next(i for i, wants in enumerate(wanting) if wants is leaf)]
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        assert gradient.dtype is leaf.dtype
        exact = within(expected[name], leaf.dtype)
        assert_close(gradient, exact, max(GRADIENT_TOLERANCE[leaf.dtype], GRADIENT_TOLERANCE[dtype]) + slack, name)


def assert_equations(backend, seed):
    """All outputs and gradients of one call, chosen by its seed, equal the oracle's."""
    pick = chooser(seed)
    dtype, shape = dtype_of(pick, backend), (*pick(ROWS), pick(LENGTHS))
    mask = draw_mask(pick, shape)
    logprobs, ref = (poisoned(pick, t, mask) for t in draw_logprobs(pick, shape, dtype))
    options, exact_options = draw_estimators(pick)
    shaping, exact_shaping = draw_shaping(pick, shape, mask, backend)
    differentiable = pick([False, True])
    cotangents, exact_cotangents = draw_cotangents(pick, shape, differentiable)
    layout = pick(["contiguous", "transposed", "every second", "three strides"])

    def placed(tensor):
        return None if tensor is None else strided(tensor.to(backend.device, copy=True), layout)

    leaf, scores = placed(logprobs).requires_grad_(), placed(shaping["scores"])
    if scores is not None:
        scores.requires_grad_(differentiable)
    arguments = to_device(options | shaping, backend.device) | {"scores": scores, "ended": placed(shaping["ended"])}
    result = rewardfuse.kl_penalized_rewards(
        leaf, placed(ref), placed(mask), **arguments, differentiable_rewards=differentiable
    )

    expected = kl_oracles.kl_penalized_rewards(
        rows(logprobs), rows(ref), rows(mask, torch.bool), **exact_options, **exact_shaping, grads=exact_cotangents
    )
    slack = rounding(logprobs, ref, mask, dtype)
    assert_values(result, expected, exact_shaping["kl_coef"], shape, dtype, 4 * (TOLERANCE[dtype] + slack))
    assert_gradients(result, (leaf, scores), cotangents, expected, dtype, 16 * slack)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_value_or_gradient_differs_from_the_equations(backend, seed):
    assert_equations(backend, seed)


@settings(max_examples=120)
@given(seed=st.integers(2**31, 2**32))
def test_value_or_gradient_differs_from_the_equations_in_more_cases(compiled_backend, seed):
    assert_equations(compiled_backend, seed)


def test_a_row_without_a_valid_token_gets_its_score_or_dilutes_a_mean(backend):
    for terminal in ("last", "one_past"):
        result = rewards_of(
            backend,
            [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [4.0, 5.0, 6.0]],
            [[True, True, False], [False] * 3, [True, True, True]],
            scores=[10.0, 99.0, 20.0],
            ended=[True, False, True],
            missing_eos_penalty=7.0,
            terminal=terminal,
        )
        assert result.rewards[1].tolist() == [0, 0, 0] and result.kl[1].tolist() == [0, 0, 0]
        assert result.sequence_kl.tolist() == [3, 0, 15] and result.sequence_reward.tolist() == [8.5, 0, 12.5]
        assert_close(torch.stack(result.stats), [18 / 5, 9, 15, 10.5, 5, 2], 1e-7, "stats")


def test_a_score_misses_the_last_valid_token_of_a_row_with_padding_or_holes(backend):
    mask = [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]
    result = rewards_of(backend, torch.zeros(6, 5), mask, scores=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert result.rewards.nonzero().tolist() == [[0, 4], [1, 1], [2, 4], [3, 2], [4, 4], [5, 0]]
    assert result.rewards.sum(-1).tolist() == [1, 2, 3, 4, 5, 6]


def test_one_past_leaves_the_row_or_forgets_the_kl_of_the_last_token(backend):
    mask = [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0]]
    result = rewards_of(backend, torch.ones(5, 4), mask, scores=[10.0] * 5, terminal="one_past")
    expected = [[-0.5, -0.5, -0.5, 9.5], [0, 0, -0.5, 9.5], [-0.5, -0.5, 10, 0], [-0.5, 0, -0.5, 10], [0, 0, -0.5, 10]]
    assert result.rewards.tolist() == expected
    assert result.sequence_reward.tolist() == [sum(row) for row in expected]
    assert rewards_of(backend, torch.ones(2, 1), scores=[3.0, 4.0], terminal="one_past").rewards.tolist() == [
        [2.5],
        [3.5],
    ]


@pytest.mark.parametrize(
    ("missing_eos", "expected"),
    [("subtract", [-2.0, 5.0, -4.0, -2.5, 0.5]), ("replace", [-2.0, -1.5, -4.0, -1.5, 0.5])],
)
def test_a_penalty_is_clipped_or_hits_who_ended(backend, missing_eos, expected):
    """Scores are clipped to [-4, 6.5] first; the penalty is 1.5."""
    result = rewards_of(
        backend,
        torch.zeros(5, 2),
        scores=[-2.0, 9.0, -9.0, -1.0, 0.5],
        score_clip=(-4.0, 6.5),
        ended=[True, False, True, False, True],
        missing_eos_penalty=1.5,
        missing_eos=missing_eos,
    )
    assert result.rewards[:, 0].tolist() == [0] * 5 and result.rewards[:, 1].tolist() == expected
    assert result.stats.score.item() == pytest.approx(sum(expected) / 5)


@pytest.mark.parametrize("scores", [None, [4.0, 4.0, 4.0, 4.0]], ids=["no scores", "scores"])
@pytest.mark.parametrize("missing_eos", ["subtract", "replace"])
def test_a_penalty_stands_elsewhere_than_the_score(backend, missing_eos, scores):
    mask = [[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]
    options = {"ended": [False] * 4, "missing_eos_penalty": 1.0, "missing_eos": missing_eos}
    options |= {} if scores is None else {"scores": scores}
    amount = -1.0 if scores is None or missing_eos == "replace" else 3.0
    for terminal, places in (("last", (1, 3, 2)), ("one_past", (2, 3, 3))):
        result = rewards_of(backend, torch.zeros(4, 4), mask, terminal=terminal, **options)
        expected = torch.zeros(4, 4)
        expected[torch.arange(3), torch.tensor(places)] = amount
        assert torch.equal(result.rewards.cpu(), expected)


def test_a_clip_after_the_penalty(backend):
    options = {"scores": [-4.0], "ended": [False], "missing_eos_penalty": 3.0, "score_clip": 5.0}
    assert rewards_of(backend, [[0.0]], **options).rewards.tolist() == [[-7.0]]
    options |= {"missing_eos": "replace", "score_clip": 1.0}
    assert rewards_of(backend, [[0.0]], **options).rewards.tolist() == [[-3.0]]


def test_a_clip_makes_a_score_where_there_is_none(backend):
    result = rewards_of(backend, torch.zeros(2, 2), score_clip=(0.5, None))
    assert (result.rewards == 0).all() and result.stats.score == 0
    options = {"ended": [False, True], "missing_eos_penalty": 2.0, "score_clip": (0.5, None)}
    assert rewards_of(backend, torch.zeros(2, 2), **options).rewards.tolist() == [[0, -2], [0, 0]]


def test_a_penalty_of_0_does_not_replace_the_score(backend):
    options = {"scores": [4.0, 4.0], "ended": [False, True], "missing_eos": "replace", "missing_eos_penalty": 0.0}
    assert rewards_of(backend, [[0.0], [0.0]], **options).rewards.tolist() == [[0.0], [4.0]]


def test_a_penalty_needs_a_score(backend):
    for missing_eos in ("subtract", "replace"):
        options = {"ended": [False, True], "missing_eos_penalty": 2.0, "missing_eos": missing_eos}
        assert rewards_of(backend, torch.zeros(2, 2), **options).rewards.tolist() == [[0, -2], [0, 0]]


@pytest.mark.parametrize(("missing_eos", "last"), [("subtract", 0.5), ("replace", -1.5)])
def test_scores_of_tokens_are_summed_at_the_end_or_penalized_elsewhere(backend, missing_eos, last):
    result = rewards_of(
        backend,
        [[2.0, 2.0, 2.0, 2.0]] * 3,
        [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
        scores=[[9.0, 1e9, 2.0, 1e9], [0.0, 1.0, -9.0, 2.0], [1.0] * 4],
        score_clip=(-4.0, 5.0),
        ended=[False, True, False],
        missing_eos_penalty=1.5,
        missing_eos=missing_eos,
    )
    assert result.rewards.tolist() == [[4, 0, last - 1, 0], [-1, 0, -5, 1], [0] * 4]
    assert result.stats.score.item() == pytest.approx((5 + last + (0 + 1 - 4 + 2)) / 2)


@pytest.mark.parametrize("terminal", ["last", "one_past"])
def test_a_0d_coefficient_differs_from_the_number(backend, terminal):
    x, mask, scores = torch.randn(4, 6), torch.rand(4, 6) > 0.3, torch.randn(4)
    results = []
    for dtype in (None, torch.float32, torch.float64, torch.float16, torch.int64):
        coefficient = 2.0 if dtype is None else torch.tensor(2, dtype=dtype, device=backend.device)
        results.append(rewards_of(backend, x, mask, kl_coef=coefficient, scores=scores, terminal=terminal))
    for other in results[1:]:
        assert torch.equal(other.rewards, results[0].rewards)
        assert torch.equal(other.sequence_reward, results[0].sequence_reward)


@pytest.mark.parametrize("estimator", ["k1", "k2"])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_coefficient_of_0_times_an_infinite_kl_is_nan(backend, estimator, as_tensor, differentiable):
    leaf = torch.tensor([[torch.inf, 1.0], [-torch.inf, 2.0]], device=backend.device, requires_grad=True)
    coefficient = torch.tensor(0.0, device=backend.device) if as_tensor else 0.0
    result = rewardfuse.kl_penalized_rewards(
        leaf,
        torch.zeros_like(leaf),
        scores=torch.tensor([3.0, 4.0], device=backend.device),
        kl_coef=coefficient,
        estimator=estimator,
        differentiable_rewards=differentiable,
    )
    assert result.rewards.tolist() == [[0, 3], [0, 4]] and result.sequence_reward.tolist() == [3, 4]
    assert result.kl.isinf().tolist() == [[True, False]] * 2
    assert result.stats.sequence_reward == 3.5 and result.stats.score == 3.5
    if differentiable:
        (gradient,) = torch.autograd.grad(result.rewards.sum() + result.sequence_reward.sum(), leaf)
        assert gradient[:, 1].tolist() == [0, 0]


def test_an_infinite_kl_with_a_coefficient_is_hidden(backend):
    result = rewards_of(backend, [[torch.inf, 1.0], [1.0, 1.0]], scores=[0.0, 0.0])
    assert result.rewards.tolist() == [[-torch.inf, -0.5], [-0.5, -0.5]]
    assert result.sequence_kl.tolist() == [torch.inf, 2]
