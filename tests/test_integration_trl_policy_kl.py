"""The KL options of TRL's RLOO and GRPO here: they reach reward, loss and gradient, as formulas in float64 say."""

import types
import warnings

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install rewardfuse[trl]")

import trl
from transformers import HfArgumentParser

from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations import _trl_policy as ours
from test_integration_trl_policy import VALID, drift, loss_inputs, loss_of, make_model, make_trainer, save, scored


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    return save(make_model(tokenizer), tmp_path_factory.mktemp("model"))


def naive_kl(x, estimator):
    """Value and slope in float64."""
    x = x.double()
    return {
        "k1": (x, torch.ones_like(x)),
        "k2": (x.square() / 2, x),
        "k3": (torch.expm1(-x) + x, -torch.expm1(-x)),
        "abs": (x.abs(), x.sign()),
    }[estimator]


def test_kl_options_do_not_reach_the_reward(tokenizer, checkpoint):
    trainer = make_trainer(
        ours, "RLOO", checkpoint, tokenizer, beta=0.5, kl_estimator="k3", kl_input_clamp=0.8, kl_output_clamp=0.3
    )
    inputs, policy, _ = loss_inputs(tokenizer)
    x = (policy - inputs["ref_per_token_logps"]).detach().clamp(-0.8, 0.8)
    expected = (naive_kl(x, "k3")[0].clamp(-0.3, 0.3) * VALID).float()
    got = trainer._token_kl(policy.detach(), inputs["ref_per_token_logps"], VALID)
    torch.testing.assert_close(got, expected)
    drift(trainer)
    assert not torch.allclose(
        scored(ours.RLOOTrainer, trainer)["advantages"], scored(trl.RLOOTrainer, trainer)["advantages"]
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("gradient", [None, "k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("level", [None, "token", "sequence"])
def test_kl_of_the_loss_has_another_value_or_gradient(grpo, tokenizer, estimator, gradient, level):
    inputs, policy, _ = loss_inputs(tokenizer)
    trainer = grpo(level, kl_estimator=estimator, kl_gradient_estimator=gradient)
    old, ref, valid = inputs["old_per_token_logps"], inputs["ref_per_token_logps"], VALID == 1
    kl = trainer._token_kl(policy, ref, ratio(policy, old, level), VALID)
    coefficients = torch.linspace(-1, 2, VALID.numel()).view(VALID.shape)
    [slope] = torch.autograd.grad((kl * coefficients).sum(), policy)

    exact = policy.detach().double().requires_grad_()
    value, given_slope = naive_kl(exact - ref, estimator)
    weight = ratio(exact, old.double(), level) if level else torch.ones(())
    if gradient is not None:
        given_slope = naive_kl((exact - ref).detach(), gradient)[1]
        value = value.detach() + given_slope * (exact - exact.detach())
        weight = weight.detach()
    expected = torch.where(valid, value * weight, 0.0)
    [expected_slope] = torch.autograd.grad((expected * coefficients).sum(), exact)
    torch.testing.assert_close(kl.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-5, atol=1e-5)


def ratio(policy, old, level):
    """TRL's coef_1; a sequence's is [B, 1]."""
    if level != "sequence":
        return torch.exp(policy - old)
    return torch.exp(((policy - old) * VALID).sum(-1) / VALID.sum(-1).clamp(min=1.0)).unsqueeze(-1)


@pytest.fixture
def grpo():
    """What ``_token_kl`` looks at, of a trainer with some options."""

    def make(level, **options):
        trainer = object.__new__(ours.GRPOTrainer)
        trainer.args = types.SimpleNamespace(use_bias_correction_kl=level is not None, **options)
        trainer.importance_sampling_level = level or "token"
        return trainer

    return make


def test_clamped_token_still_has_a_gradient(grpo):
    policy = torch.tensor([[-3.0, -1.0]], requires_grad=True)
    for gradient, expected in ((None, 0.0), ("k2", -3.0)):
        trainer = grpo("token", kl_output_clamp=10.0, kl_gradient_estimator=gradient)
        kl = trainer._token_kl(policy, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2))
        [slope] = torch.autograd.grad(kl.sum(), policy)
        assert (kl[0, 0].item(), slope[0, 0].item()) == (10.0, expected)


def test_wide_gap_gives_inf_or_nan(tokenizer, checkpoint):
    trainer = make_trainer(ours, "GRPO", checkpoint, tokenizer)
    inputs, policy, entropies = loss_inputs(tokenizer)
    inputs["old_per_token_logps"] = None  # as on policy: its ratio is 1
    for x in (-100.0, -20.0, 12.0):
        inputs["ref_per_token_logps"] = policy.detach() - x
        loss, gradient, metrics = loss_of(ours.GRPOTrainer, trainer, inputs, policy, entropies)
        assert loss.isfinite()
        assert metrics["kl"][0] < 1e36
        # gradient of the policy's part, and beta times x of the KL, over the tokens
        expected = (-inputs["advantages"][:, None] + 0.1 * x) * VALID / VALID.sum()
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    inputs["ref_per_token_logps"] = policy.detach() + 100.0
    theirs = loss_of(trl.GRPOTrainer, trainer, inputs, policy, entropies)
    assert not theirs[0].isfinite()
    assert theirs[1].isnan().any()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("RLOO", {"kl_estimator": "k4"}, 'kl_estimator: expected one of "k1", "k2", "k3", "abs", got \'k4\''),
        ("GRPO", {"kl_gradient_estimator": "full"}, "kl_gradient_estimator: expected None or one of .*, got 'full'"),
        ("GRPO", {"kl_input_clamp": -1.0}, "kl_input_clamp: expected None, a positive number"),
        ("RLOO", {"kl_output_clamp": 0.0}, "kl_output_clamp: expected None, a positive number"),
    ],
)
def test_bad_option_reaches_training(tmp_path, kind, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(ours, f"{kind}Config")(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.1, **options)


def test_option_without_a_kl_is_ignored_in_silence(tmp_path):
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    with pytest.warns(UserWarning, match="no KL term with beta=0: kl_estimator, kl_output_clamp has no effect"):
        ours.GRPOConfig(kl_estimator="k2", kl_output_clamp=5.0, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours.GRPOConfig(**arguments)
        ours.GRPOConfig(beta=0.1, kl_estimator="k2", **arguments)
        ours.RLOOConfig(kl_estimator="k2", **arguments)


@pytest.mark.parametrize("kind", ["RLOO", "GRPO"])
def test_options_are_missing_on_the_command_line(tmp_path, kind):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--beta", "0.1", "--kl_estimator", "k2"]
    flags += ["--kl_input_clamp", "20", "--kl_output_clamp", "10"]
    flags += ["--kl_gradient_estimator", "k3"] if kind == "GRPO" else []
    (config,) = HfArgumentParser(getattr(ours, f"{kind}Config")).parse_args_into_dataclasses(flags)
    assert (config.kl_estimator, config.kl_input_clamp, config.kl_output_clamp) == ("k2", 20.0, 10.0)
    assert getattr(config, "kl_gradient_estimator", "k3") == "k3"


BETA, EPSILON = 0.3, 0.2


def clamped(value, bound):
    if bound is None:
        return value
    low, high = bound if isinstance(bound, tuple) else (-bound, bound)
    return value.clamp(low, high)


def surrogate(importance, advantages):
    return torch.min(importance * advantages, importance.clamp(1 - EPSILON, 1 + EPSILON) * advantages)


@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "k2"},
        {"kl_input_clamp": 1.5},
        {"kl_output_clamp": (-0.5, 0.8), "kl_estimator": "k1"},
        {"kl_estimator": "k1", "kl_gradient_estimator": "k3", "kl_input_clamp": 1.5, "kl_output_clamp": 0.8},
        {"kl_estimator": "abs", "kl_input_clamp": (-1.0, 2.0), "use_bias_correction_kl": False},
    ],
    ids=str,
)
def test_option_of_the_config_does_not_reach_the_loss_of_grpo(tokenizer, checkpoint, options):
    trainer = make_trainer(ours, "GRPO", checkpoint, tokenizer, beta=BETA, **options)
    inputs, policy, entropies = loss_inputs(tokenizer)
    loss, gradient, _ = loss_of(ours.GRPOTrainer, trainer, inputs, policy, entropies)

    exact = policy.detach().double().requires_grad_()
    x = exact - inputs["ref_per_token_logps"]
    importance = torch.exp(exact - inputs["old_per_token_logps"])
    weight = importance if options.get("use_bias_correction_kl", True) else 1.0
    value = naive_kl(clamped(x, options.get("kl_input_clamp")), options.get("kl_estimator", "k3"))[0]
    kl = clamped(weight * value, options.get("kl_output_clamp"))
    if "kl_gradient_estimator" in options:
        slope = weight.detach() * naive_kl(x.detach(), options["kl_gradient_estimator"])[1]
        kl = kl.detach() + slope * (exact - exact.detach())
    tokens = BETA * kl - surrogate(importance, inputs["advantages"][:, None])
    expected = tokens[VALID == 1].sum() / VALID.sum()
    [expected_gradient] = torch.autograd.grad(expected, exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)

    default = make_trainer(ours, "GRPO", checkpoint, tokenizer, beta=BETA)
    other = loss_of(ours.GRPOTrainer, default, inputs, policy, entropies)
    assert abs(other[0] - loss) > 1e-3 and (other[1] - gradient).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "k2"},
        {"kl_input_clamp": 1.5},
        {"kl_estimator": "k3", "kl_output_clamp": (-0.5, 0.8)},
        {"kl_estimator": "abs", "kl_input_clamp": (-1.0, 2.0), "kl_output_clamp": 1.2},
    ],
    ids=str,
)
def test_option_of_the_config_does_not_reach_the_reward_and_gradient_of_rloo(tokenizer, checkpoint, options):
    runs = []
    for given in (options, {}):
        trainer = make_trainer(ours, "RLOO", checkpoint, tokenizer, beta=BETA, **given)
        seen = {}

        def logprobs(model, ids, mask, keep, *_, trainer=trainer, seen=seen, **__):
            name = "ref" if model is trainer.ref_model else "policy"
            seen[name] = -4 * torch.rand(4, keep, generator=torch.Generator().manual_seed(len(name)))
            return seen[name], torch.zeros(4, keep), None

        drift(trainer)  # else no completion ends early
        trainer._get_per_token_logps_and_entropies = logprobs
        trainer.model.train()
        torch.manual_seed(5)
        inputs = ours.RLOOTrainer._generate_and_score_completions(trainer, [{"prompt": "say: "}] * 4)
        policy = (seen["policy"] + 0.02).requires_grad_()
        runs.append((inputs, *loss_of(ours.RLOOTrainer, trainer, inputs, policy, torch.zeros_like(policy))))
    inputs, loss, gradient, _ = runs[0]

    valid = inputs["completion_mask"] == 1
    assert not valid.all()
    x = clamped((seen["policy"] - seen["ref"]).double(), options.get("kl_input_clamp"))
    value = clamped(naive_kl(x, options.get("kl_estimator", "k1"))[0], options.get("kl_output_clamp"))
    scores = torch.tensor(next(iter(trainer._logs["rewards"].values())), dtype=torch.float64)[-4:]
    rewards = scores - BETA * torch.where(valid, value, 0.0).sum(1)
    advantages = rewards - (rewards.sum() - rewards) / 3
    torch.testing.assert_close(inputs["advantages"].double(), advantages, rtol=1e-5, atol=1e-5)
    exact = policy.detach().double().requires_grad_()
    log_ratio = torch.where(valid, exact - seen["policy"], 0.0).sum(1)
    expected = -surrogate(log_ratio.exp(), advantages).mean()
    [expected_gradient] = torch.autograd.grad(expected, exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)
    assert (runs[1][0]["advantages"] - inputs["advantages"]).abs().max() > 1e-2
    assert (runs[1][2] - gradient).abs().max() > 1e-3
