"""Wrong arguments: the same exception type and text from every backend, through pybind11 and through torch.ops."""

import pytest
import torch

import rewardfuse
from list_errors import LIST_CASES

A, B = torch.zeros(3), torch.zeros(3)


def bt(**changes):
    return lambda: rewardfuse.bradley_terry_loss(**{"chosen": A, "rejected": B, **changes})


def tie(**changes):
    arguments = {"first": A, "second": B, "outcome": 1.0, "log_tie": 0.5, **changes}
    return lambda: rewardfuse.bradley_terry_tie_loss(**arguments)


WANTS_GRADIENT = torch.ones(3, requires_grad=True)
CASES = [
    (bt(rejected=torch.zeros(2)), ValueError, "rejected: expected the shape of chosen, [3], got [2]"),
    (bt(rejected=torch.zeros(3, 1)), ValueError, "rejected: expected the shape of chosen, [3], got [3, 1]"),
    (bt(rejected=B.double()), TypeError, "rejected: expected the dtype of chosen, torch.float32, got torch.float64"),
    (
        bt(chosen=A.long()),
        TypeError,
        "chosen: expected a tensor of float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (
        bt(chosen=A.cfloat()),
        TypeError,
        "chosen: expected a tensor of float16, bfloat16, float32 or float64, got torch.complex64",
    ),
    (bt(chosen=[1.0]), TypeError, "chosen: expected a tensor, got list"),
    (bt(rejected=B.to("meta")), ValueError, "rejected: expected the device of chosen, cpu, got meta"),
    (
        bt(margin=torch.zeros(1)),
        ValueError,
        "margin: expected a number, a 0-d tensor or the shape of chosen, [3], got [1]",
    ),
    (bt(margin=A.cfloat()), TypeError, "margin: expected a tensor of a real dtype, got torch.complex64"),
    (bt(margin="1"), TypeError, "margin: expected a number or a tensor, got str"),
    (bt(margin=float("nan")), ValueError, "margin: expected a number, got nan"),
    (bt(mask=torch.ones(3)), TypeError, "mask: expected a tensor of torch.bool, got torch.float32"),
    (bt(mask=torch.ones((), dtype=torch.bool)), ValueError, "mask: expected the shape of chosen, [3], got []"),
    (bt(weight=WANTS_GRADIENT), ValueError, "weight: expected a tensor that requires no gradient"),
    (bt(target=WANTS_GRADIENT), ValueError, "target: expected a tensor that requires no gradient"),
    (bt(target=1.5), ValueError, "target: expected from 0 to 1, got 1.5"),
    (bt(target=torch.tensor([0, 1.5, 0])), ValueError, "target: expected values from 0 to 1, got 1.5 at index 1"),
    (bt(target=torch.tensor([0, 1, torch.nan])), ValueError, "target: expected values from 0 to 1, got nan at index 2"),
    (bt(label_smoothing=0.6), ValueError, "label_smoothing: expected from 0 to 0.5, got 0.6"),
    (bt(beta=0.0), ValueError, "beta: expected positive and finite, got 0"),
    (
        bt(center_rewards_coefficient=-1.0),
        ValueError,
        "center_rewards_coefficient: expected finite and not negative, got -1",
    ),
    (bt(reduction="avg"), ValueError, 'reduction: expected "none", "sum" or "mean", got \'avg\''),
    (bt(normalizer=0), ValueError, "normalizer: expected a positive number or a 0-d tensor, got 0"),
    (bt(normalizer=torch.tensor(-1.0)), ValueError, "normalizer: expected a positive number or a 0-d tensor, got -1"),
    (bt(normalizer=torch.ones(1)), ValueError, "normalizer: expected a positive number or a 0-d tensor, got shape [1]"),
    (bt(normalizer=2, reduction="sum"), ValueError, 'normalizer: expected only with reduction="mean"'),
    (tie(second=torch.zeros(2)), ValueError, "second: expected the shape of first, [3], got [2]"),
    (tie(outcome=0.3), ValueError, "outcome: expected 1 (first wins), 0.5 (tie) or 0 (second wins), got 0.3"),
    (
        tie(outcome=torch.tensor([1, 0, 2])),
        ValueError,
        "outcome: expected 1 (first wins), 0.5 (tie) or 0 (second wins), got 2 at index 2",
    ),
    (tie(log_tie=-0.1), ValueError, "log_tie: expected log θ ≥ 0, got -0.1"),
    (tie(log_tie=torch.tensor(-0.5)), ValueError, "log_tie: expected log θ ≥ 0, got -0.5 at index 0"),
    (bt(mask=[True] * 3), TypeError, "mask: expected a tensor, got list"),
    (bt(beta="1"), TypeError, "beta: expected a number, got str"),
    (bt(label_smoothing=None), TypeError, "label_smoothing: expected a number, got NoneType"),
    (tie(outcome=None), TypeError, "outcome: expected a number or a tensor, got NoneType"),
    (tie(log_tie=None), TypeError, "log_tie: expected a number or a tensor, got NoneType"),
    (tie(model=["davidson"]), ValueError, 'model: expected "rao_kupper" or "davidson", got [\'davidson\']'),
    (tie(model="elo"), ValueError, 'model: expected "rao_kupper" or "davidson", got \'elo\''),
]


@pytest.mark.parametrize(
    ("call", "kind", "text"), CASES + LIST_CASES, ids=[text[:60] for *_, text in CASES + LIST_CASES]
)
def test_error_of_another_type_or_text(backend, call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).splitlines()[0] == text


# Checks that the C++ side makes itself, where the Python layer is not asked.
RAW = [
    ({"rejected": torch.zeros(2)}, ValueError),
    ({"rejected": B.double()}, TypeError),
    ({"margin": torch.zeros(1)}, ValueError),
    ({"mask": torch.ones(3)}, TypeError),
    ({"weight": WANTS_GRADIENT}, ValueError),
    ({"target_value": 1.5}, ValueError),
    ({"target": torch.tensor([0, 1.5, 0])}, ValueError),
    ({"label_smoothing": 0.6}, ValueError),
    ({"beta": float("inf")}, ValueError),
    ({"reduction": 3}, ValueError),
    ({"normalizer_value": -1.0}, ValueError),
    ({"normalizer": torch.zeros(())}, ValueError),
]
DEFAULTS = {
    **{"chosen": A, "rejected": B, "margin": None, "mask": None, "weight": None, "target": None, "normalizer": None},
    **{"margin_value": 0.0, "weight_value": 1.0, "target_value": 1.0, "normalizer_value": 0.0, "label_smoothing": 0.0},
    **{"beta": 1.0, "center_rewards_coefficient": 0.0, "reduction": 2, "return_stats": False},
}


@pytest.mark.parametrize(("change", "kind"), RAW, ids=[next(iter(change)) for change, _ in RAW])
def test_pybind11_and_torch_ops_raise_differently(native, change, kind):
    arguments = {**DEFAULTS, **change}
    errors = []
    for call in (
        lambda: native.bradley_terry_loss(*arguments.values()),
        lambda: torch.ops.rewardfuse.bradley_terry_loss(**arguments),
    ):
        with pytest.raises(kind) as error:
            call()
        errors.append(str(error.value).splitlines()[0])
    assert errors[0] == errors[1] and next(iter(change)).removesuffix("_value") in errors[0]


LIST_RAW = [
    ("plackett_luce_loss", {"lengths": torch.tensor([3, 4])}),
    ("plackett_luce_loss", {"order": torch.tensor([[0, 1, 1], [0, 1, 2]])}),
    ("plackett_luce_loss", {"top_k": torch.tensor([1, 0])}),
    ("plackett_luce_loss", {"cu_seqlens": torch.tensor([0, 3, 6])}),
    ("plackett_luce_loss", {"position_weight": torch.ones(2)}),
    ("plackett_luce_loss", {"item_weight": torch.ones(2)}),
    ("plackett_luce_loss", {"weight": WANTS_GRADIENT[:2]}),
    ("plackett_luce_loss", {"top_k_value": -1}),
    ("plackett_luce_loss", {"normalizer_value": -1.0}),
    ("plackett_luce_loss", {"reduction": 3}),
    ("all_pairs_loss", {"labels": torch.tensor([[0, 1, torch.nan], [0, 1, 2]])}),
    ("all_pairs_loss", {"labels": torch.zeros(3)}),
    ("all_pairs_loss", {"lengths": torch.tensor([-1, 0])}),
    ("all_pairs_loss", {"mask": torch.ones(2, 3)}),
    ("all_pairs_loss", {"margin": torch.ones(2)}),
    ("all_pairs_loss", {"reduction": -1}),
]
LIST_DEFAULTS = {
    "plackett_luce_loss": {
        **{"scores": torch.zeros(2, 3), "order": None, "cu_seqlens": None, "lengths": None, "mask": None},
        **{"top_k": None, "position_weight": None, "item_weight": None, "weight": None, "normalizer": None},
        **{"top_k_value": 0, "weight_value": 1.0, "normalizer_value": 0.0, "reduction": 2},
    },
    "all_pairs_loss": {
        **{"scores": torch.zeros(2, 3), "labels": torch.zeros(2, 3), "lengths": None, "mask": None, "margin": None},
        **{"weight": None, "normalizer": None, "margin_value": 0.0, "weight_value": 1.0, "normalizer_value": 0.0},
        **{"reduction": 2},
    },
}


@pytest.mark.parametrize(("op", "change"), LIST_RAW, ids=[f"{op}-{next(iter(change))}" for op, change in LIST_RAW])
def test_pybind11_and_torch_ops_raise_differently_on_lists(native, op, change):
    arguments = {**LIST_DEFAULTS[op], **change}
    errors = []
    for call in (
        lambda: getattr(native, op)(*arguments.values()),
        lambda: getattr(torch.ops.rewardfuse, op)(**arguments),
    ):
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        errors.append((type(error.value), str(error.value).splitlines()[0]))
    name = "scores" if "cu_seqlens" in change else next(iter(change)).removesuffix("_value")
    assert errors[0] == errors[1] and name in errors[0][1]


def test_a_raw_call_with_bad_numbers_crashes_the_process(native):
    ops = torch.ops.rewardfuse
    with pytest.raises(ValueError, match="log_tie"):
        ops.bradley_terry_tie_loss(A, B, log_tie_value=float("nan"), model=1)
    loss, _, _ = ops._bradley_terry_loss_forward(A, B, None, None, None, None, None, [0, 1, 2, 0, 0, 1, 0], 0, False)
    assert loss.isnan().all()
    with pytest.raises(ValueError, match="numbers"):
        ops._bradley_terry_loss_forward(A, B, None, None, None, None, None, [0], 2, False)


def test_an_unchecked_bad_value_is_not_nan():
    """What a GPU kernel does without checks(True); on the CPU only reference shows it, past its checks."""
    from rewardfuse.reference import bradley_terry_loss

    arguments = {**DEFAULTS, "target": torch.tensor([0.5, 2.0, 1.0]), "reduction": 0}
    loss, _ = bradley_terry_loss(**arguments)
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("op", "change", "bad"),
    [
        ("plackett_luce_loss", {"lengths": torch.tensor([3, 4])}, [False, True]),
        ("plackett_luce_loss", {"lengths": torch.tensor([-1, 2])}, [True, False]),
        ("plackett_luce_loss", {"order": torch.tensor([[0, 2, 2], [0, 1, 2]])}, [True, False]),
        ("plackett_luce_loss", {"order": torch.tensor([[0, 1, 2], [0, 1, 10**9]])}, [False, True]),
        ("plackett_luce_loss", {"top_k": torch.tensor([0, 1])}, [True, False]),
        ("plackett_luce_loss", {"scores": torch.zeros(6), "cu_seqlens": torch.tensor([0, 3, 7])}, [False, True]),
        ("all_pairs_loss", {"lengths": torch.tensor([3, 4])}, [False, True]),
        ("all_pairs_loss", {"labels": torch.tensor([[0, 1, 2], [0, torch.nan, 2]])}, [False, True]),
    ],
)
def test_an_unchecked_bad_value_of_a_list_is_not_nan_or_spoils_others(op, change, bad):
    """What a GPU kernel does without checks(True); on the CPU only reference shows it, past its checks."""
    from rewardfuse import reference

    loss = getattr(reference, op)(**{**LIST_DEFAULTS[op], **change, "reduction": 0})
    assert loss.isnan().tolist() == bad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["native", "triton", "reference"])
def test_bad_values_on_a_gpu_raise_only_under_checks(name):
    target = torch.tensor([0.5, 2.0, 1.0], device="cuda")
    with rewardfuse.use_backend(name):
        loss = rewardfuse.bradley_terry_loss(A.cuda(), B.cuda(), target=target, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        with (
            rewardfuse.checks(True),
            pytest.raises(ValueError, match="target: expected values from 0 to 1, got 2 at index 1"),
        ):
            rewardfuse.bradley_terry_loss(A.cuda(), B.cuda(), target=target)
