"""kl_penalized_rewards where nothing counts, where inputs are broken, and what its gradients reach."""

import pytest
import torch

import kl_oracles
import rewardfuse
from kl import ESTIMATORS, OUTPUTS, per_row, rewards_of
from pairs import assert_close, to_device

BAD = (torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("terminal", ["last", "one_past"])
def test_a_masked_nan_reaches_a_reward_a_sum_or_a_gradient(backend, bad, terminal):
    """In each of the three inputs and in all at once, where infinities may cancel."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    clean = {name: torch.randn(5, 4) for name in ("logprobs", "ref_logprobs", "scores")}
    if terminal == "one_past":
        clean["scores"] = torch.randn(5)
    options = {"kl_coef": 0.5, "estimator": "k3", "differentiable_rewards": True, "terminal": terminal}
    options |= {"ended": torch.tensor([True, False, True, False, False]), "missing_eos_penalty": 1.0}
    results = []
    for places in ((), ("logprobs",), ("ref_logprobs",), ("scores",), (*clean,)):
        tensors = {name: t.clone() for name, t in clean.items()}
        for name, t in tensors.items():
            t[~mask if t.dim() == 2 else ~mask.any(-1)] = bad if name in places else 0.0
        tensors = to_device(tensors, backend.device)
        leaves = [tensors[name].requires_grad_() for name in ("logprobs", "scores")]
        result = rewardfuse.kl_penalized_rewards(
            **tensors, **to_device(options, backend.device), mask=mask.to(backend.device)
        )
        outputs = [getattr(result, name) for name in OUTPUTS]
        gradients = torch.autograd.grad([o.sum() for o in outputs], leaves)
        results.append((*outputs, *result.stats, *gradients))
        assert (gradients[0].cpu()[~mask] == 0).all()
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            assert torch.equal(left, right) and right.isfinite().all()


def test_a_nan_leaves_its_row(backend):
    x, scores = torch.randn(4, 5), torch.randn(4)
    clean = rewards_of(backend, x, scores=scores)
    for spoiled in ("logprobs", "scores"):
        dirty_x, dirty_scores = x.clone(), scores.clone()
        (dirty_x[1] if spoiled == "logprobs" else dirty_scores)[1] = torch.nan
        dirty = rewards_of(backend, dirty_x, scores=dirty_scores)
        for name in OUTPUTS:
            others = [0, 2, 3]
            assert torch.equal(getattr(dirty, name)[others], getattr(clean, name)[others])
        assert dirty.rewards[1].isnan().any() and dirty.sequence_reward[1].isnan()


def test_rewards_carry_a_graph_unasked_or_none_when_asked(backend):
    logprobs, ref, scores = (
        torch.randn(shape, device=backend.device, requires_grad=True) for shape in ((3, 4), (3, 4), (3,))
    )
    detached = rewardfuse.kl_penalized_rewards(logprobs, ref, scores=scores, kl_coef=0.1)
    attached = rewardfuse.kl_penalized_rewards(logprobs, ref, scores=scores, kl_coef=0.1, differentiable_rewards=True)
    for result, asked in ((detached, False), (attached, True)):
        wants = [getattr(result, name).requires_grad for name in OUTPUTS]
        assert wants == [asked, True, True, asked]
        assert not any(value.requires_grad for value in result.stats)
        assert not result.ref_logprobs.requires_grad and result.entropy is None
    for name in OUTPUTS:
        assert torch.equal(getattr(detached, name), getattr(attached, name))
    of_rewards = torch.autograd.grad(attached.rewards.sum(), (logprobs, ref, scores), allow_unused=True)
    assert of_rewards[1] is None
    torch.testing.assert_close(of_rewards[0], torch.full_like(logprobs, -0.1))
    assert of_rewards[2].tolist() == [1, 1, 1]
    of_kl = torch.autograd.grad(detached.kl.sum(), (logprobs, ref, scores), allow_unused=True)
    assert of_kl[0].tolist() == [[1] * 4] * 3 and of_kl[1] is None and of_kl[2] is None


def test_only_scores_want_a_gradient(backend):
    logprobs, scores = torch.randn(3, 4, device=backend.device), torch.randn(3, device=backend.device)
    scores.requires_grad_()
    result = rewardfuse.kl_penalized_rewards(
        logprobs, -logprobs, scores=scores, kl_coef=0.1, differentiable_rewards=True
    )
    assert torch.autograd.grad(result.sequence_reward.sum(), scores)[0].tolist() == [1, 1, 1]


def test_a_clipped_or_replaced_score_keeps_a_slope_or_a_boundary_loses_it(backend):
    scores = torch.tensor([-3.0, -2.0, 0.0, 2.0, 3.0, 1.0], device=backend.device, requires_grad=True)
    ended = torch.tensor([True] * 5 + [False], device=backend.device)
    x = torch.zeros(6, 2, device=backend.device)
    for missing_eos, last in (("subtract", 1), ("replace", 0)):
        result = rewardfuse.kl_penalized_rewards(
            x,
            x,
            scores=scores,
            score_clip=2.0,
            kl_coef=0.1,
            differentiable_rewards=True,
            ended=ended,
            missing_eos_penalty=1.0,
            missing_eos=missing_eos,
        )
        assert torch.autograd.grad(result.rewards.sum(), scores)[0].tolist() == [0, 1, 1, 1, 0, last]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gradient_estimator", [None, "k3"])
def test_kl_differs_from_approx_kl(backend, estimator, gradient_estimator):
    mask = (torch.rand(4, 7) > 0.3).to(backend.device)
    ref = torch.randn(4, 7, device=backend.device)
    options = {"estimator": estimator, "gradient_estimator": gradient_estimator}
    options |= {"input_clamp": (-1.0, 1.5), "output_clamp": (None, 0.75)}
    results, upstream = [], torch.randn(4, 7, device=backend.device)
    start = torch.randn(4, 7)
    for function in (rewardfuse.approx_kl, rewardfuse.kl_penalized_rewards):
        leaf = start.to(backend.device, copy=True).requires_grad_()
        if function is rewardfuse.approx_kl:
            kl = function(leaf, ref, mask=mask, **options)
        else:
            kl = function(leaf, ref, mask, kl_coef=0.1, **options).kl
        results.append((kl.detach(), *torch.autograd.grad(kl, leaf, upstream)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_a_sum_over_many_tokens_drifts(compiled_backend):
    """100,000 equal terms: a running float32 sum is off by more than 1e-4."""
    tokens, x = 100_000, 0.1
    result = rewards_of(compiled_backend, torch.full((2, tokens), x), kl_coef=1.0, scores=[1.0, -1.0])
    exact = float(torch.tensor(x)) * tokens
    assert_close(result.sequence_kl, [exact, exact], 1e-7, "sequence_kl")
    assert_close(result.sequence_reward, [1 - exact, -1 - exact], 1e-7, "sequence_reward")
    assert_close(result.stats.kl, exact / tokens, 1e-7, "mean kl")
    assert_close(result.stats.sequence_kl, exact, 1e-7, "mean sequence_kl")


def test_rows_of_several_blocks_are_counted_twice_or_not_at_all(compiled_backend):
    mask = torch.zeros(3, dtype=torch.bool).expand(3000, 3).clone()
    mask[::3, 1] = True
    result = rewards_of(compiled_backend, torch.ones(3000, 3), mask, kl_coef=1.0)
    assert [value.item() for value in result.stats] == [1, 1, 0, -1, 1000, 1000]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 3), (2, 3, 0)], ids=str)
def test_nothing_valid_gives_nan_or_a_gradient(backend, shape):
    for mask in (None, torch.zeros(shape, dtype=torch.bool, device=backend.device)):
        leaf = torch.randn(shape, device=backend.device, requires_grad=True)
        scores = torch.full(shape[:-1], torch.nan, device=backend.device)
        result = rewardfuse.kl_penalized_rewards(leaf, torch.zeros_like(leaf), mask, scores=scores, kl_coef=0.1)
        (result.kl.sum() + result.sequence_kl.sum()).backward()
        assert result.rewards.shape == shape and result.sequence_kl.shape == shape[:-1]
        for value in (*(getattr(result, name) for name in OUTPUTS), leaf.grad, *result.stats):
            assert (value == 0).all()


def test_all_masked_gives_nan_or_a_gradient(backend):
    leaf = torch.full((3, 4), torch.nan, device=backend.device, requires_grad=True)
    mask = torch.zeros(3, 4, dtype=torch.bool, device=backend.device)
    scores = torch.full((3,), torch.nan, device=backend.device, requires_grad=True)
    ended = torch.zeros(3, dtype=torch.bool, device=backend.device)
    result = rewardfuse.kl_penalized_rewards(
        leaf, leaf, mask, scores=scores, kl_coef=0.1, ended=ended, missing_eos_penalty=1.0, differentiable_rewards=True
    )
    outputs = [getattr(result, name) for name in OUTPUTS]
    torch.autograd.backward([o.sum() for o in outputs])
    for value in (*outputs, *result.stats, leaf.grad, scores.grad):
        assert (value == 0).all()


def test_a_row_alone_differs_from_the_same_row_in_a_batch(backend):
    x, scores = torch.randn(3, 5), torch.randn(3)
    batch = rewards_of(backend, x, scores=scores, estimator="k3")
    for i in range(3):
        row = rewards_of(backend, x[i], scores=scores[i], estimator="k3")
        assert row.sequence_kl.shape == ()
        for name in OUTPUTS:
            assert torch.equal(getattr(row, name), getattr(batch, name)[i])


@pytest.mark.parametrize(("terminal", "per_token"), [("last", False), ("one_past", False), ("last", True)])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradcheck_fails(compiled_backend, terminal, per_token, estimator):
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]]).bool().to(compiled_backend.device)
    options = {"ended": torch.tensor([True, False, False], device=compiled_backend.device), "missing_eos_penalty": 0.5}
    options |= {"kl_coef": 0.3, "estimator": estimator, "input_clamp": 1.1, "output_clamp": (0.01, 0.4)}
    logprobs, ref = (torch.randn(3, 3, dtype=torch.float64, device=compiled_backend.device) for _ in "ab")
    scores = torch.randn((3, 3) if per_token else 3, dtype=torch.float64, device=compiled_backend.device)

    def function(logprobs, scores):
        result = rewardfuse.kl_penalized_rewards(
            logprobs,
            ref,
            mask,
            scores=scores,
            score_clip=0.8,
            terminal=terminal,
            differentiable_rewards=True,
            **options,
        )
        return [getattr(result, name) for name in OUTPUTS]

    torch.autograd.gradcheck(function, (logprobs.requires_grad_(), scores.requires_grad_()))


def test_a_policy_gradient_of_the_rewards_follows_another_objective(backend):
    """One token, five actions, all enumerated: E[∇log π · (r + entropy-free baseline)] is ∇(E[score] - beta KL)."""
    logits = torch.tensor([0.3, -1.2, 0.8, 0.0, -0.4], dtype=torch.float64, device=backend.device, requires_grad=True)
    ref = torch.tensor([-0.2, 0.5, 0.1, -1.0, 0.7], dtype=torch.float64, device=backend.device).log_softmax(-1)
    scores, beta = torch.tensor([1.0, -0.5, 0.25, 2.0, 0.0], dtype=torch.float64, device=backend.device), 0.7
    logprobs = logits.log_softmax(-1)
    result = rewardfuse.kl_penalized_rewards(logprobs[:, None], ref[:, None], scores=scores, kl_coef=beta)
    policy_gradient = (logprobs.detach().exp() * logprobs * result.rewards[:, 0]).sum()
    (gradient,) = torch.autograd.grad(policy_gradient, logits)
    logprobs = logits.log_softmax(-1)
    objective = (logprobs.exp() * (scores - beta * (logprobs - ref))).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(objective, logits)[0], rtol=1e-12, atol=1e-15)


class TestWhitening:
    MASK = ((1, 1, 0, 0), (0, 1, 1, 1), (0, 0, 0, 0))

    @pytest.mark.parametrize("shift_mean", [True, False])
    @pytest.mark.parametrize("terminal", ["last", "one_past"])
    def test_whitened_rewards_differ_from_the_equations(self, backend, terminal, shift_mean):
        x, scores = torch.randn(3, 4), torch.randn(3)
        options = {"scores": scores, "terminal": terminal, "kl_coef": 0.5}
        plain = rewards_of(backend, x, self.MASK, **options)
        result = rewards_of(backend, x, self.MASK, **options, whiten_rewards=True, whiten_shift_mean=shift_mean)
        places = torch.tensor(self.MASK).bool()
        if terminal == "one_past":
            places[0, 2] = True  # the score's own place counts too
        expected = kl_oracles.masked_whiten(per_row(plain.rewards), places.flatten().tolist(), shift_mean)
        assert_close(result.rewards, expected, 1e-6, "whitened rewards")
        for name in OUTPUTS[1:]:  # sums and statistics are of the rewards before
            assert torch.equal(getattr(result, name), getattr(plain, name))
        assert all(torch.equal(a, b) for a, b in zip(result.stats, plain.stats, strict=True))

    def test_whitened_rewards_carry_a_graph_unasked(self, backend):
        leaf = torch.randn(3, 4, device=backend.device, requires_grad=True)
        options = {"scores": torch.randn(3, device=backend.device), "kl_coef": 0.5, "whiten_rewards": True}
        for asked in (False, True):
            result = rewardfuse.kl_penalized_rewards(
                leaf, torch.zeros_like(leaf), **options, differentiable_rewards=asked
            )
            assert result.rewards.requires_grad is asked
