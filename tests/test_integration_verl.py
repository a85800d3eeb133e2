"""verl's KL by its own names: equal to verl's where that is right, right where it is not, and put in its place."""

import ast
import doctest
import importlib.util
import itertools
import math
import subprocess
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import trainer_code
from preset_batches import BETA, CLOSE, responses, same_on_valid_tokens
from rewardfuse.integrations import verl as ours
from rewardfuse.integrations._patching import HookChangedError

NAMES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
CORE, TRAINER = "verl.trainer.ppo.core_algos", "verl.trainer.ppo.ray_trainer"


@pytest.fixture
def batch():
    return responses()


@pytest.fixture(scope="module")
def theirs():
    """verl's functions and controllers, out of its file."""
    tree = trainer_code.source("verl", "trainer/ppo/core_algos.py")
    names = ("kl_penalty", "kl_penalty_forward", "AdaptiveKLController", "FixedKLController", "get_kl_controller")
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names]
    return trainer_code.run(tree, nodes, torch=torch, np=np)


@pytest.fixture(scope="module")
def their_apply(theirs):
    """verl's ``apply_kl_penalty``."""
    masked_mean = trainer_code.functions(
        trainer_code.source("verl", "utils/torch_functional.py"), "masked_mean", "masked_sum", torch=torch
    ).masked_mean
    tree = trainer_code.source("verl", "trainer/ppo/ray_trainer.py")
    given = {"core_algos": theirs, "masked_mean": masked_mean, "torch": torch}
    return trainer_code.functions(tree, "apply_kl_penalty", **given).apply_kl_penalty


# the KL


@pytest.mark.parametrize("name", [a + b for a, b in itertools.product(NAMES, ("", "+"))])
def test_value_or_gradient_differs_from_verl(batch, theirs, name):
    got = ours.kl_penalty(logprob=batch.logprobs, ref_logprob=batch.ref, kl_penalty=name)
    expected = theirs.kl_penalty(logprob=batch.logprobs, ref_logprob=batch.ref, kl_penalty=name)
    batch.mask[:] = True  # these functions know no mask
    same_on_valid_tokens(batch, got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_forward_differs_from_verl(batch, theirs, name):
    got = ours.kl_penalty_forward(batch.logprobs, batch.ref, name)
    torch.testing.assert_close(got, theirs.kl_penalty_forward(batch.logprobs, batch.ref, name), **CLOSE)


@pytest.mark.parametrize("name", ["full", "full+"])
def test_full_does_not_say_where_it_is_available(theirs, name):
    x = torch.zeros(2)
    with pytest.raises(NotImplementedError):
        theirs.kl_penalty(x, x, name)
    with pytest.raises(NotImplementedError, match="kl_penalized_rewards_from_logits"):
        ours.kl_penalty(x, x, name)


@pytest.mark.parametrize("name", ["k4", "k3++", "", None, 3])
def test_unknown_name_is_taken_or_not_named(name):
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"kl_penalty.*low_var_kl"):
        ours.kl_penalty(x, x, name)


def test_forward_takes_a_straight_through_name(theirs):
    x = torch.zeros(2)
    with pytest.raises(NotImplementedError):
        theirs.kl_penalty_forward(x, x, "k3+")
    with pytest.raises(ValueError, match="without"):
        ours.kl_penalty_forward(x, x, "k3+")


def test_small_kl_cancels_as_in_verl(theirs):
    x, zero = torch.tensor([-1e-4]), torch.zeros(1)
    assert theirs.kl_penalty(x, zero, "k3").item() == 0
    assert ours.kl_penalty(x, zero, "k3").item() == pytest.approx(math.expm1(1e-4) - 1e-4, rel=1e-6)


def test_sixteen_bit_log_probs_give_a_sixteen_bit_kl(theirs):
    policy, ref = -3 * torch.rand(2, 100).bfloat16()
    assert theirs.kl_penalty(policy, ref, "k3").dtype is torch.bfloat16  # as the docstring says
    exact = theirs.kl_penalty(policy.double(), ref.double(), "k3")
    torch.testing.assert_close(ours.kl_penalty(policy, ref, "k3").double(), exact, rtol=1e-6, atol=1e-7)


# the controllers


def test_controller_moves_otherwise_than_verls(theirs):
    steps = [(0.3, 256), (0.01, 64), (0.1, 512), (5.0, 1024), (-0.2, 1)]
    for make in ("AdaptiveKLController", "FixedKLController"):
        options = {"init_kl_coef": 0.02, "target_kl": 0.1, "horizon": 10000} if make[0] == "A" else {"kl_coef": 0.02}
        pair = [getattr(module, make)(**options) for module in (ours, theirs)]
        for current_kl, n_steps in steps:
            for controller in pair:
                controller.update(current_kl=current_kl, n_steps=n_steps)
            assert pair[0].value == pytest.approx(pair[1].value, rel=1e-12)
        assert (pair[0].value != 0.02) == (make[0] == "A")


def test_controller_starts_anew_after_a_checkpoint():
    first = ours.AdaptiveKLController(0.02, 0.1, 10000)
    first.update(current_kl=5.0, n_steps=512)
    second = ours.AdaptiveKLController(0.5, 1.0, 10)
    second.load_state_dict(first.state_dict())
    assert second.value == first.value != 0.02
    assert (second.target, second.horizon) == (0.1, 10000)


@pytest.mark.parametrize("current_kl, n_steps, name", [(math.nan, 10, "current_kl"), (0.0, 60000, "n_steps")])
def test_coefficient_is_spoilt_for_good(theirs, current_kl, n_steps, name):
    spoilt, kept = (module.AdaptiveKLController(0.02, 0.1, 10000) for module in (theirs, ours))
    spoilt.update(current_kl, n_steps)
    assert not spoilt.value > 0  # as the docstring says
    with pytest.raises(ValueError, match=name):
        kept.update(current_kl, n_steps)
    assert kept.value == 0.02


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_another_controller_than_the_configuration_says(theirs, kind):
    config = SimpleNamespace(type=kind, kl_coef=0.03, target_kl=0.2, horizon=500)
    got, expected = ours.get_kl_controller(config), theirs.get_kl_controller(config)
    assert type(got).__name__ == type(expected).__name__
    got.update(current_kl=1.0, n_steps=10)
    expected.update(current_kl=1.0, n_steps=10)
    assert got.value == pytest.approx(expected.value, rel=1e-12)


def test_unknown_kind_of_controller_is_not_named():
    with pytest.raises(ValueError, match=r"kl_ctrl\.type.*'linear'"):
        ours.get_kl_controller(SimpleNamespace(type="linear", kl_coef=0.1))


def test_horizon_of_zero_divides_by_zero():
    with pytest.raises(ValueError, match="horizon"):
        ours.get_kl_controller(SimpleNamespace(type="adaptive", kl_coef=0.1, target_kl=0.1, horizon=0))


@pytest.mark.parametrize("current_kl", [math.inf, math.nan, -math.inf])
def test_fixed_controller_stops_a_run(current_kl):
    controller = ours.get_kl_controller(SimpleNamespace(type="fixed", kl_coef=0.1))
    controller.update(current_kl=current_kl, n_steps=4)
    assert controller.value == 0.1


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call, error, name",
    [
        (lambda: ours.kl_penalty(X, X[:1], "k1"), ValueError, "ref_logprob: .* logprob,"),
        (lambda: ours.kl_penalty(X, None, "k1"), TypeError, "ref_logprob:"),
        (lambda: ours.kl_penalty_forward(X.long(), X, "k1"), TypeError, "logprob:"),
        (lambda: ours.AdaptiveKLController(0.1, 0, 10), ValueError, "target_kl:"),
    ],
)
def test_argument_is_named_otherwise_than_by_verl(call, error, name):
    with pytest.raises(error, match=f"^{name}"):
        call()


# the penalty in the reward


class Tensors(dict):
    """As much of a TensorDict as verl's function asks for."""

    @property
    def batch_size(self):
        return self["response_mask"].shape


class Recorder:
    """A controller that notes what it is told."""

    value = BETA

    def update(self, current_kl, n_steps):
        self.told = current_kl, n_steps


def applied(function, batch, name="kl"):
    """(rewards, metrics, what the controller was told)."""
    scores = torch.linspace(-1, 1, batch.mask.numel()).view(batch.mask.shape)
    tensors = Tensors(
        response_mask=batch.mask.long(),
        token_level_scores=scores,
        old_log_probs=batch.logprobs.detach(),
        ref_log_prob=batch.ref,
    )
    controller, data = Recorder(), SimpleNamespace(batch=tensors)
    same, metrics = function(data, kl_ctrl=controller, kl_penalty=name)
    assert same is data
    return data.batch["token_level_rewards"], metrics, controller.told


@pytest.mark.parametrize("name", ["kl", "abs", "mse", "low_var_kl", "k3+"])
def test_rewards_or_metrics_differ_from_verl(batch, their_apply, name):
    rewards, metrics, told = applied(ours.apply_kl_penalty, batch, name)
    expected, their_metrics, they_told = applied(their_apply, batch, name)
    torch.testing.assert_close(rewards, expected, **CLOSE)
    assert metrics == pytest.approx(their_metrics, rel=1e-5)
    assert told == pytest.approx(they_told, rel=1e-5)
    assert told[1] == 6


def test_masked_nan_reaches_rewards_or_mean(batch, their_apply):
    clean, *rest = applied(ours.apply_kl_penalty, batch)
    with torch.no_grad():
        batch.logprobs[~batch.mask] = math.nan
    assert applied(their_apply, batch)[0].isnan().any()  # what the docstring says of verl
    rewards, *others = applied(ours.apply_kl_penalty, batch)
    assert torch.equal(rewards, clean)
    assert others == rest


def test_empty_response_dilutes_the_kl(batch, their_apply):
    _, metrics, told = applied(ours.apply_kl_penalty, batch)
    empty = SimpleNamespace(
        logprobs=batch.logprobs.repeat(2, 1), ref=batch.ref.repeat(2, 1), mask=batch.mask.repeat(2, 1)
    )
    empty.mask[6:] = False
    _, with_empty, told_with_empty = applied(ours.apply_kl_penalty, empty)
    assert with_empty == metrics
    assert told_with_empty == told
    assert applied(their_apply, empty)[2] == pytest.approx((told[0] / 2, 12), rel=1e-5)  # as the docstring says


@pytest.mark.parametrize("key", ["response_mask", "token_level_scores", "ref_log_prob"])
def test_column_of_one_is_given_to_every_token(key):
    names = ("response_mask", "token_level_scores", "old_log_probs", "ref_log_prob")
    batch = {name: torch.zeros(2, 1 if name == key else 3) for name in names}
    with pytest.raises(ValueError, match=rf"^{key}: .* old_log_probs"):
        ours.apply_kl_penalty(SimpleNamespace(batch=batch), Recorder())


def test_infinite_kl_stops_a_run_with_a_fixed_coefficient():
    names = ("token_level_scores", "old_log_probs", "ref_log_prob")
    batch = {"response_mask": torch.ones(2, 3), **{name: torch.zeros(2, 3) for name in names}}
    batch["ref_log_prob"][0, 0] = -math.inf
    data, metrics = ours.apply_kl_penalty(SimpleNamespace(batch=batch), ours.FixedKLController(0.1))
    assert metrics["actor/reward_kl_penalty"] == math.inf
    assert data.batch["token_level_rewards"].flatten().tolist() == [-math.inf, 0, 0, 0, 0, 0]


def test_no_response_at_all_moves_the_controller(batch):
    batch.mask[:] = False
    _, metrics, told = applied(ours.apply_kl_penalty, batch)
    assert told == (0.0, 0)
    assert metrics["actor/reward_kl_penalty"] == 0.0


# in verl's place


def module(name, **attributes):
    made = types.ModuleType(name)
    vars(made).update(attributes)
    return made


@pytest.fixture
def loaded(monkeypatch):
    """Puts a module among the loaded ones until the test ends."""

    def load(module):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    return load


@pytest.fixture
def stand_in(theirs, loaded):
    """verl's own functions in modules of verl's names: core_algos, and one that imported from it by name."""
    verl = loaded(module("verl", __version__="0.9.1"))
    core = loaded(module(CORE, **{name: vars(theirs)[name] for name in ours._HOOKS}))
    losses = loaded(module("verl.workers.utils.losses", kl_penalty=theirs.kl_penalty))
    yield SimpleNamespace(verl=verl, core=core, losses=losses)
    ours.uninstall()


def test_names_imported_before_stay_verls(stand_in, theirs):
    ours.install()
    ours.install()
    assert stand_in.core.kl_penalty is stand_in.losses.kl_penalty is ours.kl_penalty
    assert stand_in.core.AdaptiveKLController is ours.AdaptiveKLController
    ours.uninstall()
    for name in ours._HOOKS:
        assert getattr(stand_in.core, name) is getattr(theirs, name)
    assert stand_in.losses.kl_penalty is theirs.kl_penalty


def test_uninstall_forgets_names_imported_since(stand_in, theirs, loaded):
    ours.install()
    later = loaded(module("verl.later", kl_penalty=stand_in.core.kl_penalty))
    ours.uninstall()
    assert later.kl_penalty is theirs.kl_penalty


@pytest.mark.parametrize("loaded_first", [True, False])
def test_trainer_keeps_its_own_penalty(stand_in, their_apply, loaded, loaded_first):
    trainer = module(TRAINER, apply_kl_penalty=their_apply)
    by_name = module("verl.trainer.ppo.v1.trainer_base", apply_kl_penalty=their_apply)
    if loaded_first:
        loaded(trainer), loaded(by_name)
    ours.install()
    if not loaded_first:
        loaded(trainer), loaded(by_name)
        stand_in.core.get_kl_controller(SimpleNamespace(type="fixed", kl_coef=0.1))  # as a trainer does
    assert trainer.apply_kl_penalty is by_name.apply_kl_penalty is ours.apply_kl_penalty
    ours.uninstall()
    assert trainer.apply_kl_penalty is by_name.apply_kl_penalty is their_apply
    ours.get_kl_controller(SimpleNamespace(type="fixed", kl_coef=0.1))
    assert trainer.apply_kl_penalty is their_apply


@pytest.mark.parametrize("changed", ["kl_penalty_forward", "FixedKLController", "get_kl_controller"])
def test_changed_hook_is_half_installed(stand_in, theirs, changed):
    setattr(stand_in.core, changed, lambda other: None)
    with pytest.raises(HookChangedError, match="other"):
        ours.install()
    assert stand_in.core.kl_penalty is stand_in.losses.kl_penalty is theirs.kl_penalty
    assert stand_in.core.AdaptiveKLController is theirs.AdaptiveKLController


def test_controller_with_another_update_is_replaced(stand_in):
    class FixedKLController:
        def __init__(self, kl_coef):
            pass

        def update(self, kl):
            pass

    stand_in.core.FixedKLController = FixedKLController
    with pytest.raises(HookChangedError, match="current_kl, n_steps"):
        ours.install()
    assert stand_in.core.FixedKLController is FixedKLController


def test_untested_version_is_not_reported(stand_in):
    stand_in.verl.__version__ = "1.0.0"
    with pytest.warns(UserWarning, match=r"verl 0\.9, but verl 1\.0\.0"):
        ours.install()


# What verl 0.9.1 imports and this library does not; ray is a stand-in, of which nothing is called.
NEEDED = ("verl", "tensordict", "pyvers", "orjson", "omegaconf", "antlr4", "codetiming")
IN_VERL = """
import sys, types
ray = sys.modules["ray"] = types.ModuleType("ray")
ray.ObjectRef = type("ObjectRef", (), {})
import torch
import verl
from rewardfuse.integrations import verl as ours
core = sys.modules["verl.trainer.ppo.core_algos"]  # the plugin has imported it
import verl.workers.utils.losses as losses
import verl.trainer.distillation.losses as distillation
from tensordict import TensorDict
from verl.utils.tensordict_utils import assign_non_tensor
from verl.workers.config import ActorConfig

assert core.kl_penalty is losses.kl_penalty is distillation.kl_penalty is ours.kl_penalty
assert core.kl_penalty_forward is ours.kl_penalty_forward
assert isinstance(core.get_kl_controller(verl.trainer.config.KLControlConfig()), ours.FixedKLController)

mask = torch.arange(12) < torch.tensor([[12], [7], [1], [9]])
attention_mask = torch.cat([torch.ones(4, 3, dtype=torch.long), mask.long()], 1)
ids = torch.ones_like(attention_mask)
floats = {name: -2 * torch.rand(4, 12) for name in ("old_log_probs", "ref_log_prob", "advantages")}
masks = {"attention_mask": attention_mask, "response_mask": mask.long()}
data = TensorDict({"prompts": ids[:, :3], "responses": ids[:, 3:], **masks, **floats}, batch_size=4)
assign_non_tensor(data, dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=4)
log_probs = (-2 * torch.rand(int(attention_mask.sum()))).requires_grad_()


def loss_and_gradient(kl_loss_type):  # as verl's actor has them
    options = {"strategy": "fsdp", "ppo_micro_batch_size_per_gpu": 1, "rollout_n": 1}
    config = ActorConfig(use_kl_loss=True, kl_loss_type=kl_loss_type, kl_loss_coef=1.0, **options)
    loss, _ = losses.ppo_loss(config, {"log_probs": log_probs}, data)
    return torch.cat([loss.detach()[None], *torch.autograd.grad(loss, log_probs)])


names = ("kl", "abs", "mse", "low_var_kl", "k3+")
in_place = [loss_and_gradient(name) for name in names]
ours.uninstall()
assert core.kl_penalty is losses.kl_penalty is distillation.kl_penalty
assert core.kl_penalty.__module__ == core.__name__
for name, found in zip(names, in_place):
    torch.testing.assert_close(found, loss_and_gradient(name), rtol=1e-6, atol=1e-7, msg=name)
assert (in_place[0] - in_place[3]).abs().max() > 0.1
print("in place")
"""


def test_plugin_leaves_verls_functions_or_changes_its_actors_loss(monkeypatch):
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"verl cannot be imported without {', '.join(missing)}")
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "rewardfuse.integrations.verl.plugin")
    done = subprocess.run([sys.executable, "-c", IN_VERL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "in place"


def test_documented_examples_are_wrong():
    result = doctest.testmod(ours)
    assert result.attempted >= 4
    assert not result.failed
