"""Presets against the functions of OpenRLHF and verl: equal where these are right, right where they are not."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import trainer_code
from preset_batches import BETA, gap, kl_of, responses, rewards_of, same_on_valid_tokens
from rewardfuse import approx_kl, presets


@pytest.fixture
def batch():
    return responses()


# OpenRLHF


def openrlhf():
    tree = trainer_code.source("openrlhf", "models/utils.py")
    return trainer_code.functions(
        tree, "compute_approx_kl", "compute_reward", "KL_IS_WEIGHT_CLIP", torch=torch, Optional=None
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_rewards_differ_from_openrlhf(batch, estimator):
    kl = openrlhf().compute_approx_kl(batch.logprobs, batch.ref, kl_estimator=estimator)
    theirs = openrlhf().compute_reward(batch.scores, BETA, kl, batch.mask, (-10.0, 10.0))
    ours = rewards_of(batch, presets.openrlhf(estimator), differentiable_rewards=True)
    same_on_valid_tokens(batch, ours.rewards, theirs)
    same_on_valid_tokens(batch, ours.kl, kl)


def test_rewards_without_a_clip_differ_from_openrlhf(batch):
    kl = openrlhf().compute_approx_kl(batch.logprobs, batch.ref)
    theirs = openrlhf().compute_reward(batch.scores, BETA, kl, batch.mask)
    ours = rewards_of(batch, presets.openrlhf(reward_clip_range=None), differentiable_rewards=True).rewards
    same_on_valid_tokens(batch, ours, theirs)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_unbiased_gradient_differs_from_openrlhf(batch, estimator):
    options = {"kl_estimator": estimator, "unbiased_gradient": True}
    ours = kl_of(batch, presets.openrlhf(**options))
    same_on_valid_tokens(batch, ours, openrlhf().compute_approx_kl(batch.logprobs, batch.ref, **options))
    old = batch.logprobs.detach() - 3 * batch.weights
    off_policy = openrlhf().compute_approx_kl(batch.logprobs, batch.ref, old, **options)
    w = (batch.logprobs.detach() - old).exp().clamp(max=10)
    same_on_valid_tokens(batch, ours.detach() + w * (ours - ours.detach()), off_policy)  # as the docstring says


def test_score_of_an_empty_response_stands_in_the_last_column_as_in_openrlhf(batch):
    batch.mask[3] = False
    kl = torch.zeros(6, 24)
    assert openrlhf().compute_reward(batch.scores, BETA, kl, batch.mask)[3, -1] == batch.scores[3]
    assert not rewards_of(batch, presets.openrlhf()).rewards[3].any()


def test_masked_places_have_rewards_as_in_openrlhf(batch):
    with torch.no_grad():
        batch.logprobs[0, 23] = math.nan
    kl = openrlhf().compute_approx_kl(batch.logprobs, batch.ref)
    theirs = openrlhf().compute_reward(batch.scores, BETA, kl, batch.mask)
    assert theirs[0, 23].isnan()
    assert theirs[1, 0] != 0
    assert not rewards_of(batch, presets.openrlhf()).rewards[~batch.mask].any()


@pytest.mark.parametrize("x", [-1e-4, -5e-5])
def test_a_small_kl_cancels_as_in_both(x):
    near = SimpleNamespace(logprobs=torch.tensor([x]), ref=torch.zeros(1), mask=None)
    right = math.expm1(-x) + x
    theirs = openrlhf().compute_approx_kl(near.logprobs, near.ref, kl_estimator="k3")
    assert abs(theirs.item() - right) > 1e-8
    assert verl_kl()(near.logprobs, near.ref, "k3").item() <= 0
    for preset in (presets.openrlhf(kl_estimator="k3"), presets.verl()):
        assert kl_of(near, preset).item() == pytest.approx(right, rel=1e-6)


def test_docstring_reports_a_precision_that_openrlhf_no_longer_cuts(batch):
    assert openrlhf().compute_approx_kl(batch.logprobs.double(), batch.ref.double()).dtype is torch.float32
    assert approx_kl(batch.logprobs.double(), batch.ref.double(), **presets.openrlhf().kl).dtype is torch.float64


# verl

VERL_NAMES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


class Batch(dict):
    """As much of a TensorDict as verl's function asks for."""

    @property
    def batch_size(self):
        return self["response_mask"].shape


def verl_kl():
    tree = trainer_code.source("verl", "trainer/ppo/core_algos.py")
    return trainer_code.functions(tree, "kl_penalty", "kl_penalty_forward", torch=torch).kl_penalty


def verl_rewards(batch, kl_penalty="kl", attended=None):
    """(rewards, metrics): the trainer places the scores, then subtracts the KL."""
    attended = batch.mask if attended is None else attended
    tree = trainer_code.source("verl", "experimental/reward_loop/reward_manager/base.py")
    assemble = trainer_code.functions(tree, "assemble_rm_scores", torch=torch).assemble_rm_scores
    prompts = torch.ones(6, 3)
    responses = torch.zeros(6, 24, dtype=torch.long)
    tensors = {"prompts": prompts, "responses": responses, "attention_mask": torch.cat([prompts, attended], 1).long()}
    scores = assemble(None, SimpleNamespace(batch=tensors), batch.scores.tolist())

    tree = trainer_code.source("verl", "utils/torch_functional.py")
    helpers = trainer_code.functions(tree, "masked_mean", "masked_sum", torch=torch)
    tree = trainer_code.source("verl", "trainer/ppo/ray_trainer.py")
    names = {"core_algos": SimpleNamespace(kl_penalty=verl_kl()), "masked_mean": helpers.masked_mean, "torch": torch}
    data = Batch(
        response_mask=batch.mask, token_level_scores=scores, old_log_probs=batch.logprobs, ref_log_prob=batch.ref
    )
    controller = SimpleNamespace(value=BETA, update=lambda current_kl, n_steps: None)
    apply = trainer_code.functions(tree, "apply_kl_penalty", **names).apply_kl_penalty
    data, metrics = apply(SimpleNamespace(batch=data), controller, kl_penalty)
    return data.batch["token_level_rewards"], metrics


@pytest.mark.parametrize("name", [a + b for a, b in itertools.product(VERL_NAMES, ("", "+"))])
def test_kl_differs_from_verl(batch, name):
    same_on_valid_tokens(
        batch, kl_of(batch, presets.verl(kl_loss_type=name)), verl_kl()(batch.logprobs, batch.ref, name)
    )


@pytest.mark.parametrize("name", ["kl", "abs", "mse", "low_var_kl", "k3+"])
def test_rewards_differ_from_verl(batch, name):
    batch.mask[1, :5] = True  # verl pads responses on the right; the hole of row 2 is attended to, as tool output is
    attended = batch.mask.clone()
    attended[2] = True
    theirs, _ = verl_rewards(batch, name, attended)
    ours = rewards_of(batch, presets.verl(kl_penalty=name), differentiable_rewards=True).rewards
    same_on_valid_tokens(batch, ours, theirs)


def test_full_does_not_lead_to_the_op_that_has_it():
    with pytest.raises(NotImplementedError):
        verl_kl()(torch.zeros(1), torch.zeros(1), "full")
    with pytest.raises(ValueError, match="kl_penalized_rewards_from_logits"):
        presets.verl(kl_penalty="full")


def test_score_of_an_empty_response_stands_in_the_last_column_as_in_verl(batch):
    batch.mask[3] = False
    assert verl_rewards(batch)[0][3, -1] == batch.scores[3]
    assert not rewards_of(batch, presets.verl()).rewards[3].any()


def test_an_empty_response_dilutes_the_kl_as_in_verl(batch):
    batch.mask[1:] = False
    theirs = verl_rewards(batch)[1]["actor/reward_kl_penalty"]
    per_token = gap(batch)[0, :22].mean().item()
    assert theirs == pytest.approx(per_token / 6, rel=1e-5)
    assert rewards_of(batch, presets.verl()).stats.kl.item() == pytest.approx(per_token, rel=1e-5)


def test_a_masked_nan_reaches_the_rewards_as_in_verl(batch):
    with torch.no_grad():
        batch.logprobs[0, 23] = math.nan
    assert verl_rewards(batch)[0].isnan().any()
    assert not rewards_of(batch, presets.verl()).rewards.isnan().any()
