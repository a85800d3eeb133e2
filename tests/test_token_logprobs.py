"""token_logprobs against the equations, on every backend that the machine has."""

import math

import pytest
import torch

import rewardfuse
import vocabulary
from pairs import DTYPES, GRADIENT_TOLERANCE, assert_close, to_device
from rewardfuse import token_logprobs
from vocabulary import LAYOUTS, TOLERANCE, VOCABULARIES, Case, assert_rows_close, laid_out

SHAPES = [(), (1,), (3,), (2, 3), (2, 1, 2)]


def run(case, device, upstream, layout="contiguous"):
    """(outputs by name, gradient) of one call."""
    leaf = laid_out(case.logits.to(device, copy=True), layout).detach().requires_grad_()
    result = token_logprobs(leaf, case.tokens.to(device), return_entropy=True, **to_device(case.options, device))
    vocabulary.weighted(result._asdict(), to_device(upstream, device)).backward()
    return result._asdict(), leaf.grad


def assert_equations(case, backend, layout="contiguous"):
    """Log-probs, entropy and the gradient of both together equal the oracle's."""
    upstream = vocabulary.upstream_of(case.tokens, "logprobs", "entropy")
    outputs, gradient = run(case, backend.device, upstream, layout)
    expected, dtype, slack = case.expected(upstream=upstream, ref=False), case.logits.dtype, case.rounding()
    for name, value in outputs.items():
        assert value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert value.shape == case.tokens.shape
        assert_close(value, expected[name], TOLERANCE[dtype] + slack, name)
    assert gradient.dtype is dtype and gradient.shape == case.logits.shape
    allowed = (GRADIENT_TOLERANCE[dtype] + TOLERANCE[dtype] + slack) * case.steepest()
    assert_rows_close(gradient, expected["d_logits"], allowed, "gradient")


def test_value_or_gradient_differs_from_the_equations(backend):
    def check(choose):
        dtype, shape = choose(vocabulary.dtypes_of(backend)), choose(SHAPES)
        case = vocabulary.chosen_case(choose, shape, choose(VOCABULARIES), dtype)
        assert_equations(case, backend, choose(LAYOUTS))

    vocabulary.for_seeds(backend, 64, check)


@pytest.mark.parametrize("v", [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 1023, 1025, 2049, 8193])
def test_a_vocabulary_that_is_no_multiple_of_a_tile_reads_past_its_end(compiled_backend, v):
    for padding in (0, 1, 7):
        logits = torch.randn(3, v + padding) * 3
        logits[:, v:] = 1e30
        tokens = torch.tensor([0, v // 2, v - 1])
        case = Case(logits, None, tokens, {"vocab_size": v})
        assert_equations(case, compiled_backend)


def test_padding_of_the_vocabulary_gets_probability_or_a_gradient(backend):
    for bad in (torch.nan,) if backend.interpreted else (1e4, torch.inf, torch.nan):
        logits = torch.randn(4, 20)
        logits[:, 17:] = bad
        case = Case(logits, None, torch.arange(4), {"vocab_size": 17, "logit_softcap": 5.0})
        assert_equations(case, backend)
        *_, gradient = run(case, backend.device, {"logprobs": torch.ones(4)})
        assert (gradient[:, 17:] == 0).all()


def test_a_logit_scores_the_token_before_or_after_its_own(backend):
    """logits[b, t] is certain of one token; that token, and no neighbour in time, has log-prob 0."""
    ids = torch.tensor([[3, 1, 4, 1, 5], [2, 0, 6, 0, 1]])
    model_output = torch.full((2, 5, 7), -50.0)
    model_output[:, :-1].scatter_(-1, ids[:, 1:, None], 50.0)  # position t predicts ids[t + 1]
    model_output, ids = model_output.to(backend.device), ids.to(backend.device)
    assert token_logprobs(model_output[:, :-1], ids[:, 1:]).abs().max() == 0
    assert (token_logprobs(model_output[:, :-1], ids[:, :-1]) == -100).all()


def test_a_mask_is_off_by_one(backend):
    logits, tokens = torch.randn(2, 4, 5, device=backend.device), torch.ones(2, 4, dtype=torch.long)
    mask = torch.tensor([[False, True, True, False], [True, False, False, True]], device=backend.device)
    leaf, tokens = logits.requires_grad_(), tokens.to(backend.device)
    logprobs, entropy = token_logprobs(leaf, tokens, mask=mask, return_entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(logprobs != 0, mask) and torch.equal(entropy != 0, mask)
    assert torch.equal((leaf.grad != 0).any(-1), mask)


@pytest.mark.parametrize("view", ["shifted", "transposed", "sliced", "expanded", "reversed batch"])
def test_the_stride_of_a_row_is_ignored(backend, view):
    vocabulary.spare(backend, view not in ("shifted", "expanded"))
    whole = torch.randn(3, 4, 11, device=backend.device)
    logits = {
        "shifted": whole[:, :-1],
        "transposed": whole.transpose(0, 1),
        "sliced": whole[::2, 1:4:2, 2:9],
        "expanded": whole[:1, :2].expand(3, 2, 11),
        "reversed batch": whole.flip(0)[:, :, :-1],
    }[view]
    tokens = torch.randint(0, logits.shape[-1], logits.shape[:-1], device=backend.device)
    results = []
    for values in (logits, logits.contiguous()):
        leaf = values.detach().requires_grad_()
        logprobs, entropy = token_logprobs(leaf, tokens, return_entropy=True)
        (gradient,) = torch.autograd.grad(logprobs.sum() + 2 * entropy.sum(), leaf)
        results.append((logprobs.detach(), entropy.detach(), gradient))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_shifted_view_is_copied(backend):
    if backend.name == "reference" or backend.interpreted:
        pytest.skip("plain torch holds tensors of the vocabulary's size; the interpreter wraps every argument")
    output = torch.randn(2, 9, 512, device=backend.device, requires_grad=True)
    ids = torch.randint(0, 512, (2, 9), device=backend.device)
    with vocabulary.LiveBytes() as memory:
        logprobs = token_logprobs(output[:, :-1], ids[:, 1:])
    assert memory.peak < 512 * 4
    with vocabulary.LiveBytes() as memory:
        (gradient,) = torch.autograd.grad(logprobs.sum(), output)
    assert memory.peak < 2.2 * gradient.numel() * 4  # of the rows, and of the model's whole output


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_masked_row_reaches_a_value_or_a_gradient(backend, bad):
    mask = torch.tensor([[True, False, True], [False, False, True]])
    clean = Case(torch.randn(2, 3, 19), None, torch.randint(0, 19, (2, 3)), {"mask": mask})
    dirty = clean._replace(
        logits=torch.where(mask.unsqueeze(-1), clean.logits, bad), tokens=torch.where(mask, clean.tokens, -100)
    )
    upstream = vocabulary.upstream_of(clean.tokens, "logprobs", "entropy")
    upstream = {name: torch.where(mask, weight, torch.nan) for name, weight in upstream.items()}
    results = []
    for case in (clean, dirty):
        leaf = case.logits.to(backend.device, copy=True).requires_grad_()
        tokens, where = case.tokens.to(backend.device), mask.to(backend.device)
        outputs = token_logprobs(leaf, tokens, mask=where, return_entropy=True)
        weights = [upstream[name].float().to(backend.device) for name in ("logprobs", "entropy")]
        (gradient,) = torch.autograd.grad(outputs, leaf, weights)
        results.append([x.detach().cpu() for x in (*outputs, gradient)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert all((x[~mask] == 0).all() and x.isfinite().all() for x in results[1])


@pytest.mark.parametrize("kind", ["all -inf", "nan", "+inf"])
def test_a_broken_row_is_finite_or_breaks_another(backend, kind):
    for v in (5,) if backend.interpreted else (1, 5, 130):
        clean = torch.randn(4, v)
        dirty = clean.clone()
        if kind == "all -inf":
            dirty[1] = -torch.inf
        else:
            dirty[1, v // 2] = torch.nan if kind == "nan" else torch.inf
        others, tokens = torch.arange(4) != 1, torch.zeros(4, dtype=torch.long)
        upstream = vocabulary.upstream_of(tokens, "logprobs", "entropy")
        good, good_gradient = run(Case(clean, None, tokens, {}), backend.device, upstream)
        found, gradient = run(Case(dirty, None, tokens, {}), backend.device, upstream)
        for name, value in found.items():
            assert value[1].isnan()
            assert torch.equal(value.cpu()[others], good[name].cpu()[others])
        assert gradient[1].isnan().any()
        assert torch.equal(gradient.cpu()[others], good_gradient.cpu()[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_logit_of_minus_infinity_makes_nan(backend, dtype):
    """Such tokens are as if they were not there: 0 (-inf) is no term of the entropy or of a gradient."""
    if dtype not in vocabulary.dtypes_of(backend):
        pytest.skip("the interpreter truncates")
    logits = torch.randn(3, 33).to(dtype)
    gone = torch.arange(33) % 3 == 1
    logits[:, gone] = -torch.inf
    logits[2, :-1] = -torch.inf  # one token is certain
    tokens = torch.tensor([0, 32, 32])
    case = Case(logits, None, tokens, {})
    assert_equations(case, backend)
    upstream = vocabulary.upstream_of(tokens, "logprobs", "entropy")
    outputs, gradient = run(case, backend.device, upstream)
    assert (gradient.cpu()[:, gone] == 0).all()
    assert outputs["entropy"][2] == 0 and outputs["logprobs"][2] == 0 and (gradient[2] == 0).all()


def test_an_impossible_token_is_no_minus_infinity(backend):
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 2.0, 1.0]])
    case = Case(logits, None, torch.tensor([1, 1]), {})
    outputs, gradient = run(case, backend.device, {"logprobs": torch.ones(2)})
    assert outputs["logprobs"][0] == -torch.inf and outputs["logprobs"][1].isfinite()
    expected = case.expected(upstream={"logprobs": torch.ones(2)}, ref=False)["d_logits"]
    assert_close(gradient, expected, 1e-6, "gradient")


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 2)], ids=str)
def test_a_temperature_means_another_token_or_sequence(backend, shape):
    logits, tokens = torch.randn(*shape, 9), torch.randint(0, 9, shape)
    per_token, per_sequence = torch.rand(shape) + 0.5, torch.rand(shape[:-1]) + 0.5
    kinds = [per_sequence, per_token, 0.5, 3, torch.tensor(0.5), torch.tensor(2), per_token.double()]
    for temperature in kinds[:2] if backend.interpreted else kinds:
        assert_equations(Case(logits, None, tokens, {"temperature": temperature}), backend)


def test_temperature_is_applied_before_the_softcap(backend):
    logits, tokens = torch.linspace(-20, 20, 12).view(2, 6).to(backend.device), torch.tensor([5, 2])
    tokens = tokens.to(backend.device)
    found = token_logprobs(logits, tokens, temperature=0.25, logit_softcap=3.0)
    expected = (3 * torch.tanh(logits / 3) / 0.25).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_softcap_overflows_or_loses_digits_of_small_logits(backend):
    tokens, upstream = torch.tensor([0, 3]), {"logprobs": torch.ones(2), "entropy": torch.ones(2)}
    sizes = ((1e4, 30.0), (1e-5, 30.0), (1.0, 1e-3), (1.0, 1e6), (300.0, 300.0), (1e-30, 1.0))
    for size, cap in sizes[:2] if backend.interpreted else sizes:
        for dtype in (torch.float32,) if backend.interpreted else (torch.float32, torch.float64):
            logits = (torch.linspace(-1, 1, 14).view(2, 7) * size).to(dtype)
            case = Case(logits, None, tokens, {"logit_softcap": cap, "temperature": 0.5})
            assert_equations(case, backend)
            outputs, gradient = run(case, backend.device, upstream)
            assert gradient.isfinite().all()
            if size <= 1e-3 * cap:  # there the cap is no cap
                bare, uncapped = run(case._replace(options={"temperature": 0.5}), backend.device, upstream)
                torch.testing.assert_close(outputs["logprobs"], bare["logprobs"], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(gradient, uncapped, rtol=1e-5, atol=1e-6)


def plain_torch(logits, tokens):
    """(log-prob, entropy, gradient of their sum) by log_softmax in the type that is given."""
    leaf = logits.detach().clone().requires_grad_()
    logprobs = leaf.log_softmax(-1)
    terms = torch.where(logprobs == -torch.inf, 0.0, logprobs.exp() * logprobs)
    taken, entropy = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -terms.sum(-1)
    (taken.sum() + entropy.sum()).backward()
    return taken.detach().double(), entropy.detach().double(), leaf.grad.double()


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, -1e4])
@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_exceeds_four_times_that_of_plain_torch_in_float32(compiled_backend, dtype, spread, offset):
    logits = (torch.randn(16, 1000) * spread / 3 + offset).to(compiled_backend.device, dtype)
    logits[0] = offset  # all alike
    tokens = torch.where(torch.arange(16) % 2 == 0, logits.float().argmax(-1).cpu(), torch.randint(0, 1000, (16,)))
    tokens = tokens.to(compiled_backend.device)
    leaf = logits.requires_grad_()
    result = token_logprobs(leaf, tokens, return_entropy=True)
    (result.logprobs.sum() + result.entropy.sum()).backward()
    exact, plain = plain_torch(logits.double(), tokens), plain_torch(logits.float(), tokens)
    stored = torch.finfo(dtype).eps / 2 if dtype is not torch.float32 else 0.0
    for found, truth, allowed in zip((*result, leaf.grad), exact, plain, strict=True):
        error = (found.double() - truth).abs().max().item()
        rounding = torch.finfo(torch.float32).eps * truth.abs().max().item()
        if found is leaf.grad:
            rounding += stored * truth.abs().max().item() + torch.finfo(dtype).smallest_normal
        assert error <= 4 * max((allowed - truth).abs().max().item(), rounding)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_an_integer_dtype_of_tokens_is_misread(compiled_backend, dtype):
    logits, tokens = torch.randn(4, 200), torch.tensor([0, 1, 126, 127], dtype=dtype)
    if dtype is not torch.int8:
        tokens[2] = 199
    assert_equations(Case(logits, None, tokens, {}), compiled_backend)
    spread = torch.stack([tokens, tokens.flip(0)], -1)
    assert_equations(Case(logits, None, spread[:, 0], {}), compiled_backend)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (0, 0)], ids=str)
def test_no_tokens_fail(backend, shape):
    leaf = torch.randn(*shape, 7, device=backend.device, requires_grad=True)
    tokens = torch.zeros(shape, dtype=torch.long, device=backend.device)
    logprobs, entropy = token_logprobs(leaf, tokens, return_entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == shape and leaf.grad.shape == leaf.shape


def test_all_masked_rows_are_not_zero(backend):
    leaf = torch.full((2, 3, 5), torch.nan, device=backend.device, requires_grad=True)
    tokens = torch.full((2, 3), -1, device=backend.device)
    outputs = token_logprobs(leaf, tokens, mask=torch.zeros_like(tokens, dtype=torch.bool), return_entropy=True)
    (outputs.logprobs.sum() + outputs.entropy.sum()).backward()
    assert all((x == 0).all() for x in (*outputs, leaf.grad))


def test_the_logprobs_of_all_tokens_sum_to_more_or_less_than_1(backend):
    for v in (1, 2, 17) if backend.interpreted else (1, 2, 17, 129):
        row = torch.randn(v, dtype=torch.float64, device=backend.device) * 4
        logprobs = token_logprobs(row.expand(v, v), torch.arange(v, device=backend.device))
        assert logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_entropy_of_equal_logits_is_not_the_log_of_their_number(backend):
    for v in VOCABULARIES:
        logits = torch.full((2, v), -3.0, device=backend.device)
        result = token_logprobs(logits, torch.zeros(2, dtype=torch.long, device=backend.device), return_entropy=True)
        assert result.entropy.tolist() == pytest.approx([math.log(v)] * 2, rel=1e-6, abs=1e-6)


def test_entropy_changes_the_logprobs(backend):
    logits, tokens = torch.randn(3, 50, device=backend.device), torch.arange(3, device=backend.device)
    alone = token_logprobs(logits, tokens)
    assert isinstance(alone, torch.Tensor)
    assert torch.equal(alone, token_logprobs(logits, tokens, return_entropy=True).logprobs)


class TestAutograd:
    """What every differentiable function promises."""

    @pytest.mark.parametrize("options", [{}, {"logit_softcap": 2.0, "temperature": 0.7, "vocab_size": 5}], ids=str)
    def test_gradcheck_fails(self, compiled_backend, options):
        logits = torch.randn(2, 3, 6, dtype=torch.float64, device=compiled_backend.device, requires_grad=True)
        tokens = torch.randint(0, 5, (2, 3), device=compiled_backend.device)
        mask = torch.tensor([[True, True, False], [True, False, True]], device=compiled_backend.device)

        def function(x):
            return token_logprobs(x, tokens, mask=mask, return_entropy=True, **options)

        assert torch.autograd.gradcheck(function, logits)

    @pytest.mark.parametrize("output", [0, 1])
    def test_one_output_alone_needs_the_gradient_of_the_other(self, backend, output):
        case = Case(torch.randn(2, 9), None, torch.tensor([1, 8]), {})
        name = ("logprobs", "entropy")[output]
        upstream = {name: torch.tensor([1.0, -2.0])}
        _, gradient = run(case, backend.device, upstream)
        assert_close(gradient, case.expected(upstream=upstream, ref=False)["d_logits"], 2e-6, name)

    def test_a_missing_second_derivative_is_silent(self, backend):
        logits = torch.randn(3, 5, dtype=torch.float64, device=backend.device, requires_grad=True)
        logprobs = token_logprobs(logits, torch.arange(3, device=backend.device))
        try:
            (gradient,) = torch.autograd.grad(logprobs.sum(), logits, create_graph=True)
        except NotImplementedError as error:
            text = "token_logprobs: a second derivative (create_graph=True) is not implemented"
            assert str(error).splitlines()[0] == text
        else:
            assert backend.name == "reference"
            assert torch.autograd.grad(gradient.square().sum(), logits)[0].abs().max() > 0

    def test_second_backward_through_a_kept_graph_differs(self, backend):
        logits = torch.randn(3, 5, device=backend.device, requires_grad=True)
        loss = token_logprobs(logits, torch.arange(3, device=backend.device)).sum()
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.equal(first, torch.autograd.grad(loss, logits)[0])

    def test_a_gradient_is_made_for_who_wants_none(self, backend):
        logits, tokens = torch.randn(3, 5, device=backend.device), torch.arange(3, device=backend.device)
        assert not token_logprobs(logits, tokens).requires_grad
        with torch.no_grad():
            assert not token_logprobs(logits.requires_grad_(), tokens).requires_grad

    def test_a_changed_input_goes_unnoticed(self, backend):
        source = torch.randn(3, 5, device=backend.device, requires_grad=True)
        tokens = torch.arange(3, device=backend.device)
        (expected,) = torch.autograd.grad(token_logprobs(source, tokens).sum(), source)
        logits = source * 1.0
        loss = token_logprobs(logits, tokens).sum()
        with torch.no_grad():
            logits += torch.arange(5, device=backend.device)
        try:
            loss.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:  # it kept values of its own
            torch.testing.assert_close(source.grad, expected)

    def test_an_expanded_or_strided_gradient_is_misread(self, backend):
        logits = torch.randn(2, 3, 5, device=backend.device, requires_grad=True)
        tokens = torch.ones(2, 3, dtype=torch.long, device=backend.device)
        outputs = token_logprobs(logits, tokens, return_entropy=True)
        for weights in (torch.tensor(2.0).expand(2, 3), torch.randn(3, 2).t(), torch.randn(2, 1).expand(2, 3)):
            weights = weights.to(backend.device)
            found, expected = (
                torch.autograd.grad(outputs, logits, [w, w], retain_graph=True)[0]
                for w in (weights, weights.contiguous())
            )
            assert torch.equal(found, expected)

    def test_inputs_are_written_to(self, backend):
        case = vocabulary.poisoned(
            Case(torch.randn(2, 9), torch.randn(2, 9), torch.tensor([1, 8]), {"mask": torch.tensor([True, False])}), 3.0
        )
        tensors = [case.logits, case.tokens, case.mask]
        leaf, tokens, mask = (x.to(backend.device, copy=True) for x in tensors)
        leaf.requires_grad_()
        versions = [x._version for x in (leaf, tokens, mask)]
        token_logprobs(leaf, tokens, mask=mask).sum().backward()
        assert all(torch.equal(x.detach().cpu(), y) for x, y in zip((leaf, tokens, mask), tensors, strict=True))
        assert versions == [x._version for x in (leaf, tokens, mask)]

    def test_autocast_changes_the_numbers(self, backend):
        for dtype in (torch.float32, torch.bfloat16):
            leaf = torch.randn(3, 40).to(backend.device, dtype).requires_grad_()
            tokens = torch.arange(3, device=backend.device)
            with torch.autocast(backend.device, dtype=torch.bfloat16):
                logprobs = token_logprobs(leaf, tokens)
            assert logprobs.dtype is torch.float32 and torch.equal(logprobs, token_logprobs(leaf, tokens))
            logprobs.sum().backward()
            assert leaf.grad.dtype is dtype

    def test_the_number_of_threads_changes_the_bits(self, compiled_backend):
        if compiled_backend.name == "reference":
            pytest.skip("torch's own sums")
        for shape in ((64, 3000), (1, 70_000)):
            leaf = torch.randn(shape, device=compiled_backend.device, requires_grad=True)
            tokens, results = torch.zeros(shape[0], dtype=torch.long, device=compiled_backend.device), []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                outputs = token_logprobs(leaf, tokens, return_entropy=True)
                (gradient,) = torch.autograd.grad(outputs.logprobs.sum() + outputs.entropy.sum(), leaf)
                results.append((*outputs, gradient))
            for other in results[1:]:
                assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["native", "reference"])
def test_compiled_differs_from_eager(request, name):
    if name == "native":
        request.getfixturevalue("native")
    torch._dynamo.reset()

    def step(logits, tokens, mask):
        return token_logprobs(
            logits[:, :-1], tokens[:, 1:], mask=mask, temperature=0.5, logit_softcap=9.0, return_entropy=True
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with rewardfuse.use_backend(name):
        for b, t, v in ((2, 4, 11), (3, 6, 17)):
            logits, tokens = torch.randn(b, t, v, requires_grad=True), torch.randint(0, v, (b, t))
            mask = torch.rand(b, t - 1) > 0.3
            results = []
            for function in (step, compiled):
                outputs = function(logits, tokens, mask)
                (gradient,) = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), logits)
                results.append((*outputs, gradient))
            torch.testing.assert_close(*results)


def test_fake_or_meta_tensors_reach_a_kernel(native):
    logits, tokens = torch.randn(2, 3, 7, device="meta"), torch.zeros(2, 3, dtype=torch.long, device="meta")
    result = token_logprobs(logits, tokens, return_entropy=True)
    assert result.logprobs.device.type == "meta" and result.logprobs.shape == result.entropy.shape == (2, 3)


@pytest.mark.large
def test_more_than_2_31_logits_overflow_an_index(compiled_backend):
    if compiled_backend.name == "reference" or compiled_backend.instruction_set == "baseline":
        pytest.skip("holds [2^31] in float32 several times, or takes minutes")
    torch.set_num_threads(2)
    rows, v, device = 2**14 + 1, 2**17, compiled_backend.device
    logits = torch.zeros(rows, v, dtype=torch.bfloat16, device=device)  # 4.3 GB, as much again for the gradient
    logits[-1, -1] = 8.0  # beyond 2^31
    tokens = torch.zeros(rows, dtype=torch.long, device=device)
    tokens[-1] = v - 1
    log_mass = math.log((v - 1) + math.exp(8))
    entropies = [math.log(v), log_mass - 8 * math.exp(8 - log_mass)]
    leaf = logits.requires_grad_()
    result = token_logprobs(leaf, tokens, return_entropy=True)
    assert result.logprobs[[0, -2, -1]].tolist() == pytest.approx([-math.log(v)] * 2 + [8 - log_mass], rel=1e-5)
    assert result.entropy[[0, -1]].tolist() == pytest.approx(entropies, rel=1e-5)
    (gradient,) = torch.autograd.grad(result.logprobs.sum(), leaf)
    del result
    assert gradient[0, 0].item() == pytest.approx(1.0, rel=1e-2)
    assert gradient[0, 1].item() == pytest.approx(-1 / v, rel=1e-2)
    assert gradient[-1, -1].item() == pytest.approx(1 - math.exp(8 - log_mass), rel=1e-2)
    assert gradient[-1, 0].item() == pytest.approx(-math.exp(-log_mass), rel=1e-2)
