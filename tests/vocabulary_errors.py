"""Wrong arguments of the ops on rows of a vocabulary: calls, and the type and text of their errors."""

import torch

import rewardfuse

LOGITS, TOKENS, MASK = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
STATES, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)


def taken(**changes):
    return lambda: rewardfuse.token_logprobs(**{"logits": LOGITS, "tokens": TOKENS, **changes})


def kl(**changes):
    arguments = {"policy_logits": LOGITS, "ref_logits": LOGITS, "tokens": TOKENS, "kl_coef": 0.1, **changes}
    return lambda: rewardfuse.kl_penalized_rewards_from_logits(**arguments)


def taken_hidden(**changes):
    arguments = {"hidden": STATES, "weight": WEIGHT, "tokens": TOKENS, **changes}
    return lambda: rewardfuse.token_logprobs_from_hidden(**arguments)


def kl_hidden(**changes):
    models = {"policy_hidden": STATES, "policy_weight": WEIGHT, "ref_hidden": STATES, "ref_weight": WEIGHT}
    arguments = {**models, "tokens": TOKENS, "kl_coef": 0.1, **changes}
    return lambda: rewardfuse.kl_penalized_rewards_from_hidden(**arguments)


FLOATS = "expected a tensor of float16, bfloat16, float32 or float64, got torch.int64"
WHICH = 'expected "full", "full_forward", "k1", "k2", "k3" or "abs", got'
PER_TOKEN = "expected a number, a 0-d tensor, one a sequence, [2], or one a token, [2, 3], got [3]"
BEYOND, POSITIVE = "tokens: expected from 0 to 4, got", "temperature: expected positive and finite, got"
SCORES = "scores: expected one a sequence, [2], or one a token, [2, 3], got [3]"

#: What every op says alike: how it is called, and how it calls what the tokens stand beside.
COMMON = [
    case
    for call, rows in ((taken, "logits"), (kl, "policy_logits"), (taken_hidden, "hidden"), (kl_hidden, "policy_hidden"))
    for case in (
        (call(tokens=[0]), TypeError, "tokens: expected a tensor, got list"),
        (call(tokens=TOKENS.float()), TypeError, "tokens: expected a tensor of an integer dtype, got torch.float32"),
        (call(tokens=MASK), TypeError, "tokens: expected a tensor of an integer dtype, got torch.bool"),
        (
            call(tokens=TOKENS[:, 1:]),
            ValueError,
            f"tokens: expected the shape of {rows} without its last dimension, [2, 3], got [2, 2]",
        ),
        (call(tokens=TOKENS.to("meta")), ValueError, f"tokens: expected the device of {rows}, cpu, got meta"),
        (call(tokens=TOKENS + 5), ValueError, f"{BEYOND} 5 at index 0"),
        (call(tokens=TOKENS - torch.eye(3).long()[1:]), ValueError, f"{BEYOND} -1 at index 1"),
        (
            call(tokens=TOKENS - 7, mask=torch.arange(6).view(2, 3) > 3),
            ValueError,
            f"{BEYOND} -7 at index 4",
        ),
        (call(mask=[True]), TypeError, "mask: expected a tensor, got list"),
        (call(mask=MASK.float()), TypeError, "mask: expected a tensor of torch.bool, got torch.float32"),
        (call(mask=MASK[:, 1:]), ValueError, "mask: expected the shape of tokens, [2, 3], got [2, 2]"),
        (call(mask=MASK[0]), ValueError, "mask: expected the shape of tokens, [2, 3], got [3]"),
        (call(temperature=0), ValueError, f"{POSITIVE} 0"),
        (call(temperature=-1.0), ValueError, f"{POSITIVE} -1"),
        (call(temperature=float("inf")), ValueError, f"{POSITIVE} inf"),
        (call(temperature=float("nan")), ValueError, "temperature: expected a number, got nan"),
        (call(temperature="1"), TypeError, "temperature: expected a number or a tensor, got str"),
        (call(temperature=None), TypeError, "temperature: expected a number or a tensor, got NoneType"),
        (call(temperature=torch.tensor(0.0)), ValueError, f"{POSITIVE} 0 at index 0"),
        (call(temperature=torch.tensor([1.0, -1.0])), ValueError, f"{POSITIVE} -1 at index 3"),
        (call(temperature=torch.tensor([1.0, torch.nan])), ValueError, f"{POSITIVE} nan at index 3"),
        (call(temperature=torch.eye(3)[1:]), ValueError, f"{POSITIVE} 0 at index 0"),
        (call(temperature=torch.ones(3)), ValueError, f"temperature: {PER_TOKEN}"),
        (
            call(temperature=torch.ones(2, requires_grad=True)),
            ValueError,
            "temperature: expected a tensor that requires no gradient",
        ),
        (
            call(temperature=torch.ones(2).cfloat()),
            TypeError,
            "temperature: expected a tensor of a real dtype, got torch.complex64",
        ),
        (call(logit_softcap=0.0), ValueError, "logit_softcap: expected positive and finite, got 0"),
        (call(logit_softcap=-30), ValueError, "logit_softcap: expected positive and finite, got -30"),
        (call(logit_softcap="30"), TypeError, "logit_softcap: expected a number, got str"),
    )
]
#: What both ops on two models say alike.
SHAPED = [
    case
    for call in (kl, kl_hidden)
    for case in (
        (call(kl_coef=-0.1), ValueError, "kl_coef: expected finite and not negative, got -0.1"),
        (call(kl_coef=None), TypeError, "kl_coef: expected a number or a tensor, got NoneType"),
        (call(kl_coef=torch.tensor(-1.0)), ValueError, "kl_coef: expected finite and not negative, got -1"),
        (call(kl_coef=torch.ones(2)), ValueError, "kl_coef: expected a number or a 0-d tensor, got shape [2]"),
        (call(estimator="k4"), ValueError, f"estimator: {WHICH} 'k4'"),
        (call(estimator=None), ValueError, f"estimator: {WHICH} None"),
        (call(estimator=["full"]), ValueError, f"estimator: {WHICH} ['full']"),
        (
            call(estimator="full", gradient_estimator="k2"),
            ValueError,
            "gradient_estimator: expected None with estimator=\"full\", got 'k2'",
        ),
        (
            call(estimator="full_forward", input_clamp=20.0),
            ValueError,
            'input_clamp: expected None with estimator="full_forward", got 20.0',
        ),
        (
            call(gradient_estimator="full"),
            ValueError,
            'gradient_estimator: expected None, "k1", "k2", "k3" or "abs", got \'full\'',
        ),
        (
            call(output_clamp=-1.0, estimator="full"),
            ValueError,
            "output_clamp: expected None, a positive number or a pair (low, high), got -1.0",
        ),
        (call(scores=torch.zeros(3)), ValueError, SCORES),
        (call(scores=torch.zeros(3), estimator="full"), ValueError, SCORES),
        (call(scores=[0.0]), TypeError, "scores: expected a tensor, got list"),
        (call(terminal="first"), ValueError, 'terminal: expected "last" or "one_past", got \'first\''),
        (
            call(scores=torch.zeros(2, 3), terminal="one_past", estimator="full"),
            ValueError,
            'terminal: expected "last" with scores a token',
        ),
    )
]
#: The reference beside the policy, for an estimator of each kind.
TWO_MODELS = [
    case
    for estimator in ("k1", "full")
    for case in (
        (kl(policy_logits=[0.0], estimator=estimator), TypeError, "policy_logits: expected a tensor, got list"),
        (kl(ref_logits=[0.0], estimator=estimator), TypeError, "ref_logits: expected a tensor, got list"),
        (kl(policy_logits=LOGITS.long(), estimator=estimator), TypeError, f"policy_logits: {FLOATS}"),
        (
            kl(policy_logits=torch.zeros(()), estimator=estimator),
            ValueError,
            "policy_logits: expected a tensor [*, T, V], got a 0-d tensor",
        ),
        (
            kl(ref_logits=LOGITS[:, 1:], estimator=estimator),
            ValueError,
            "ref_logits: expected the shape of policy_logits, [2, 3, 5], got [2, 2, 5]",
        ),
        (
            kl(ref_logits=LOGITS[..., 1:], estimator=estimator),
            ValueError,
            "ref_logits: expected the shape of policy_logits, [2, 3, 5], got [2, 3, 4]",
        ),
        (
            kl(ref_logits=LOGITS.double(), estimator=estimator),
            TypeError,
            "ref_logits: expected the dtype of policy_logits, torch.float32, got torch.float64",
        ),
        (
            kl(ref_logits=LOGITS.to("meta"), estimator=estimator),
            ValueError,
            "ref_logits: expected the device of policy_logits, cpu, got meta",
        ),
        (
            kl(policy_logits=LOGITS[0, 0], ref_logits=LOGITS[0, 0], tokens=TOKENS[0, 0], estimator=estimator),
            ValueError,
            "tokens: expected a tensor [*, T], got a 0-d tensor",
        ),
        (kl(vocab_size=6, estimator=estimator), ValueError, "vocab_size: expected from 1 to 5, got 6"),
        (
            kl_hidden(policy_hidden=None, estimator=estimator),
            TypeError,
            "policy_hidden: expected a tensor, got NoneType",
        ),
        (kl_hidden(ref_hidden=[0.0], estimator=estimator), TypeError, "ref_hidden: expected a tensor, got list"),
        (
            kl_hidden(ref_hidden=STATES[:, 1:], estimator=estimator),
            ValueError,
            "ref_hidden: expected the shape of policy_hidden but for its width, [2, 3, 4], got [2, 2, 4]",
        ),
        (
            kl_hidden(ref_hidden=STATES.double(), ref_weight=WEIGHT.double(), estimator=estimator),
            TypeError,
            "ref_hidden: expected the dtype of policy_hidden, torch.float32, got torch.float64",
        ),
        (
            kl_hidden(ref_hidden=STATES.to("meta"), ref_weight=WEIGHT.to("meta"), estimator=estimator),
            ValueError,
            "ref_hidden: expected the device of policy_hidden, cpu, got meta",
        ),
        (
            kl_hidden(ref_weight=torch.zeros(6, 4), estimator=estimator),
            ValueError,
            "ref_weight: expected the vocabulary of policy_weight, 5, got 6",
        ),
        (
            kl_hidden(policy_hidden=STATES[0, 0], ref_hidden=STATES[0, 0], tokens=TOKENS[0, 0], estimator=estimator),
            ValueError,
            "tokens: expected a tensor [*, T], got a 0-d tensor",
        ),
    )
]
VOCABULARY_CASES = [
    *COMMON,
    *SHAPED,
    *TWO_MODELS,
    (taken(logits=[0.0]), TypeError, "logits: expected a tensor, got list"),
    (taken(logits=LOGITS.long()), TypeError, f"logits: {FLOATS}"),
    (taken(logits=torch.zeros(())), ValueError, "logits: expected a tensor [*, V], got a 0-d tensor"),
    (taken(vocab_size=0), ValueError, "vocab_size: expected from 1 to 5, got 0"),
    (taken(vocab_size=6), ValueError, "vocab_size: expected from 1 to 5, got 6"),
    (taken(vocab_size=2.0), TypeError, "vocab_size: expected an int, got float"),
    (taken(vocab_size=True), TypeError, "vocab_size: expected an int, got bool"),
    (taken(vocab_size=3, tokens=TOKENS + 3), ValueError, "tokens: expected from 0 to 2, got 3 at index 0"),
    (taken_hidden(hidden=[0.0]), TypeError, "hidden: expected a tensor, got list"),
    (taken_hidden(weight=None), TypeError, "weight: expected a tensor, got NoneType"),
    (taken_hidden(hidden=STATES.long()), TypeError, f"hidden: {FLOATS}"),
    (taken_hidden(hidden=torch.zeros(())), ValueError, "hidden: expected a tensor [*, H], got a 0-d tensor"),
    (
        taken_hidden(weight=torch.zeros(5, 3)),
        ValueError,
        "weight: expected a tensor [V, 4] beside hidden, got [5, 3]",
    ),
    (taken_hidden(weight=torch.zeros(4)), ValueError, "weight: expected a tensor [V, 4] beside hidden, got [4]"),
    (
        taken_hidden(weight=torch.zeros(0, 4)),
        ValueError,
        "weight: expected a tensor [V, 4] beside hidden, got [0, 4]",
    ),
    (
        taken_hidden(weight=WEIGHT.double()),
        TypeError,
        "weight: expected the dtype of hidden, torch.float32, got torch.float64",
    ),
    (taken_hidden(weight=WEIGHT.to("meta")), ValueError, "weight: expected the device of hidden, cpu, got meta"),
    (taken_hidden(bias=torch.zeros(4)), ValueError, "bias: expected one a row of weight, [5], got [4]"),
    (taken_hidden(bias=[0.0]), TypeError, "bias: expected a tensor, got list"),
    (
        taken_hidden(bias=torch.zeros(5).half()),
        TypeError,
        "bias: expected the dtype of hidden, torch.float32, got torch.float16",
    ),
    (
        kl_hidden(policy_weight=torch.zeros(5, 3)),
        ValueError,
        "policy_weight: expected a tensor [V, 4] beside policy_hidden, got [5, 3]",
    ),
    (
        kl_hidden(ref_weight=torch.zeros(5, 3)),
        ValueError,
        "ref_weight: expected a tensor [V, 4] beside ref_hidden, got [5, 3]",
    ),
    (
        kl_hidden(policy_weight=WEIGHT.half()),
        TypeError,
        "policy_weight: expected the dtype of policy_hidden, torch.float32, got torch.float16",
    ),
    (
        kl_hidden(policy_bias=torch.zeros(4)),
        ValueError,
        "policy_bias: expected one a row of policy_weight, [5], got [4]",
    ),
    (kl_hidden(ref_bias=torch.zeros(4)), ValueError, "ref_bias: expected one a row of ref_weight, [5], got [4]"),
    (
        taken_hidden(memory_budget=0),
        ValueError,
        "memory_budget: expected a positive number of bytes, got 0",
    ),
    (kl_hidden(memory_budget=-1), ValueError, "memory_budget: expected a positive number of bytes, got -1"),
    (taken_hidden(memory_budget=1e9), TypeError, "memory_budget: expected a number of bytes, got float"),
    (kl_hidden(memory_budget=True), TypeError, "memory_budget: expected a number of bytes, got bool"),
]
