"""What every op on lists promises besides its numbers: isolation, autograd, layouts, repeatability, compilation."""

import math

import pytest
import torch

import rewardfuse
from lists import OPS, PADDED, lists_of_all_kinds
from pairs import strided, to_device

op_cases = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
padded_cases = pytest.mark.parametrize("op", PADDED, ids=lambda op: op.name)


def leaf(shape, device, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).to(device).requires_grad_()


@op_cases
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 3, 4])
def test_nan_leaves_its_list(op, backend, bad, place):
    clean = torch.randn(5, 5)
    dirty = clean.clone()
    dirty[2, place] = bad
    others = torch.arange(5) != 2
    for reduction in ("none", "sum", "mean"):
        results = []
        for values in (clean, dirty):
            scores = values.to(backend.device, copy=True).requires_grad_()
            loss = op.function(scores, reduction=reduction)
            loss.sum().backward()
            results.append((loss.detach().cpu(), scores.grad.cpu()))
        (loss, gradient), (bad_loss, bad_gradient) = results
        assert torch.equal(bad_gradient[others], gradient[others])
        if reduction == "none":
            assert torch.equal(bad_loss[others], loss[others])
            bad_loss = bad_loss[2]
        if bad is torch.nan:
            assert bad_loss.isnan() and bad_gradient[2].isnan().any()


@op_cases
def test_scores_of_a_list_of_weight_0_are_read(op, backend):
    values, weight = torch.randn(4, 5), torch.tensor([1.0, 0.0, 2.0, 0.0])
    values[weight == 0] = torch.nan
    scores = values.to(backend.device).requires_grad_()
    loss = op.function(scores, weight=weight.to(backend.device), reduction="none")
    loss.sum().backward()
    assert loss.isfinite().all() and (loss.cpu()[weight == 0] == 0).all()
    assert scores.grad.isfinite().all() and (scores.grad.cpu()[weight == 0] == 0).all()


@pytest.mark.parametrize("kind", lists_of_all_kinds())
def test_inputs_are_written_to(kind, backend):
    function, arguments = lists_of_all_kinds()[kind]
    arguments = to_device(arguments, backend.device)
    arguments["scores"].requires_grad_()
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    function(**arguments).backward()
    assert all(torch.equal(x, y) for x, y in zip(before, tensors, strict=True))
    assert versions == [t._version for t in tensors]


@op_cases
def test_a_common_offset_costs_digits(op, backend):
    near_zero = torch.randint(-256, 256, (6, 7), device=backend.device) / 64
    results = []
    for offset in (0.0, 8192.0, -8192.0):
        scores = (near_zero + offset).requires_grad_()
        loss = op.function(scores, reduction="none")
        results.append((loss, *torch.autograd.grad(loss.sum(), scores)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-6, atol=2e-6)


@padded_cases
def test_expanded_inputs_or_stride_0_grad_output_are_misread(op, backend):
    grad = torch.tensor(0.5, device=backend.device)
    for shape in ((1, 6), (4, 1)):
        scores = leaf(shape, backend.device)
        weight = torch.tensor(2.0, device=backend.device).expand(4)
        results = []
        for expanded in (scores.expand(4, 6), scores.expand(4, 6).contiguous()):
            loss = op.function(expanded, weight=weight, reduction="none")
            results.append((loss, *torch.autograd.grad(loss, scores, grad.expand(4), retain_graph=True)))
        dense = torch.autograd.grad(loss, scores, grad.expand(4).contiguous())
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(results[1][1:], dense, rtol=1e-6, atol=1e-6)


@padded_cases
@pytest.mark.parametrize("layout", ["transposed", "every second", "three strides"])
def test_a_layout_changes_the_bits(op, backend, layout):
    values = torch.randn(3, 4, 7).to(backend.device)
    results = []
    for scores in (values.clone().requires_grad_(), strided(values.clone(), layout).requires_grad_()):
        loss = op.function(scores, reduction="none")
        loss.sum().backward()
        results.append((loss.detach(), scores.grad))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@op_cases
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck_fails(op, backend, reduction):
    scores = leaf((3, 5), backend.device, torch.float64)
    weight = torch.tensor([0.5, 0.0, 2.0], device=backend.device)
    torch.autograd.gradcheck(
        lambda s: op.function(s, weight=weight, reduction=reduction), scores, fast_mode=backend.interpreted
    )


@op_cases
def test_a_missing_second_derivative_is_silent(op, backend):
    scores = leaf((3, 5), backend.device, torch.float64)
    loss = op.function(scores)
    try:
        (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    except NotImplementedError as error:
        assert f"{op.op}: a second derivative" in str(error)
    else:
        assert backend.name == "reference"
        assert torch.autograd.grad(gradient.square().sum(), scores)[0].abs().max() > 0


@op_cases
def test_second_backward_through_a_kept_graph_differs(op, backend):
    scores = leaf((3, 5), backend.device)
    loss = op.function(scores)
    (first,) = torch.autograd.grad(loss, scores, retain_graph=True)
    (second,) = torch.autograd.grad(loss, scores)
    assert torch.equal(first, second)


@op_cases
def test_a_gradient_is_made_for_who_wants_none(op, backend):
    scores = torch.randn(3, 5, device=backend.device)
    assert not op.function(scores).requires_grad
    with torch.no_grad():
        assert not op.function(scores.requires_grad_()).requires_grad


@op_cases
def test_a_changed_input_goes_unnoticed(op, backend):
    source = leaf((3, 5), backend.device)
    (expected,) = torch.autograd.grad(op.function(source), source)
    scores = source * 1.0
    loss = op.function(scores)
    with torch.no_grad():
        scores += torch.arange(5, device=backend.device)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:  # it kept values of its own
        torch.testing.assert_close(source.grad, expected)


@op_cases
def test_autocast_changes_the_loss(op, backend):
    for dtype in (torch.float32, torch.bfloat16):
        scores = leaf((3, 5), backend.device, dtype)
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            loss = op.function(scores)
        assert loss.dtype is torch.float32
        assert torch.equal(loss, op.function(scores))
        loss.backward()
        assert scores.grad.dtype is dtype


@op_cases
@pytest.mark.parametrize("shape", [(2000, 33), (3, 5000)], ids=str)
def test_the_number_of_threads_changes_the_bits(op, compiled_backend, shape):
    if op.op == "all_pairs_loss" and shape[-1] > 1024:
        shape = (3, 1024)
    scores, results = leaf(shape, compiled_backend.device), []
    for threads in (1, 2, 2, 1):
        if compiled_backend.name == "reference" and threads == 2:
            continue  # torch's own sums; each thread count repeats, but they may differ
        torch.set_num_threads(threads)
        loss = op.function(scores)
        results.append((loss.detach(), *torch.autograd.grad(loss, scores)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


class TestCompilation:
    """torch.compile, the dispatcher and tensors without data, for the native backend and the reference."""

    @pytest.mark.parametrize("kind", lists_of_all_kinds())
    @pytest.mark.parametrize("name", ["native", "reference"])
    def test_compiled_differs_from_eager(self, request, name, kind):
        if name == "native":
            request.getfixturevalue("native")
        function, arguments = lists_of_all_kinds()[kind]
        scores = arguments.pop("scores").requires_grad_()
        torch._dynamo.reset()
        # The reference pads packed lists to the longest, a size that no graph knows.
        whole = name == "native" or "packed" not in kind
        compiled = torch.compile(function, fullgraph=whole, backend="aot_eager")
        with rewardfuse.use_backend(name):
            expected = function(scores, **arguments)
            loss = compiled(scores, **arguments)
            gradients = [torch.autograd.grad(value, scores)[0] for value in (loss, expected)]
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*gradients)

    def test_a_new_shape_breaks_the_graph(self, native):
        torch._dynamo.reset()
        loss = torch.compile(rewardfuse.plackett_luce_loss, fullgraph=True, dynamic=True, backend="aot_eager")
        for shape in ((3, 7), (4, 9), (6, 12)):
            scores, lengths = leaf(shape, "cpu"), torch.randint(1, shape[-1], shape[:1])
            expected = rewardfuse.plackett_luce_loss(scores, lengths=lengths)
            torch.testing.assert_close(loss(scores, lengths=lengths), expected)

    @pytest.mark.parametrize("kind", lists_of_all_kinds())
    def test_fake_or_meta_tensors_reach_a_kernel(self, native, kind):
        function, arguments = lists_of_all_kinds()[kind]
        arguments.pop("normalizer", None)
        loss = function(**to_device(arguments, "meta"), reduction="none")
        assert loss.device.type == "meta" and loss.shape == function(**arguments, reduction="none").shape

    def test_registration_fails_opcheck(self, native):
        ops = torch.ops.rewardfuse
        scores, weight = leaf((3, 5), "cpu"), torch.rand(3)
        lengths, order = torch.tensor([5, 0, 3]), torch.arange(5).expand(3, 5)
        common = {"weight": weight, "weight_value": 1.0, "normalizer": None, "normalizer_value": 0.0, "reduction": 2}
        ranking = {
            "order": order,
            "cu_seqlens": None,
            "lengths": lengths,
            "mask": None,
            "top_k": torch.tensor([1, 2, 9]),
        }
        weights = {"position_weight": torch.rand(5), "item_weight": None, "top_k_value": 0}
        torch.library.opcheck(ops.plackett_luce_loss.default, (scores,), ranking | weights | common)
        packed = {
            "order": None,
            "cu_seqlens": torch.tensor([0, 1, 1, 15]),
            "lengths": None,
            "mask": None,
            "top_k": None,
        }
        weights["position_weight"] = None
        torch.library.opcheck(ops.plackett_luce_loss.default, (scores.detach().flatten(),), packed | weights | common)
        labels = {"labels": torch.randint(0, 3, (3, 5)), "lengths": None, "mask": torch.rand(3, 5) > 0.3}
        margin = {"margin": None, "margin_value": 0.5}
        torch.library.opcheck(ops.all_pairs_loss.default, (scores,), labels | margin | common)


@pytest.mark.large
def test_more_than_2_31_scores_overflow_an_index(compiled_backend):
    if compiled_backend.name == "reference" or compiled_backend.instruction_set == "baseline":
        pytest.skip("holds [2^31] in float32 several times, or takes minutes")
    torch.set_num_threads(2)
    rows, n, device = 2**21 + 1, 1024, compiled_backend.device
    scores = torch.zeros(rows, n, dtype=torch.bfloat16, device=device)
    scores[-1, 0] = 8.0  # beyond 2^31
    cu_seqlens = torch.arange(rows + 1, device=device) * n
    packed = (rewardfuse.plackett_luce_loss_packed, (scores.view(-1), cu_seqlens))
    for function, arguments in ((rewardfuse.plackett_luce_loss, (scores,)), packed):
        leaf = arguments[0].detach().requires_grad_()
        loss = function(leaf, *arguments[1:], top_k=1, reduction="none")
        loss.sum().backward()
        gradient = leaf.grad.view(rows, n)
        assert loss[0].item() == pytest.approx(math.log(n), rel=1e-5)
        assert loss[-1].item() == pytest.approx(math.log1p((n - 1) * math.exp(-8)), rel=1e-5)
        assert gradient[0, -1].item() == pytest.approx(1 / n, rel=1e-2)
        assert gradient[-1, 0].item() == pytest.approx(1 / (1 + (n - 1) * math.exp(-8)) - 1, rel=1e-2)
        del leaf, gradient, loss
    leaf = scores.view(-1, 4).requires_grad_()
    labels = (torch.arange(4, device=device) == 0).expand(leaf.shape)
    loss = rewardfuse.all_pairs_loss(leaf, labels, reduction="none")
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(math.log(2), rel=1e-5)
    assert loss[-n // 4].item() == pytest.approx(math.log1p(math.exp(-8)), rel=1e-4)
    assert leaf.grad[0, 0] == -0.5 and leaf.grad[-n // 4, 0].item() == pytest.approx(-3.352e-4, rel=1e-2)
