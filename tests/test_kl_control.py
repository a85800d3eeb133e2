"""The controllers of the KL coefficient."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardfuse

positive = st.floats(1e-3, 1e3)


@given(
    st.lists(st.tuples(st.floats(-10, 1e3), st.integers(0, 512)), max_size=8), positive, positive, st.floats(200, 1e5)
)
def test_an_update_differs_from_the_equation(steps, init, target, horizon):
    controller = rewardfuse.AdaptiveKLController(init_kl_coef=init, target=target, horizon=horizon)
    expected = init
    for kl, n in steps:
        controller.update(kl, n)
        expected = expected * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)
        assert controller.value == pytest.approx(expected, rel=1e-12) and controller.value > 0


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (7.2, 1.02), (60.0, 1.02), (5.4, 0.99), (4.8, 0.98), (0.0, 0.98), (-5.0, 0.98)],
)
def test_an_error_is_clipped_elsewhere_than_at_a_fifth_or_has_the_wrong_sign(kl, factor):
    controller = rewardfuse.AdaptiveKLController(0.1, 6.0, 1000)
    controller.update(kl, 100)
    assert controller.value == pytest.approx(0.1 * factor, rel=1e-12)


def test_n_steps_0_or_a_step_of_nothing_moves_the_value():
    controller = rewardfuse.AdaptiveKLController(0.1, 6.0, 1000)
    empty = rewardfuse.kl_penalized_rewards(
        torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), kl_coef=0.1
    )
    controller.update(99.0, 0)
    controller.update(empty.stats.sequence_kl, empty.stats.sequences)
    assert controller.value == 0.1


def test_empty_rows_dilute_the_kl_of_a_step():
    """Half the rows have no valid token: the step is as if they were not there."""
    x, mask = torch.full((4, 3), 3.0), torch.tensor([[True] * 3, [False] * 3] * 2)
    values = []
    for arguments in ((x, torch.zeros_like(x), mask), (x[::2], torch.zeros(2, 3))):
        stats = rewardfuse.kl_penalized_rewards(*arguments, kl_coef=0.1).stats
        controller = rewardfuse.AdaptiveKLController(0.1, 6.0, 1000)
        controller.update(stats.sequence_kl, stats.sequences)
        values.append(controller.value)
    assert values[0] == values[1] == pytest.approx(0.1 * (1 + 0.2 * 2 / 1000), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_a_tensor_moves_the_value_elsewhere_than_a_number(dtype):
    values = []
    for kl, n in ((7, 100), (torch.tensor(7, dtype=dtype), torch.tensor(100, dtype=dtype))):
        controller = rewardfuse.AdaptiveKLController(0.1, 6.0, 1000)
        controller.update(kl, n)
        values.append(controller.value)
    assert values[0] == values[1] and all(type(value) is float for value in values)


def test_a_saved_controller_goes_on_elsewhere():
    controller = rewardfuse.AdaptiveKLController(0.1, 6.0, 1000)
    controller.update(60.0, 128)
    state = json.loads(json.dumps(controller.state_dict()))  # plain numbers: any checkpoint can hold them
    restored = rewardfuse.AdaptiveKLController(9.0, 1.0, 10_000)
    restored.load_state_dict(state)
    for each in (controller, restored):
        each.update(7.0, 64)
    assert restored.value == controller.value and restored.state_dict() == controller.state_dict()


def test_a_fixed_coefficient_moves_or_is_not_restored():
    controller = rewardfuse.FixedKLController(0.05)
    for kl in (0.0, 99.0, torch.tensor(7.0)):
        controller.update(kl, 64)
    assert controller.value == 0.05 and rewardfuse.FixedKLController(0).value == 0
    restored = rewardfuse.FixedKLController(1.0)
    restored.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert restored.value == 0.05


def adaptive(**changes):
    return lambda: rewardfuse.AdaptiveKLController(**{"init_kl_coef": 0.1, "target": 6.0, "horizon": 1000, **changes})


def update(kl=1.0, n=1, kind="adaptive"):
    controller = {"adaptive": adaptive(), "fixed": lambda: rewardfuse.FixedKLController(0.1)}[kind]()
    return lambda: controller.update(kl, n)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (adaptive(init_kl_coef=0.0), ValueError, "init_kl_coef: expected positive and finite, got 0"),
        (adaptive(init_kl_coef=-0.1), ValueError, "init_kl_coef: expected positive and finite, got -0.1"),
        (adaptive(target=0), ValueError, "target: expected positive and finite, got 0"),
        (adaptive(target=math.nan), ValueError, "target: expected positive and finite, got nan"),
        (adaptive(horizon=math.inf), ValueError, "horizon: expected positive and finite, got inf"),
        (adaptive(horizon="long"), TypeError, "horizon: expected a number or a 0-d tensor, got str"),
        (lambda: rewardfuse.FixedKLController(-1), ValueError, "kl_coef: expected finite and at least 0, got -1"),
        (
            lambda: rewardfuse.FixedKLController(None),
            TypeError,
            "kl_coef: expected a number or a 0-d tensor, got NoneType",
        ),
        (update(math.nan), ValueError, "current_kl: expected finite, got nan"),
        (update(torch.tensor(math.inf)), ValueError, "current_kl: expected finite, got inf"),
        (update(torch.ones(2)), ValueError, "current_kl: expected a number or a 0-d tensor, got shape [2]"),
        (update(1.0, -1), ValueError, "n_steps: expected finite and at least 0, got -1"),
        (update(1.0, 5000), ValueError, "n_steps: expected below 5 horizons, 5000, got 5000"),
        (update(1.0, "8"), TypeError, "n_steps: expected a number or a 0-d tensor, got str"),
        (update(math.nan, kind="fixed"), ValueError, "current_kl: expected finite, got nan"),
        (update(1.0, -1, kind="fixed"), ValueError, "n_steps: expected finite and at least 0, got -1"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_a_bad_argument_is_taken(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == text


@pytest.mark.parametrize("state", [{}, {"target": 6.0}, {"value": -1.0, "target": 6.0, "horizon": 10}, None], ids=str)
@pytest.mark.parametrize("make", [adaptive(), lambda: rewardfuse.FixedKLController(0.1)], ids=["adaptive", "fixed"])
def test_a_bad_state_is_loaded_or_half_of_it(make, state):
    controller = make()
    before = controller.state_dict()
    with pytest.raises(ValueError):
        controller.load_state_dict(state)
    assert controller.state_dict() == before
