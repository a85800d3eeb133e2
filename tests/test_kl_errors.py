"""Wrong arguments of the KL ops: the same exception type and text from every backend, and through torch.ops."""

import math

import pytest
import torch

import rewardfuse
from kl_errors import KL_CASES, REWARDS_CASES, WHITEN_CASES

CASES = [
    *((f"approx_kl-{text}", call, kind, text) for call, kind, text in KL_CASES),
    *((f"kl_penalized_rewards-{text}", call, kind, text) for call, kind, text in REWARDS_CASES),
]


def assert_raises(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind and str(error.value).splitlines()[0] == text


@pytest.mark.parametrize(("call", "kind", "text"), [case[1:] for case in CASES], ids=[case[0][:70] for case in CASES])
def test_error_of_another_type_or_text(backend, call, kind, text):
    assert_raises(call, kind, text)


@pytest.mark.parametrize(("call", "kind", "text"), WHITEN_CASES, ids=[text[:50] for *_, text in WHITEN_CASES])
def test_whitening_takes_what_it_cannot(call, kind, text):
    assert_raises(call, kind, text)


X = torch.zeros(2, 3)
CLAMPS = dict(zip(("input_low", "input_high", "output_low", "output_high"), (-math.inf, math.inf) * 2, strict=True))
DEFAULTS = {
    "approx_kl": {
        **{"logprobs": X, "ref_logprobs": X, "importance_weight": None, "mask": None, "importance_weight_value": 1.0},
        **{"estimator": 0, "gradient_estimator": -1, **CLAMPS},
    },
    "kl_penalized_rewards": {
        **{"logprobs": X, "ref_logprobs": X, "mask": None, "scores": None, "ended": None, "kl_coef": None},
        **{"kl_coef_value": 0.1, "missing_eos_penalty": 0.0, "score_low": -math.inf, "score_high": math.inf},
        **{"estimator": 0, "gradient_estimator": -1, **CLAMPS},
        **{"one_past": False, "replace": False, "differentiable_rewards": False},
    },
}
# What the C++ side checks itself, where the Python layer is not asked.
RAW = [
    ("approx_kl", {"ref_logprobs": torch.zeros(3)}),
    ("approx_kl", {"ref_logprobs": X.double()}),
    ("approx_kl", {"importance_weight": torch.zeros(1)}),
    ("approx_kl", {"mask": X}),
    ("approx_kl", {"estimator": 4}),
    ("approx_kl", {"estimator": -1}),
    ("approx_kl", {"gradient_estimator": 4}),
    ("approx_kl", {"gradient_estimator": -2}),
    ("kl_penalized_rewards", {"logprobs": torch.zeros(())}),
    ("kl_penalized_rewards", {"ref_logprobs": X.double()}),
    ("kl_penalized_rewards", {"mask": X}),
    ("kl_penalized_rewards", {"scores": torch.zeros(3)}),
    ("kl_penalized_rewards", {"ended": torch.zeros(2)}),
    ("kl_penalized_rewards", {"kl_coef": torch.zeros(2)}),
    ("kl_penalized_rewards", {"kl_coef": torch.tensor(-1.0)}),
    ("kl_penalized_rewards", {"estimator": 4}),
    ("kl_penalized_rewards", {"gradient_estimator": -2}),
]


@pytest.mark.parametrize(("op", "change"), RAW, ids=[f"{op}-{next(iter(change))}" for op, change in RAW])
def test_pybind11_and_torch_ops_raise_differently(native, op, change):
    arguments = {**DEFAULTS[op], **change}
    errors = []
    for call in (
        lambda: getattr(native, op)(*arguments.values()),
        lambda: getattr(torch.ops.rewardfuse, op)(**arguments),
    ):
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        errors.append((type(error.value), str(error.value).splitlines()[0]))
    assert errors[0] == errors[1] and next(iter(change)) in errors[0][1]


def test_one_past_with_scores_of_tokens_writes_out_of_the_row(native):
    arguments = {**DEFAULTS["kl_penalized_rewards"], "scores": X, "one_past": True}
    for call in (
        lambda: native.kl_penalized_rewards(*arguments.values()),
        lambda: torch.ops.rewardfuse.kl_penalized_rewards(**arguments),
    ):
        with pytest.raises(ValueError, match="terminal"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["native", "triton", "reference"])
def test_a_bad_coefficient_on_a_gpu_raises_only_under_checks(name):
    x, coefficient = X.cuda(), torch.tensor(-1.0, device="cuda")
    with rewardfuse.use_backend(name):
        rewardfuse.kl_penalized_rewards(x, x, kl_coef=coefficient)
        with rewardfuse.checks(True), pytest.raises(ValueError, match="kl_coef: expected finite and not negative"):
            rewardfuse.kl_penalized_rewards(x, x, kl_coef=coefficient)
