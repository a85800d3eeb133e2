"""What every KL op promises besides its numbers: isolation, autograd, layouts, repeatability, compilation."""

import pytest
import torch

import rewardfuse
from conftest import BACKENDS
from kl_ops import OPS, Op
from pairs import assert_close, strided, to_device

op_cases = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def on_backends(ops):
    """Ops on every backend; on interpreted Triton one a kernel, but for logits, which would take minutes there and have
    test_token_logprobs.py."""
    return pytest.mark.parametrize(
        ("op", "backend"),
        [(op, b) for op in ops for b in BACKENDS if not b.interpreted or op.name in ("approx_kl", "rewards")],
        indirect=["backend"],
        ids=lambda value: value.name if isinstance(value, Op) else str(value),
    )


cases = on_backends(OPS)


@cases
def test_inputs_are_written_to(op, backend):
    tensors = op.tensors(backend.device)
    before = [(t.detach().clone(), t._version) for t in tensors.values()]
    op.gradients(tensors, op.function(**tensors))
    for t, (values, version) in zip(tensors.values(), before, strict=True):
        assert torch.equal(t, values) and t._version == version


@cases
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_the_mask_leaves_out_is_read(op, backend, bad):
    clean, results = op.tensors("cpu"), []
    clean["mask"][1] = False
    for spoil in (False, True):
        tensors = {name: t.detach().clone() for name, t in clean.items()}
        for name, t in tensors.items() if spoil else ():
            if t.shape[:2] == clean["mask"].shape and t.is_floating_point():
                t[~clean["mask"]] = bad
            elif name in ("scores", "temperature"):
                t[1] = bad
            elif name == "tokens":
                t[~clean["mask"]] = -(10**9)
        tensors = to_device(tensors, backend.device)
        for name in op.wants:
            tensors[name].requires_grad_()
        outputs = op.function(**tensors)
        results.append((*outputs, *op.gradients(tensors, outputs)))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right) and right.isfinite().all()


@cases
def test_stride_0_or_transposed_grad_output_is_misread(op, backend):
    tensors = op.tensors(backend.device)
    outputs = op.function(**tensors)
    differentiable = [o for o in outputs if o.requires_grad]
    one = torch.tensor(0.5, device=backend.device)
    dense = [torch.randn_like(o) for o in differentiable]
    transposed = [strided(d, "transposed" if d.dim() > 1 else "every second") for d in dense]
    for upstream in ([one.expand(o.shape) for o in differentiable], transposed):
        contiguous = [u.contiguous() for u in upstream]
        gradients = [op.gradients(tensors, outputs, grads, keep=True) for grads in (upstream, contiguous)]
        assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


@cases
def test_an_expanded_input_is_misread(op, backend):
    """Every tensor is one row or one column for all."""
    for size in ((1, 5), (3, 1)):
        tensors = op.tensors(backend.device, shape=size)
        mask = torch.ones(size, dtype=torch.bool, device=backend.device)
        tensors["mask"] = mask
        full = {
            name: t.expand(3, 5, *t.shape[2:]) if t.dim() > 1 else t.expand(3) if t.dim() else t
            for name, t in tensors.items()
        }
        results = []
        for arguments in (full, {name: t.contiguous() for name, t in full.items()}):
            outputs = op.function(**arguments)
            results.append((*outputs, *op.gradients(tensors, outputs)))
        for left, right in zip(*results, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@cases
@pytest.mark.parametrize("layout", ["transposed", "every second", "three strides"])
def test_a_layout_changes_the_bits(op, backend, layout):
    clean, results = op.tensors(backend.device, shape=(2, 3, 5)), []
    for kind in ("contiguous", layout):
        tensors = {name: strided(t.detach().clone(), kind) for name, t in clean.items()}
        for name in op.wants:
            tensors[name].requires_grad_()
        outputs = op.function(**tensors)
        results.append((*outputs, *op.gradients(tensors, outputs)))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


@cases
def test_gradcheck_fails(op, backend):
    tensors = op.tensors(backend.device, torch.float64)

    def function(*leaves):
        outputs = op.function(**{**tensors, **dict(zip(op.wants, leaves, strict=True))})
        return tuple(o for o in outputs if o.requires_grad)

    if op.name == "straight through":  # its gradient is not that of its value; of k2's it is
        leaf = tensors["logprobs"]
        (gradient,) = op.gradients(tensors, function(leaf))
        exact = 0.5 * (leaf - tensors["ref_logprobs"]) * tensors["mask"]
        torch.testing.assert_close(gradient, exact.detach(), rtol=1e-14, atol=0)
        return
    torch.autograd.gradcheck(function, [tensors[name] for name in op.wants], fast_mode=True)


@cases
def test_a_missing_second_derivative_is_silent(op, backend):
    tensors = op.tensors(backend.device, torch.float64)
    output = next(o for o in op.function(**tensors) if o.requires_grad)
    try:
        (gradient,) = torch.autograd.grad(output.square().sum(), tensors[op.wants[0]], create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), tensors[op.wants[0]])
    except NotImplementedError as error:
        assert str(error) == f"{op.op}: a second derivative (create_graph=True) is not implemented"
    else:
        assert backend.name == "reference" and second.abs().max() > 0


@cases
def test_second_backward_through_a_kept_graph_differs(op, backend):
    tensors = op.tensors(backend.device)
    outputs = op.function(**tensors)
    gradients = [op.gradients(tensors, outputs, keep=keep) for keep in (True, False)]
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


@cases
def test_a_gradient_is_made_for_who_wants_none(op, backend):
    tensors = op.tensors(backend.device)
    expected = dict(zip(op.wants, op.gradients(tensors, op.function(**tensors)), strict=True))
    for alone in op.wants:
        some = (
            {name: t.detach().requires_grad_(name == alone) for name, t in tensors.items()}
            if len(op.wants) > 1
            else tensors
        )
        outputs = [o for o in op.function(**some) if o.requires_grad]
        (gradient,) = torch.autograd.grad(outputs, some[alone], [torch.ones_like(o) for o in outputs])
        assert torch.equal(gradient, expected[alone])
    constants = {name: t.detach() for name, t in tensors.items()}
    assert not any(o.requires_grad for o in op.function(**constants))
    with torch.no_grad():
        assert not any(o.requires_grad for o in op.function(**tensors))


@cases
def test_one_output_alone_needs_the_gradients_of_the_others(op, backend):
    """Cotangents that are None count as 0; together they add up."""
    tensors = op.tensors(backend.device, torch.float64)
    outputs = [o for o in op.function(**tensors) if o.requires_grad]
    total = [torch.zeros_like(tensors[name]) for name in op.wants]
    for output in outputs:
        leaves = [tensors[name] for name in op.wants]
        alone = torch.autograd.grad(output.sum(), leaves, retain_graph=True, allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, alone, strict=True)]
    for left, right in zip(total, op.gradients(tensors, outputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


@cases
def test_a_changed_input_goes_unnoticed(op, backend):
    source = op.tensors(backend.device)
    first = op.wants[0]
    expected = op.gradients(source, op.function(**source))
    tensors = {**source, first: source[first] * 1.0}
    outputs = op.function(**tensors)
    with torch.no_grad():
        tensors[first] += 1
    try:
        gradients = op.gradients(source, outputs)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:  # it kept values of its own
        torch.testing.assert_close(gradients, expected)


@cases
def test_autocast_changes_the_numbers(op, backend):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = op.tensors(backend.device, dtype)
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            outputs = op.function(**tensors)
        for left, right in zip(outputs, op.function(**tensors), strict=True):
            assert left.dtype is torch.float32 and torch.equal(left, right)
        assert all(g.dtype is tensors[n].dtype for g, n in zip(op.gradients(tensors, outputs), op.wants, strict=True))


@on_backends(OPS[:4])
def test_two_dtypes_are_refused_or_the_narrow_one_rules(op, backend):
    tensors = op.tensors(backend.device)
    narrow = tensors["ref_logprobs"].half()
    for ref in (narrow, narrow.double()):
        outputs = op.function(**{**tensors, "ref_logprobs": ref})
        leaf = tensors["logprobs"].to(ref.dtype) if ref.dtype is torch.float64 else tensors["logprobs"]
        same = op.function(**{**tensors, "logprobs": leaf, "ref_logprobs": ref.to(leaf.dtype)})
        for left, right in zip(outputs, same, strict=True):
            assert left.dtype is leaf.dtype and torch.equal(left, right)
        assert op.gradients(tensors, outputs)[0].dtype is torch.float32


@cases
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_no_tokens_fail(op, backend, shape):
    tensors = op.tensors(backend.device, shape=shape)
    outputs = op.function(**tensors)
    for value in (*outputs, *op.gradients(tensors, outputs)):
        assert value.numel() == 0 or (value == 0).all()


@op_cases
@pytest.mark.parametrize("shape", [(3, 20_011), (4001, 5)], ids=str)
def test_the_number_of_threads_changes_the_bits(op, compiled_backend, shape):
    if compiled_backend.name == "reference":
        pytest.skip("torch's own sums may depend on the number of threads")
    tensors, results = op.tensors(compiled_backend.device, shape=shape), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        outputs = op.function(**tensors)
        results.append((*outputs, *op.gradients(tensors, outputs)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@op_cases
def test_a_long_row_or_many_rows_differ_from_the_reference(op, compiled_backend):
    """Beyond every block, vector and grain of a kernel."""
    for shape in ((2, 5003), (1030, 17)):
        tensors = op.tensors(compiled_backend.device, shape=shape)
        outputs = op.function(**tensors)
        with rewardfuse.use_backend("reference"):
            expected = op.function(**tensors)
        for value, exact in zip(outputs, expected, strict=True):
            torch.testing.assert_close(value, exact, rtol=3e-6, atol=3e-6)
        for value, exact in zip(op.gradients(tensors, outputs), op.gradients(tensors, expected), strict=True):
            torch.testing.assert_close(value, exact, rtol=3e-6, atol=3e-6)


@pytest.mark.large
def test_more_than_2_31_tokens_overflow_an_index(compiled_backend):
    if compiled_backend.name == "reference" or compiled_backend.instruction_set == "baseline":
        pytest.skip("holds [2^31] in float32 several times, or takes minutes")
    torch.set_num_threads(2)
    rows, steps, device = 2**21 + 1, 1024, compiled_backend.device
    logprobs = torch.zeros(rows, steps, dtype=torch.bfloat16, device=device)
    logprobs[-1, -1] = 2.0  # beyond 2^31
    ref = torch.zeros((), dtype=torch.bfloat16, device=device).expand(rows, steps)
    logprobs.requires_grad_()
    kl = rewardfuse.approx_kl(logprobs, ref, estimator="k2")
    assert kl[0, 0] == 0 and kl[-1, -1] == 2
    kl.sum().backward()
    assert logprobs.grad[-1, -1] == 2 and logprobs.grad[0, 0] == 0
    del kl
    logprobs.grad = None
    result = rewardfuse.kl_penalized_rewards(logprobs, ref, scores=torch.ones(rows, device=device), kl_coef=0.5)
    assert_close(result.rewards[-1, -2:], [0.0, 0.0], 1e-6, "rewards")
    assert_close(result.rewards[0, -2:], [0.0, 1.0], 1e-6, "rewards")
    assert result.sequence_kl[-1] == 2 and result.stats.tokens == rows * steps
    result.sequence_kl.sum().backward()
    assert logprobs.grad[-1, -1] == 1 and logprobs.grad[-1, 0] == 1
