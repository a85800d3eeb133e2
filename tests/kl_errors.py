"""Wrong arguments of the KL ops: calls, and the type and text of their errors."""

import math

import torch

import rewardfuse

X, TRUE = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
ENDED = torch.ones(2, dtype=torch.bool)


def kl(**changes):
    return lambda: rewardfuse.approx_kl(**{"logprobs": X, "ref_logprobs": X, **changes})


def rewards(**changes):
    arguments = {"logprobs": X, "ref_logprobs": X, "kl_coef": 0.1, **changes}
    return lambda: rewardfuse.kl_penalized_rewards(**arguments)


def whiten(**changes):
    return lambda: rewardfuse.masked_whiten(**{"values": X, **changes})


FLOATS = "expected a tensor of float16, bfloat16, float32 or float64, got torch.int64"
PAIR = "expected None, a positive number or a pair (low, high), got"
SHAPE = "expected the shape of logprobs, [2, 3], got"
PER_ITEM = "expected a number, a 0-d tensor or the shape of logprobs, [2, 3], got"
PER_ROW_OR_TOKEN = "expected one a sequence, [2], or one a token, [2, 3], got"
RANGE = "expected finite and not negative, got"


def of_both(function):
    """What approx_kl and kl_penalized_rewards have in common."""
    cases = [
        (function(logprobs=[0.0]), TypeError, "logprobs: expected a tensor, got list"),
        (function(ref_logprobs=0.0), TypeError, "ref_logprobs: expected a tensor, got float"),
        (function(mask=[True]), TypeError, "mask: expected a tensor, got list"),
        (function(logprobs=X.long()), TypeError, f"logprobs: {FLOATS}"),
        (function(logprobs=X.cfloat()), TypeError, f"logprobs: {FLOATS.replace('int64', 'complex64')}"),
        (function(ref_logprobs=X[:, :2]), ValueError, f"ref_logprobs: {SHAPE} [2, 2]"),
        (function(ref_logprobs=X[0]), ValueError, f"ref_logprobs: {SHAPE} [3]"),
        (
            function(ref_logprobs=X.to("meta")),
            ValueError,
            "ref_logprobs: expected the device of logprobs, cpu, got meta",
        ),
        (function(mask=TRUE.float()), TypeError, "mask: expected a tensor of torch.bool, got torch.float32"),
        (function(mask=TRUE.long()), TypeError, "mask: expected a tensor of torch.bool, got torch.int64"),
        (function(mask=TRUE[0]), ValueError, f"mask: {SHAPE} [3]"),
        (function(mask=TRUE.to("meta")), ValueError, "mask: expected the device of logprobs, cpu, got meta"),
    ]
    for name, besides in (("estimator", ""), ("gradient_estimator", "None, ")):
        for value in ("k4", "full", ["k1"], 1):
            text = f'{name}: expected {besides}"k1", "k2", "k3" or "abs", got {value!r}'
            cases.append((function(**{name: value}), ValueError, text))
    for name in ("input_clamp", "output_clamp"):
        cases += clamps(function, name)
    return cases


def clamps(function, name):
    """Bounds that are none."""
    values = {
        0: (ValueError, f"{PAIR} 0"),
        -1.5: (ValueError, f"{PAIR} -1.5"),
        math.nan: (ValueError, f"{PAIR} nan"),
        (2.0, 1.0): (ValueError, "expected low < high, got 2 and 1"),
        (1.0, 1.0): (ValueError, "expected low < high, got 1 and 1"),
        (math.nan, 1.0): (ValueError, "expected low < high, got nan and 1"),
        (1.0,): (ValueError, "expected a pair of numbers (low, high), got (1.0,)"),
        (1.0, 2.0, 3.0): (ValueError, "expected a pair of numbers (low, high), got (1.0, 2.0, 3.0)"),
        ("a", 1.0): (ValueError, "expected a pair of numbers (low, high), got ('a', 1.0)"),
        "10": (TypeError, "expected None, a number or a pair (low, high), got str"),
        torch.ones(2): (TypeError, "expected None, a number or a pair (low, high), got Tensor"),
    }
    return [(function(**{name: value}), kind, f"{name}: {text}") for value, (kind, text) in values.items()]


KL_CASES = [
    *of_both(kl),
    (kl(ref_logprobs=X.long()), TypeError, f"ref_logprobs: {FLOATS}"),
    (kl(importance_weight=torch.ones(3)), ValueError, f"importance_weight: {PER_ITEM} [3]"),
    (kl(importance_weight=torch.ones(1)), ValueError, f"importance_weight: {PER_ITEM} [1]"),
    (
        kl(importance_weight=X.cfloat()),
        TypeError,
        "importance_weight: expected a tensor of a real dtype, got torch.complex64",
    ),
    (kl(importance_weight="1"), TypeError, "importance_weight: expected a number or a tensor, got str"),
    (kl(importance_weight=math.nan), ValueError, "importance_weight: expected a number, got nan"),
    (
        kl(importance_weight=X.to("meta")),
        ValueError,
        "importance_weight: expected the device of logprobs, cpu, got meta",
    ),
]
REWARDS_CASES = [
    *of_both(rewards),
    (
        rewards(logprobs=X[0, 0], ref_logprobs=X[0, 0]),
        ValueError,
        "logprobs: expected a tensor [*, T], got a 0-d tensor",
    ),
    (rewards(kl_coef=None), TypeError, "kl_coef: expected a number or a tensor, got NoneType"),
    (rewards(kl_coef="0.1"), TypeError, "kl_coef: expected a number or a tensor, got str"),
    (rewards(kl_coef=-0.1), ValueError, f"kl_coef: {RANGE} -0.1"),
    (rewards(kl_coef=math.inf), ValueError, f"kl_coef: {RANGE} inf"),
    (rewards(kl_coef=math.nan), ValueError, "kl_coef: expected a number, got nan"),
    (rewards(kl_coef=torch.tensor(-0.5)), ValueError, f"kl_coef: {RANGE} -0.5"),
    (rewards(kl_coef=torch.tensor(math.nan)), ValueError, f"kl_coef: {RANGE} nan"),
    (rewards(kl_coef=torch.tensor(math.inf)), ValueError, f"kl_coef: {RANGE} inf"),
    (rewards(kl_coef=torch.ones(1)), ValueError, "kl_coef: expected a number or a 0-d tensor, got shape [1]"),
    (rewards(kl_coef=torch.ones(2)), ValueError, "kl_coef: expected a number or a 0-d tensor, got shape [2]"),
    (
        rewards(kl_coef=torch.tensor(0.1, requires_grad=True)),
        ValueError,
        "kl_coef: expected a tensor that requires no gradient",
    ),
    (
        rewards(kl_coef=torch.tensor(1j)),
        TypeError,
        "kl_coef: expected a tensor of a real dtype, got torch.complex64",
    ),
    (
        rewards(kl_coef=torch.tensor(0.1, device="meta")),
        ValueError,
        "kl_coef: expected the device of logprobs, cpu, got meta",
    ),
    (rewards(scores=[1.0, 2.0]), TypeError, "scores: expected a tensor, got list"),
    (rewards(scores=1.0), TypeError, "scores: expected a tensor, got float"),
    (rewards(scores=torch.ones(2).long()), TypeError, f"scores: {FLOATS}"),
    (rewards(scores=torch.ones(3)), ValueError, f"scores: {PER_ROW_OR_TOKEN} [3]"),
    (rewards(scores=torch.ones(())), ValueError, f"scores: {PER_ROW_OR_TOKEN} []"),
    (rewards(scores=torch.ones(2, 1)), ValueError, f"scores: {PER_ROW_OR_TOKEN} [2, 1]"),
    (
        rewards(scores=torch.ones(2, device="meta")),
        ValueError,
        "scores: expected the device of logprobs, cpu, got meta",
    ),
    *clamps(rewards, "score_clip"),
    (rewards(terminal="first"), ValueError, 'terminal: expected "last" or "one_past", got \'first\''),
    (rewards(terminal=None), ValueError, 'terminal: expected "last" or "one_past", got None'),
    (rewards(scores=X, terminal="one_past"), ValueError, 'terminal: expected "last" with scores a token'),
    (rewards(missing_eos="drop"), ValueError, 'missing_eos: expected "subtract" or "replace", got \'drop\''),
    (rewards(missing_eos_penalty=-1.0, ended=ENDED), ValueError, f"missing_eos_penalty: {RANGE} -1"),
    (rewards(missing_eos_penalty=math.inf, ended=ENDED), ValueError, f"missing_eos_penalty: {RANGE} inf"),
    (rewards(missing_eos_penalty="1", ended=ENDED), TypeError, "missing_eos_penalty: expected a number, got str"),
    (
        rewards(missing_eos_penalty=1.0),
        ValueError,
        "missing_eos_penalty: expected with ended, which says whom it hits",
    ),
    (rewards(ended=ENDED), ValueError, "ended: expected with missing_eos_penalty, which says what it costs"),
    (rewards(missing_eos_penalty=1.0, ended=[True, False]), TypeError, "ended: expected a tensor, got list"),
    (
        rewards(missing_eos_penalty=1.0, ended=ENDED.float()),
        TypeError,
        "ended: expected a tensor of torch.bool, got torch.float32",
    ),
    (
        rewards(missing_eos_penalty=1.0, ended=TRUE),
        ValueError,
        "ended: expected one a sequence, [2], got [2, 3]",
    ),
    (
        rewards(missing_eos_penalty=1.0, ended=ENDED.to("meta")),
        ValueError,
        "ended: expected the device of logprobs, cpu, got meta",
    ),
]
WHITEN_CASES = [
    (whiten(values=[1.0]), TypeError, "values: expected a tensor, got list"),
    (whiten(values=X.long()), TypeError, f"values: {FLOATS}"),
    (whiten(mask=[True]), TypeError, "mask: expected a tensor, got list"),
    (whiten(mask=X), TypeError, "mask: expected a tensor of torch.bool, got torch.float32"),
    (whiten(mask=TRUE[0]), ValueError, "mask: expected the shape of values, [2, 3], got [3]"),
    (whiten(mask=TRUE.to("meta")), ValueError, "mask: expected the device of values, cpu, got meta"),
]
