"""token_logprobs_from_hidden and kl_penalized_rewards_from_hidden against the equations and against the logits' ops."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rewardfuse
import vocabulary
import vocabulary_oracles
from pairs import assert_close, strided, to_device
from rewardfuse import kl_penalized_rewards_from_hidden as kl_from_hidden
from rewardfuse import kl_penalized_rewards_from_logits as kl_from_logits
from rewardfuse import token_logprobs, token_logprobs_from_hidden
from vocabulary import ESTIMATORS, LiveBytes

OUTPUTS = ("logprobs", "entropy", "kl")
GRADIENTS = ("hidden", "weight", "bias")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
ONE_AT_A_TIME, ALL_AT_ONCE = 1, 1 << 40  # budgets in bytes


class Heads(NamedTuple):
    """Hidden states and heads of policy and reference, and what was sampled."""

    hidden: torch.Tensor  # [*, H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    ref_hidden: torch.Tensor  # [*, H']
    ref_weight: torch.Tensor  # [V, H']
    ref_bias: torch.Tensor | None  # [V]
    tokens: torch.Tensor  # [*]
    options: dict

    def to(self, device):
        moved = [x.to(device, copy=True) if torch.is_tensor(x) else x for x in self[:-1]]
        return Heads(*moved, to_device(self.options, device))

    def leaves(self, device, names=GRADIENTS):
        """A copy whose named tensors of the policy want gradients."""
        copy = self.to(device)
        for name in names:
            if getattr(copy, name) is not None:
                getattr(copy, name).requires_grad_()
        return copy

    def expected(self, estimator, upstream, ref=True):
        def rows(x):
            return None if x is None else x.double().reshape(-1, x.shape[-1]).tolist()

        def flat(x):
            return None if x is None else x.double().tolist()

        case = vocabulary.Case(self.hidden, None, self.tokens, self.options)
        theirs = (rows(self.ref_hidden), rows(self.ref_weight), flat(self.ref_bias)) if ref else (None, None, None)
        return vocabulary_oracles.vocabulary_from_hidden(
            rows(self.hidden),
            rows(self.weight),
            self.tokens.flatten().tolist(),
            flat(self.bias),
            *theirs,
            mask=case.mask.flatten().tolist(),
            temperature=case.temperatures().flatten().tolist(),
            logit_softcap=self.options.get("logit_softcap"),
            estimator=estimator,
            upstream={name: weight.flatten().tolist() for name, weight in upstream.items()},
        )


def heads_of(shape=(2, 3), v=11, h=4, ref_h=None, bias=True, dtype=torch.float32, **options):
    """Random states, heads and tokens."""
    ref_h = ref_h or h
    biases = [torch.randn(v).to(dtype) if bias else None for _ in range(2)]
    ours = (torch.randn(*shape, h).to(dtype), torch.randn(v, h).to(dtype), biases[0])
    theirs = (torch.randn(*shape, ref_h).to(dtype), torch.randn(v, ref_h).to(dtype), biases[1])
    return Heads(*ours, *theirs, vocabulary.tokens_of(shape, v), options)


def kl(heads, estimator="full", **options):
    """kl_penalized_rewards_from_hidden of heads."""
    options = {"kl_coef": 0.25, "return_entropy": True, **heads.options, **options}
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, tokens, _ = heads
    biases = {"policy_bias": bias, "ref_bias": ref_bias}
    return kl_from_hidden(hidden, weight, ref_hidden, ref_weight, tokens, estimator=estimator, **biases, **options)


def gradients_of(outputs, heads, upstream, names=GRADIENTS):
    """Of the weighted outputs, by name; None where a head has no such tensor."""
    loss = vocabulary.weighted(outputs, to_device(upstream, heads.tokens.device))
    leaves = {name: getattr(heads, name) for name in names if getattr(heads, name) is not None}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True), strict=True))


def assert_gradients(found, expected, tolerance):
    for name, gradient in found.items():
        vocabulary.assert_rows_close(gradient, expected[f"d_{name}"], tolerance, f"gradient of {name}")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_value_or_gradient_differs_from_the_equations(backend, estimator):
    def check(choose):
        shape, dtype = choose([(1,), (3,), (2, 3), (2, 1, 2)]), choose((torch.float32, torch.float64))
        sizes = {"v": choose((1, 2, 7, 17, 33)), "h": choose((1, 3, 8)), "ref_h": choose((None, 5))}
        heads = heads_of(shape, bias=choose((True, False)), dtype=dtype, **sizes)
        heads.options["logit_softcap"] = choose((None, None, 3.0))
        heads.options["temperature"] = vocabulary.chosen_temperature(choose, shape)
        if choose((True, False)):
            heads.options["mask"] = torch.rand(shape) > 0.3
            heads = masked_rubbish(heads, choose((torch.nan, torch.inf, 7.0)))
        assert_equations(
            heads, backend, estimator, choose((None, 100, 1000) if backend.interpreted else (None, 1, 100))
        )

    vocabulary.for_seeds(backend, 12, check)


def assert_equations(heads, backend, estimator, budget):
    """KL, log-probs, entropy and the gradient of all three together equal the oracle's."""
    dtype, upstream = heads.hidden.dtype, vocabulary.upstream_of(heads.tokens, *OUTPUTS)
    expected, copy = heads.expected(estimator, upstream), heads.leaves(backend.device)
    result = kl(copy, estimator, memory_budget=budget)
    steepest = vocabulary.Case(heads.hidden, None, heads.tokens, heads.options).steepest()
    for name in (*OUTPUTS, "ref_logprobs"):
        value, truth = getattr(result, name), torch.tensor(expected[name], dtype=torch.float64)
        assert value.dtype is dtype and value.shape == heads.tokens.shape
        # k3 has e^-x: the rounding of x is relative to it
        scale = torch.tensor(expected["kl"]).abs().clamp(min=1) if name == "kl" else 1.0
        assert_close(value.flatten().cpu() / scale, truth / scale, 4 * TOLERANCE[dtype] * steepest, name)
    largest = max(1.0, *(abs(x) for row in expected["d_weight"] for x in row))
    found = gradients_of(result._asdict(), copy, upstream)
    assert_gradients(found, expected, 20 * TOLERANCE[dtype] * steepest * largest)


def masked_rubbish(heads, bad):
    """``bad`` in the states of masked tokens, and tokens that no vocabulary has."""
    mask = heads.options["mask"]
    rows = {n: torch.where(mask.unsqueeze(-1), getattr(heads, n), bad) for n in ("hidden", "ref_hidden")}
    return heads._replace(tokens=torch.where(mask, heads.tokens, -100), **rows)


@pytest.mark.parametrize("estimator", ["k2", "full", "full_forward"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_masked_state_reaches_a_value_or_the_gradient_of_the_weight(backend, estimator, bad):
    """0 times NaN is NaN: the weight's gradient is a product over all rows, masked ones too."""
    vocabulary.spare(backend, estimator != "full" or bad != torch.inf)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    clean, results = heads_of(mask=mask), []
    upstream = vocabulary.upstream_of(clean.tokens, *OUTPUTS)
    for heads in (clean, masked_rubbish(clean, bad)):
        copy = heads.leaves(backend.device)
        result = kl(copy, estimator, scores=torch.ones(2, device=backend.device))
        results.append([*result[:-1], *result.stats, *gradients_of(result._asdict(), copy, upstream).values()])
    for x, y in zip(*results, strict=True):
        assert y.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    d_hidden = results[1][-3].cpu()
    assert (d_hidden[~mask] == 0).all() and (d_hidden[mask] != 0).any()


def test_everything_masked_is_not_zero(backend):
    heads = masked_rubbish(heads_of(mask=torch.zeros(2, 3, dtype=torch.bool)), torch.nan).leaves(backend.device)
    result = kl(heads)
    gradients = gradients_of(result._asdict(), heads, vocabulary.upstream_of(heads.tokens, *OUTPUTS))
    assert all((x == 0).all() for x in (*result[:-1], *result.stats, *gradients.values()))


def test_a_broken_state_breaks_another_row(backend):
    clean, results = heads_of(), []
    dirty = clean._replace(hidden=clean.hidden.clone())
    dirty.hidden[0, 1, 2] = torch.nan
    upstream = vocabulary.upstream_of(clean.tokens, *OUTPUTS)
    for heads in (clean, dirty):
        copy = heads.leaves(backend.device)
        result = kl(copy)
        d_hidden = gradients_of(result._asdict(), copy, upstream)["hidden"]
        results.append([x.detach().flatten(0, 1).cpu() for x in (result.kl, result.logprobs, result.entropy, d_hidden)])
    others = torch.arange(6) != 1
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x[others], y[others], rtol=1e-6, atol=1e-6)
        assert y[1].isnan().any()


@pytest.mark.parametrize("budget", [ONE_AT_A_TIME, 64, 300, 1000, ALL_AT_ONCE, None])
@pytest.mark.parametrize("estimator", ["k3", "full", "full_forward"])
def test_a_memory_budget_changes_the_numbers(compiled_backend, estimator, budget):
    """From one row, one column at a time to everything at once; a tile's edge falls inside and at the end."""
    mask = torch.tensor([[True, True, False, True, True]] * 2)
    heads = heads_of((2, 5), v=19, dtype=torch.float64, mask=mask, temperature=torch.rand(2) + 0.5, logit_softcap=9.0)
    heads = masked_rubbish(heads, torch.nan)
    upstream = vocabulary.upstream_of(heads.tokens, *OUTPUTS)
    expected, copy = heads.expected(estimator, upstream), heads.leaves(compiled_backend.device)
    result = kl(copy, estimator, memory_budget=budget)
    for name in OUTPUTS:
        assert_close(getattr(result, name), expected[name], 1e-12, name)
    assert_gradients(gradients_of(result._asdict(), copy, upstream), expected, 1e-12)
    alone = token_logprobs_from_hidden(
        copy.hidden, copy.weight, copy.tokens, bias=copy.bias, return_entropy=True, memory_budget=budget, **copy.options
    )
    upstream.pop("kl")
    assert_close(alone.logprobs, expected["logprobs"], 1e-12, "logprobs")
    expected = heads.expected(estimator, upstream, ref=False)
    assert_gradients(gradients_of(alone._asdict(), copy, upstream), expected, 1e-12)


@pytest.mark.parametrize("budget", [ONE_AT_A_TIME, None])
@pytest.mark.parametrize(
    "wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias"), ()], ids=str
)
def test_a_gradient_is_missing_or_made_for_who_wants_none(compiled_backend, wanted, budget):
    heads = heads_of()
    upstream = vocabulary.upstream_of(heads.tokens, *OUTPUTS)
    for estimator in ("k3", "full"):
        expected, copy = heads.expected(estimator, upstream), heads.leaves(compiled_backend.device, wanted)
        result = kl(copy, estimator, memory_budget=budget)
        assert result.kl.requires_grad is bool(wanted)
        if wanted:
            assert_gradients(gradients_of(result._asdict(), copy, upstream, wanted), expected, 2e-5)
            vocabulary.weighted(result._asdict(), to_device(upstream, compiled_backend.device)).backward()
        assert all((getattr(copy, name).grad is not None) is (name in wanted) for name in GRADIENTS)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_gradient_reaches_the_reference(compiled_backend, estimator):
    heads = heads_of().leaves(compiled_backend.device, ("hidden", "ref_hidden", "ref_weight", "ref_bias"))
    result = kl(heads, estimator, differentiable_rewards=True)
    (result.kl.sum() + result.rewards.sum() + result.logprobs.sum()).backward()
    assert heads.hidden.grad is not None
    assert all(x.grad is None for x in (heads.ref_hidden, heads.ref_weight, heads.ref_bias))
    only_ref = kl(heads._replace(hidden=heads.hidden.detach()), estimator)
    assert not only_ref.kl.requires_grad


@pytest.mark.parametrize("budget", [ONE_AT_A_TIME, 300, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "full", "full_forward"])
def test_a_shared_weight_gets_the_gradient_of_the_reference(compiled_backend, estimator, bias, budget):
    """LoRA: one head for both models; its gradient is that through the policy alone."""
    apart = heads_of(bias=bias)
    apart = apart._replace(ref_weight=apart.weight, ref_bias=apart.bias)
    upstream = vocabulary.upstream_of(apart.tokens, *OUTPUTS)
    expected, copy = apart.expected(estimator, upstream), apart.leaves(compiled_backend.device)
    shared = copy._replace(ref_weight=copy.weight, ref_bias=copy.bias)
    result = kl(shared, estimator, memory_budget=budget)
    assert_close(result.kl, expected["kl"], 1e-5, "kl")
    assert_gradients(gradients_of(result._asdict(), shared, upstream), expected, 2e-5)


def test_another_view_of_a_weight_is_taken_for_the_shared_one(compiled_backend):
    """A square weight and its transpose begin at one address; so do a bias and what is not it."""
    square = heads_of(v=6, h=6)
    upstream = vocabulary.upstream_of(square.tokens, *OUTPUTS)
    copy = square.leaves(compiled_backend.device)
    for ours, theirs, bias in (
        (copy._replace(ref_weight=copy.weight.t()), square._replace(ref_weight=square.weight.t()), square.ref_bias),
        (copy._replace(ref_weight=copy.weight), square._replace(ref_weight=square.weight), square.ref_bias),
        (copy._replace(ref_weight=copy.weight, ref_bias=None), square._replace(ref_weight=square.weight), None),
    ):
        expected = theirs._replace(ref_bias=bias).expected("full", upstream)
        result = kl(ours, "full")
        assert_close(result.kl, expected["kl"], 1e-5, "kl")
        assert_gradients(gradients_of(result._asdict(), ours, upstream), expected, 2e-5)


@pytest.mark.parametrize("layout", ["shifted", "transposed", "every second", "expanded"])
def test_a_stride_is_ignored(compiled_backend, layout):
    heads = heads_of((3, 4), v=6, h=4)
    upstream = vocabulary.upstream_of(heads.tokens, *OUTPUTS)

    def view(x):
        if layout == "shifted":
            return torch.nn.functional.pad(x, (0, 0, 0, 1), value=torch.nan)[..., :-1, :]
        return x[:1].expand(x.shape) if layout == "expanded" else strided(x, layout)

    def laid_out(heads):
        rows = ("hidden", "ref_hidden", "weight", "ref_weight")
        return heads._replace(**{name: view(getattr(heads, name)).detach().requires_grad_() for name in rows})

    copy = laid_out(heads.to(compiled_backend.device))._replace(
        bias=heads.bias.to(compiled_backend.device).requires_grad_()
    )
    plain = heads._replace(
        **{name: getattr(copy, name).detach().cpu() for name in ("hidden", "ref_hidden", "weight", "ref_weight")}
    )
    for budget in (None, 200):
        result = kl(copy, "full", memory_budget=budget)
        expected = plain.expected("full", upstream)
        assert_close(result.kl, expected["kl"], 1e-5, "kl")
        assert_gradients(gradients_of(result._asdict(), copy, upstream), expected, 2e-5)


def test_a_state_scores_the_token_before_or_after_its_own(backend):
    """states[b, t] points at one token, which is ids[b, t + 1]."""
    ids = torch.tensor([[3, 1, 4, 1, 5], [2, 0, 6, 0, 1]], device=backend.device)
    weight = torch.eye(7, device=backend.device) * 100
    states = torch.nn.functional.one_hot(ids.roll(-1, 1), 7).float()
    right = token_logprobs_from_hidden(states[:, :-1], weight, ids[:, 1:])
    assert right.abs().max() == 0
    assert (token_logprobs_from_hidden(states[:, :-1], weight, ids[:, :-1]) == -100).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hidden_states_and_their_logits_differ(compiled_backend, estimator):
    heads = heads_of((2, 4), v=13, mask=torch.rand(2, 4) > 0.3).to(compiled_backend.device)
    logits = torch.nn.functional.linear(heads.hidden, heads.weight, heads.bias)
    ref_logits = torch.nn.functional.linear(heads.ref_hidden, heads.ref_weight, heads.ref_bias)
    given = {
        "scores": torch.randn(2, device=compiled_backend.device),
        "kl_coef": 0.3,
        "temperature": 0.8,
        "return_entropy": True,
    }
    given |= {"terminal": "one_past", "score_clip": 1.0, "output_clamp": 0.7, "estimator": estimator}
    found = kl(heads, **given)
    expected = kl_from_logits(logits, ref_logits, heads.tokens, **heads.options, **given)
    for x, y in zip((*found[:-1], *found.stats), (*expected[:-1], *expected.stats), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_an_integer_dtype_of_tokens_wraps_in_a_tile(backend, dtype):
    """A tile of the vocabulary subtracts its first token from all."""
    heads = heads_of((3,), v=300, h=2)._replace(tokens=torch.tensor([0, 100, 127], dtype=dtype))
    upstream = vocabulary.upstream_of(heads.tokens, "logprobs")
    expected, copy = heads.expected("k1", upstream, ref=False), heads.leaves(backend.device)
    given = {"bias": copy.bias, "memory_budget": 2000}
    logprobs = token_logprobs_from_hidden(copy.hidden, copy.weight, copy.tokens, **given)
    assert_close(logprobs, expected["logprobs"], 1e-5, "logprobs")
    assert_gradients(gradients_of({"logprobs": logprobs}, copy, upstream), expected, 2e-5)


@pytest.mark.parametrize("estimator", ["k2", "full"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (0, 0)], ids=str)
def test_no_tokens_fail(backend, shape, estimator):
    heads = heads_of(shape).leaves(backend.device)
    result = kl(heads, estimator)
    (result.kl.sum() + result.logprobs.sum() + result.entropy.sum()).backward()
    assert result.rewards.shape == result.entropy.shape == shape and all(x == 0 for x in result.stats)
    for name in GRADIENTS:
        leaf = getattr(heads, name)
        assert leaf.grad is None or (leaf.grad.shape == leaf.shape and (leaf.grad == 0).all())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck_fails(compiled_backend, estimator):
    heads = heads_of(v=5, h=3, dtype=torch.float64, temperature=0.7, logit_softcap=4.0)
    heads.options["mask"] = torch.tensor([[True, True, False], [True, False, True]])
    copy = heads.leaves(compiled_backend.device)

    def function(*policy):
        ours = dict(zip(GRADIENTS, policy, strict=True))
        result = kl(copy._replace(**ours), estimator, differentiable_rewards=True, memory_budget=150)
        return result.kl, result.rewards, result.logprobs, result.entropy, result.sequence_kl

    leaves = [getattr(copy, name) for name in GRADIENTS]
    assert torch.autograd.gradcheck(function, leaves)


def test_a_missing_second_derivative_is_silent(backend):
    heads = heads_of().leaves(backend.device)
    logprobs = token_logprobs_from_hidden(heads.hidden, heads.weight, heads.tokens)
    with pytest.raises(NotImplementedError, match="a second derivative"):
        torch.autograd.grad(logprobs.sum(), heads.hidden, create_graph=True)


def test_a_kept_graph_or_an_expanded_gradient_is_misread(compiled_backend):
    heads = heads_of().leaves(compiled_backend.device)
    logprobs = token_logprobs_from_hidden(heads.hidden, heads.weight, heads.tokens, bias=heads.bias)
    leaves = [getattr(heads, name) for name in GRADIENTS]
    weights = torch.tensor([[2.0], [3.0]], device=compiled_backend.device).expand(2, 3)
    found = [
        torch.autograd.grad(logprobs, leaves, w, retain_graph=True) for w in (weights, weights, weights.contiguous())
    ]
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_a_changed_input_goes_unnoticed(compiled_backend):
    heads = heads_of().leaves(compiled_backend.device)
    hidden = heads.hidden * 1.0
    loss = token_logprobs_from_hidden(hidden, heads.weight, heads.tokens).sum()
    with torch.no_grad():
        hidden += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_16_bits_exceeds_that_of_plain_torch(compiled_backend, dtype):
    """Against torch's linear layer in 16 bits and a log-softmax in float32, values and gradients."""
    torch.manual_seed(1)
    heads = heads_of((40,), v=500, h=32, dtype=dtype, bias=False)
    heads = heads._replace(weight=heads.weight / 4)

    def plain(copy, upcast):
        hidden, weight = (x.double() for x in copy[:2]) if upcast else copy[:2]
        logits = torch.nn.functional.linear(hidden, weight)
        logprobs = (logits if upcast else logits.float()).log_softmax(-1)
        return logprobs.gather(-1, copy.tokens[:, None])[:, 0]

    def ours(copy, budget):
        return token_logprobs_from_hidden(copy.hidden, copy.weight, copy.tokens, memory_budget=budget)

    results = []
    for function in (
        lambda c: plain(c, True),
        lambda c: plain(c, False),
        lambda c: ours(c, None),
        lambda c: ours(c, 9000),
    ):
        copy = heads.leaves(compiled_backend.device)
        logprobs = function(copy)
        gradients = torch.autograd.grad(logprobs.sum(), [copy.hidden, copy.weight])
        results.append([x.detach().double().cpu() for x in (logprobs, *gradients)])
    exact, theirs, *mine = results
    for found in mine:
        for truth, other, value in zip(exact, theirs, found, strict=True):
            assert (value - truth).square().mean().sqrt() <= 1.3 * (other - truth).square().mean().sqrt()


@pytest.mark.parametrize("budget", [None, 1 << 14])
def test_the_gradient_of_a_bf16_weight_is_added_up_in_bf16(compiled_backend, budget):
    """Many rows that all push the same way: in bfloat16 a sum of ones stands still at 256."""
    rows, v, h = 4096, 64, 8
    hidden = torch.ones(rows, h, dtype=torch.bfloat16, device=compiled_backend.device)
    weight = torch.zeros(v, h, dtype=torch.bfloat16, device=compiled_backend.device, requires_grad=True)
    bias = torch.zeros(v, dtype=torch.bfloat16, device=compiled_backend.device, requires_grad=True)
    tokens = torch.zeros(rows, dtype=torch.long, device=compiled_backend.device)
    logprobs = token_logprobs_from_hidden(hidden, weight, tokens, bias=bias, memory_budget=budget)
    d_weight, d_bias = torch.autograd.grad(logprobs.sum(), [weight, bias])
    for gradient in (d_weight.float(), d_bias.float().unsqueeze(-1).expand(v, h)):
        torch.testing.assert_close(gradient[0], torch.full_like(gradient[0], rows * (1 - 1 / v)), rtol=5e-3, atol=0)
        torch.testing.assert_close(gradient[1:], torch.full_like(gradient[1:], -rows / v), rtol=5e-3, atol=0)


def test_the_gradient_of_bf16_states_is_added_up_in_bf16(compiled_backend):
    """A tile of one column adds 2⁻¹⁰, which bfloat16 loses beside 1/4."""
    v = 1024
    hidden = torch.zeros(3, 8, dtype=torch.bfloat16, device=compiled_backend.device, requires_grad=True)
    weight = torch.ones(v, 8, dtype=torch.bfloat16, device=compiled_backend.device)
    weight[0] = 0
    tokens = torch.zeros(3, dtype=torch.long, device=compiled_backend.device)
    logprobs = token_logprobs_from_hidden(hidden, weight, tokens, memory_budget=ONE_AT_A_TIME)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    torch.testing.assert_close(gradient.float(), torch.full((3, 8), 1 / v - 1).to(gradient.device), rtol=5e-3, atol=0)


@pytest.mark.parametrize("estimator", ["logprobs", "k3", "full", "full_forward"])
def test_batch_times_vocabulary_is_held(compiled_backend, estimator):
    """No tensor, and not all tensors together, come near the logits of one model, neither forward nor backward."""
    rows, v, budget = 512, 2048, 1 << 18
    heads = heads_of((2, rows // 2), v=v, h=4).leaves(compiled_backend.device)
    logits, gradients = rows * v * 4, (v * 5 + rows * 4) * 4  # bytes
    with LiveBytes() as memory:
        if estimator == "logprobs":
            given = {"bias": heads.bias, "return_entropy": True, "memory_budget": budget}
            result = token_logprobs_from_hidden(heads.hidden, heads.weight, heads.tokens, **given)
            loss = result.logprobs.sum() + result.entropy.sum()
        else:
            result = kl(heads, estimator, memory_budget=budget)
            loss = result.kl.sum() + result.logprobs.sum() + result.entropy.sum()
        forward = memory.peak
        found = torch.autograd.grad(loss, [getattr(heads, name) for name in GRADIENTS])
    assert all(x.abs().max() > 0 for x in found)
    copies = 8 if compiled_backend.name == "reference" else 1  # plain torch holds every step between
    outputs = rows * 4 * 32
    assert memory.largest <= budget * min(copies, 2)
    assert forward <= budget * copies + outputs
    assert memory.peak <= budget * copies + outputs + 2 * gradients <= 0.7 * logits


@pytest.mark.parametrize(("name", "estimator"), [("native", "full"), ("native", "k3"), ("reference", "k3")])
def test_compiled_differs_from_eager(request, name, estimator):
    if name == "native":
        request.getfixturevalue("native")
    torch._dynamo.reset()
    heads = heads_of((2, 4)).leaves("cpu")
    leaves = [getattr(heads, n) for n in GRADIENTS]

    def step(hidden, weight, bias):
        result = kl(heads._replace(hidden=hidden * 1.5, weight=weight, bias=bias), estimator, memory_budget=400)
        return result.rewards, result.kl * 2, result.entropy

    with rewardfuse.use_backend(name):
        results = []
        for function in (step, torch.compile(step, backend="aot_eager")):
            rewards, divergence, entropy = function(*leaves)
            results.append(
                (rewards, divergence, entropy, *torch.autograd.grad(divergence.sum() + entropy.sum(), leaves))
            )
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_autocast_differs_from_a_linear_layer(compiled_backend):
    heads = heads_of((6,), v=50, h=16).leaves(compiled_backend.device)
    with torch.autocast(compiled_backend.device, dtype=torch.bfloat16):
        found = token_logprobs_from_hidden(heads.hidden, heads.weight, heads.tokens, bias=heads.bias)
        logits = torch.nn.functional.linear(heads.hidden, heads.weight, heads.bias)
    assert found.dtype is torch.float32 and logits.dtype is torch.bfloat16
    torch.testing.assert_close(found, token_logprobs(logits, heads.tokens), rtol=2e-2, atol=5e-2)
    gradients = torch.autograd.grad(found.sum(), [getattr(heads, name) for name in GRADIENTS])
    assert all(x.dtype is torch.float32 and x.isfinite().all() for x in gradients)


def test_another_batch_size_compiles_again(native):
    torch._dynamo.reset()
    weight = torch.randn(7, 8)
    compiled = torch.compile(
        lambda hidden, tokens: token_logprobs_from_hidden(hidden, weight, tokens),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for n in range(2, 14):  # more sizes than Dynamo would compile graphs for
        hidden, tokens = torch.randn(n, 4, 8, requires_grad=True), torch.randint(7, (n, 4))
        found = compiled(hidden, tokens)
        expected = token_logprobs_from_hidden(hidden, weight, tokens)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(x.sum(), hidden) for x in (found, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("estimator", ["k3", "full"])
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_data_have_no_shape(compiled_backend, kind, estimator):
    arguments = torch.randn(2, 3, 8), torch.randn(7, 8), torch.randn(2, 3, 8), torch.randn(7, 8)
    arguments += (torch.randint(7, (2, 3)),)
    with FakeTensorMode() if kind == "fake" else contextlib.nullcontext() as mode:
        make = mode.from_tensor if kind == "fake" else lambda tensor: tensor.to("meta")
        shaped = kl_from_hidden(*map(make, arguments), kl_coef=0.1, estimator=estimator)
    assert shaped.rewards.shape == shaped.kl.shape == (2, 3)
    assert shaped.sequence_kl.shape == (2,)
