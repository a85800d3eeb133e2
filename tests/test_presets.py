"""Presets against TRL's own lines and NeMo-RL's formula: equal where these are right, right where they are not."""

import doctest
import math
from types import SimpleNamespace

import pytest
import torch

import trainer_code
from preset_batches import BETA, CLOSE, gap, kl_of, responses, rewards_of, same_on_valid_tokens
from rewardfuse import presets


@pytest.fixture
def batch():
    return responses()


# TRL


def trl_rloo(batch, reward_clip_range=None):
    tree = trainer_code.source("trl", "trainer/rloo_trainer.py")
    method = "_generate_and_score_completions"
    clip = trainer_code.conditional(tree, method, "self.reward_clip_range", "rewards")
    penalty = trainer_code.conditional(tree, method, "self.beta != 0.0", "per_token_kl")
    trainer = SimpleNamespace(reward_clip_range=reward_clip_range, beta=BETA)
    return trainer_code.run(
        tree,
        [clip, penalty],
        self=trainer,
        rewards=batch.scores,
        old_per_token_logps=batch.logprobs,
        ref_per_token_logps=batch.ref,
        completion_mask=batch.mask.int(),
        gather=lambda tensor: tensor,
    )


@pytest.mark.parametrize("clip", [None, (-5.0, 2.0)])
def test_rewards_differ_from_rloo_trainer(batch, clip):
    theirs = trl_rloo(batch, clip).rewards
    ours = rewards_of(batch, presets.trl_rloo(clip), differentiable_rewards=True).sequence_reward
    torch.testing.assert_close(ours, theirs, **CLOSE)
    for a, b in zip(*(torch.autograd.grad(out[::2].sum(), batch.logprobs) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_kl_differs_from_rloo_trainer(batch):
    same_on_valid_tokens(batch, kl_of(batch, presets.trl_rloo()), trl_rloo(batch).per_token_kl)


def test_a_masked_nan_reaches_the_reward_as_in_rloo_trainer(batch):
    with torch.no_grad():
        batch.logprobs[0, 23] = math.nan
    assert trl_rloo(batch).rewards[0].isnan()
    assert not rewards_of(batch, presets.trl_rloo()).sequence_reward.isnan().any()


def test_docstring_reports_a_score_that_rloo_trainer_does_not_keep(batch):
    batch.mask[3] = False
    assert trl_rloo(batch).rewards[3] == batch.scores[3]
    assert rewards_of(batch, presets.trl_rloo()).sequence_reward[3] == 0


def trl_grpo(batch, old=None, use_bias_correction_kl=True):
    tree = trainer_code.source("trl", "trainer/grpo_trainer.py")
    penalty = trainer_code.conditional(tree, "_compute_loss", "self.beta != 0.0", "per_token_kl")
    old = batch.logprobs.detach() if old is None else old
    trainer = SimpleNamespace(beta=BETA, args=SimpleNamespace(use_bias_correction_kl=use_bias_correction_kl))
    return trainer_code.run(
        tree,
        [penalty],
        self=trainer,
        torch=torch,
        inputs={"ref_per_token_logps": batch.ref},
        per_token_logps=batch.logprobs,
        coef_1=torch.exp(batch.logprobs - old),
    ).per_token_kl


@pytest.mark.parametrize("off_policy", [False, True])
def test_kl_differs_from_grpo_trainer(batch, off_policy):
    old = batch.logprobs.detach() - (0.3 * batch.weights if off_policy else 0)
    theirs = trl_grpo(batch, old)
    weight = (batch.logprobs - old).exp().detach()
    ours = kl_of(batch, presets.trl_grpo(), importance_weight=weight)
    torch.testing.assert_close(ours[batch.mask], theirs[batch.mask], **CLOSE)
    a, b = (torch.autograd.grad(out[batch.mask].sum(), batch.logprobs)[0][batch.mask] for out in (ours, theirs))
    # theirs is a difference of two numbers of size w e^-x
    rounding = (2e-6 * gap(batch).abs() + 3e-7 * (1 + (-gap(batch)).exp())) * weight
    assert ((a - b).abs() <= rounding[batch.mask]).all()


def test_kl_without_correction_differs_from_grpo_trainer(batch):
    theirs = trl_grpo(batch, use_bias_correction_kl=False)
    same_on_valid_tokens(batch, kl_of(batch, presets.trl_grpo(use_bias_correction_kl=False)), theirs)


def test_gradient_of_a_wide_gap_rounds_as_in_grpo_trainer():
    gaps = torch.linspace(-20.5, -19.5, 101)
    wide = SimpleNamespace(logprobs=gaps.clone().requires_grad_(), ref=torch.zeros(101), mask=None)
    errors = []
    for kl in (trl_grpo(wide), kl_of(wide, presets.trl_grpo())):
        [gradient] = torch.autograd.grad(kl.sum(), wide.logprobs)
        errors.append((gradient - gaps).abs().max())
    assert errors[0] > 10  # of 20
    assert errors[1] == 0


@pytest.mark.parametrize("x", [-1e-4, -5e-5])
def test_a_small_kl_cancels_as_in_grpo_trainer(x):
    near = SimpleNamespace(logprobs=torch.tensor([x], requires_grad=True), ref=torch.zeros(1), mask=None)
    assert trl_grpo(near).item() <= 0
    assert kl_of(near, presets.trl_grpo()).item() == pytest.approx(math.expm1(-x) + x, rel=1e-6)


def test_kl_of_a_hundred_nats_overflows_as_in_grpo_trainer():
    wide = SimpleNamespace(logprobs=torch.tensor([-100.0]).requires_grad_(), ref=torch.zeros(1), mask=None)
    for kl, finite in ((trl_grpo(wide), False), (kl_of(wide, presets.trl_grpo()), True)):
        [gradient] = torch.autograd.grad(kl.sum(), wide.logprobs)
        assert bool(kl.isfinite()) is finite
        assert gradient.item() == -100 if finite else gradient.isnan()


def test_a_masked_nan_reaches_the_loss_as_in_grpo_trainer(batch):
    with torch.no_grad():
        batch.logprobs[0, 23] = math.nan
    tree = trainer_code.source("trl", "trainer/grpo_trainer.py")
    mean = trainer_code.conditional(tree, "_compute_loss", "self.loss_type in ['grpo', 'sapo']", "loss")
    trainer = SimpleNamespace(loss_type="grpo", current_gradient_accumulation_steps=1)
    names = {"self": trainer, "mask": batch.mask.int(), "mode": "train", "per_token_loss": trl_grpo(batch)}
    assert trainer_code.run(tree, [mean], **names).loss.isnan()
    assert not kl_of(batch, presets.trl_grpo()).isnan().any()


# NeMo-RL: cannot be installed, so that its preset is held to the formula


def calculate_kl(x, kl_type, low_high, kl_bound):
    """(value, slope) in float64 of one token, by the formula in the docstring of ``presets.nemo_rl``."""
    inside = low_high is None or abs(x) <= low_high
    x = x if inside else math.copysign(low_high, x)
    value, slope = {
        "k1": (x, 1.0),
        "k2": (x * x / 2, x),
        "k3": (math.exp(-x) - 1 + x, 1 - math.exp(-x)),
    }[kl_type]
    if kl_bound is not None and abs(value) > kl_bound:
        return math.copysign(kl_bound, value), 0.0
    return value, slope if inside else 0.0


@pytest.mark.parametrize("clamps", [(20.0, 10.0), (None, 10.0), (5.0, None), (None, None)])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_kl_differs_from_the_formula_of_nemo_rl(batch, kl_type, clamps):
    preset = presets.nemo_rl(kl_type, *clamps)
    assert preset.rewards == preset.kl
    kl = kl_of(batch, preset)
    [gradient] = torch.autograd.grad(kl.sum(), batch.logprobs)
    expected = [calculate_kl(x, kl_type, *clamps) for x in gap(batch)[batch.mask].tolist()]
    values, slopes = torch.tensor(expected, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(kl[batch.mask].double(), values, **CLOSE)
    torch.testing.assert_close(gradient[batch.mask].double(), slopes, **CLOSE)


def test_rewards_differ_from_the_formula_of_nemo_rl(batch):
    rewards = rewards_of(batch, presets.nemo_rl()).rewards
    expected = torch.zeros(6, 24, dtype=torch.float64)
    for row, valid in enumerate(batch.mask):
        for t in valid.nonzero().flatten().tolist():
            expected[row, t] = -BETA * calculate_kl(gap(batch)[row, t].item(), "k3", 20.0, 10.0)[0]
        expected[row, t] += batch.scores[row]
    torch.testing.assert_close(rewards.double(), expected, **CLOSE)


def test_weighted_kl_is_not_that_of_nemo_rls_loss(batch):
    weight = (batch.logprobs - batch.logprobs.detach()).exp()  # as the docstring says
    kl = kl_of(batch, presets.nemo_rl(), importance_weight=weight)
    [gradient] = torch.autograd.grad(kl.sum(), batch.logprobs)
    for x, got in zip(gap(batch)[batch.mask].tolist(), gradient[batch.mask].tolist(), strict=True):
        value, slope = calculate_kl(x, "k3", 20.0, 10.0)
        assert got == pytest.approx(slope + value if value < 10 else 0.0, abs=5e-6)


# all of them


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: presets.openrlhf(kl_estimator="k4"), "kl_estimator: .*'k4'"),
        (lambda: presets.openrlhf(reward_clip_range=(1, -1)), "reward_clip_range"),
        (lambda: presets.trl_rloo(reward_clip_range=(3, 3)), "reward_clip_range"),
        (lambda: presets.verl(kl_penalty="k4+"), r"kl_penalty: .*'k4\+'"),
        (lambda: presets.verl(kl_penalty="k3++"), "kl_penalty"),
        (lambda: presets.verl(kl_loss_type=None), "kl_loss_type"),
        (lambda: presets.nemo_rl(kl_type="abs"), "kl_type: .*'abs'"),
        (lambda: presets.nemo_rl(kl_input_clamp_value=-1.0), "kl_input_clamp_value"),
        (lambda: presets.nemo_rl(kl_output_clamp_value=0), "kl_output_clamp_value"),
    ],
)
def test_unknown_option_is_taken(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_preset_changes_after_it_was_made():
    presets.verl().rewards["estimator"] = "k3"
    assert presets.verl().rewards == {"estimator": "k1"}
    with pytest.raises(AttributeError):
        presets.verl().rewards = {}


def test_example_in_the_docstrings_prints_something_else():
    result = doctest.testmod(presets)
    assert result.attempted >= 6
    assert result.failed == 0
