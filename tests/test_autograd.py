"""Gradients beyond the plain backward: higher derivatives, who wants one, autocast, compilation, registration."""

import functools
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import rewardfuse
from pairs import OPS, to_device

op_cases = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
ALL_OPTIONS = {"label_smoothing": 0.1, "beta": 0.7, "center_rewards_coefficient": 0.01}


def double(n, device):
    return torch.randn(n, dtype=torch.float64, device=device, requires_grad=True)


@op_cases
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck_fails(op, backend, reduction):
    a, b, p = (double(5, backend.device) for _ in range(3))
    arguments = op.plain((5,)) | {"mask": torch.tensor([1, 1, 0, 1, 1]).bool(), "weight": torch.rand(5).double()}
    arguments = to_device(arguments, backend.device)
    for parameter in (p, p[0].detach().clone().requires_grad_()):
        torch.autograd.gradcheck(
            lambda a, b, p: op.function(a, b, **{**arguments, op.names[2]: p.abs()}, reduction=reduction),
            (a, b, parameter),
            fast_mode=backend.interpreted,
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_bradley_terry_second_derivative_fails(backend, reduction):
    a, b, p = (double(4, backend.device) for _ in range(3))
    for mask in (None, torch.tensor([True, True, False, True], device=backend.device)):
        options = {"mask": mask, "weight": 0.5, "target": 0.9, "reduction": reduction, **ALL_OPTIONS}
        loss = functools.partial(rewardfuse.bradley_terry_loss, **options)
        torch.autograd.gradgradcheck(loss, (a, b, p), fast_mode=backend.interpreted)


def test_a_gradient_penalty_has_a_constant_gradient(backend):
    """A backward that calls a raw kernel returns constants under create_graph=True, silently."""
    weight = double(3, backend.device)
    x = torch.randn(6, 3, dtype=torch.float64, device=backend.device, requires_grad=True)

    def penalty(loss):
        scores = x @ weight
        (gradient,) = torch.autograd.grad(loss(scores[:3], scores[3:]), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), weight)[0]

    plain = penalty(lambda c, r: -torch.nn.functional.logsigmoid(c - r).mean())
    torch.testing.assert_close(penalty(rewardfuse.bradley_terry_loss), plain)
    assert plain.abs().min() > 0


def test_an_input_that_depends_on_another_is_counted_twice(backend):
    """Under create_graph=True a saved input's own history must not be differentiated with it."""

    def gradient(loss, create_graph):
        x = torch.linspace(-1, 1, 5, dtype=torch.float64, device=backend.device).requires_grad_()
        return torch.autograd.grad(loss(x, x * 0.25, x * x), x, create_graph=create_graph)[0]

    for create_graph in (False, True):
        plain = gradient(lambda c, r, m: -torch.nn.functional.logsigmoid(c - r - m).mean(), create_graph)
        torch.testing.assert_close(gradient(rewardfuse.bradley_terry_loss, create_graph), plain)


@pytest.mark.parametrize("model", ["rao_kupper", "davidson"])
def test_a_missing_second_derivative_is_silent(backend, model):
    a, b = (double(4, backend.device) for _ in "ab")
    loss = rewardfuse.bradley_terry_tie_loss(a, b, 0.5, log_tie=0.5, model=model)
    if backend.name == "reference":
        (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), a)[0].abs().max() > 0
    else:
        with pytest.raises(NotImplementedError, match="bradley_terry_tie_loss: a second derivative"):
            torch.autograd.grad(loss, a, create_graph=True)


@op_cases
def test_second_backward_through_a_kept_graph_differs(op, backend):
    a, b = (double(9, backend.device) for _ in "ab")
    loss = op.function(a, b, **to_device(op.plain((9,)), backend.device))
    first = torch.autograd.grad(loss, (a, b), retain_graph=True)
    second = torch.autograd.grad(loss, (a, b))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@op_cases
def test_a_gradient_is_made_for_who_wants_none(op, backend):
    plain = to_device(op.plain((9,)), backend.device)
    for wants in ((True, False), (False, True)):
        a, b = (torch.randn(9, device=backend.device, requires_grad=want) for want in wants)
        op.function(a, b, **plain).backward()
        assert ((a.grad is not None), (b.grad is not None)) == wants
    a, b = (torch.randn(9, device=backend.device) for _ in "ab")
    assert not op.function(a, b, **plain).requires_grad


def test_a_changed_input_goes_unnoticed(backend):
    a, b = (torch.randn(9, device=backend.device, requires_grad=True) for _ in "ab")
    score = a * 1.0
    loss = rewardfuse.bradley_terry_loss(score, b)
    expected = torch.autograd.grad(rewardfuse.bradley_terry_loss(a, b), a)[0]
    score += 1
    if backend.name == "reference":  # keeps values of its own
        loss.backward()
        torch.testing.assert_close(a.grad, expected)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@op_cases
def test_autocast_changes_the_loss_or_refuses_two_dtypes(op, backend):
    a = torch.randn(9, device=backend.device, requires_grad=True)
    b = torch.randn(9, device=backend.device, dtype=torch.bfloat16, requires_grad=True)
    plain = to_device(op.plain((9,)), backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        loss = op.function(a, b, **plain)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, op.function(a, b.float(), **plain))
    loss.backward()
    assert a.grad.dtype is torch.float32 and b.grad.dtype is torch.bfloat16


class TestCompilation:
    """torch.compile, torch.export and the dispatcher, for the native backend and the reference."""

    def loss(self, a, b, m, w, mask):
        loss, stats = rewardfuse.bradley_terry_loss(a, b, m, weight=w, mask=mask, **ALL_OPTIONS, return_stats=True)
        tie = rewardfuse.bradley_terry_tie_loss(a, b, 0.5, log_tie=m.abs())
        return loss + tie, stats.accuracy

    def arguments(self, n):
        tensors = [torch.randn(n, requires_grad=True) for _ in range(3)]
        return [*tensors, torch.rand(n), torch.rand(n) > 0.3]

    @pytest.mark.parametrize("name", ["native", "reference"])
    def test_compiled_differs_from_eager(self, name):
        counter = CompileCounter()
        with rewardfuse.use_backend(name):
            torch._dynamo.reset()
            for compiler in ("aot_eager", counter):
                compiled = torch.compile(self.loss, fullgraph=True, dynamic=True, backend=compiler)
                for n in (8, 13, 21):
                    x = self.arguments(n)
                    eager, accuracy = self.loss(*x)
                    expected = torch.autograd.grad(eager, x[:3])
                    loss, compiled_accuracy = compiled(*x)
                    torch.testing.assert_close((loss, compiled_accuracy), (eager, accuracy))
                    torch.testing.assert_close(torch.autograd.grad(loss, x[:3]), expected)
        assert counter.frame_count == 1  # one graph serves all lengths

    def test_inductor_differs_from_eager(self, native):
        torch._dynamo.reset()
        compiled = torch.compile(lambda a, b: rewardfuse.bradley_terry_loss(a * 2, b).exp(), fullgraph=True)
        a, b = (torch.randn(50, requires_grad=True) for _ in "ab")
        expected = torch.autograd.grad(rewardfuse.bradley_terry_loss(a * 2, b).exp(), (a, b))
        torch.testing.assert_close(torch.autograd.grad(compiled(a, b), (a, b)), expected)

    def test_backend_switch_goes_unnoticed_by_a_compiled_function(self, native):
        torch._dynamo.reset()
        graphs = []

        def record(graph, _):
            graphs.append("bradley_terry_loss" in str(graph.code))
            return graph.forward

        compiled = torch.compile(rewardfuse.bradley_terry_loss, backend=record)
        a, b = torch.randn(4), torch.randn(4)
        compiled(a, b)
        with rewardfuse.use_backend("reference"):
            compiled(a, b)
        assert graphs == [True, False]

    def test_a_changing_number_breaks_the_graph(self, native):
        torch._dynamo.reset()
        compiled = torch.compile(rewardfuse.bradley_terry_loss, fullgraph=True, backend="aot_eager")
        a, b = torch.randn(4), torch.randn(4)
        for margin in (0.5, 0.7, 0.9):
            torch.testing.assert_close(compiled(a, b, margin), rewardfuse.bradley_terry_loss(a, b, margin))
        per_length = torch.compile(
            lambda a, b: rewardfuse.bradley_terry_loss(a, b, normalizer=2 * a.shape[0]),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        for n in (4, 9):
            a, b = torch.randn(n), torch.randn(n)
            torch.testing.assert_close(per_length(a, b), rewardfuse.bradley_terry_loss(a, b) / 2)

    def test_export_loses_the_op(self, native):
        class Module(torch.nn.Module):
            def forward(self, a, b):
                return rewardfuse.bradley_terry_loss(a, b, reduction="none")

        a, b = torch.randn(6), torch.randn(6)
        batch = torch.export.Dim("batch")
        program = torch.export.export(Module(), (a, b), dynamic_shapes=({0: batch}, {0: batch}))
        assert "rewardfuse" in program.graph_module.code
        a, b = torch.randn(9), torch.randn(9)
        torch.testing.assert_close(program.module()(a, b), Module()(a, b))

    def test_compiling_warns(self, native):
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.compile(rewardfuse.bradley_terry_loss, fullgraph=True, backend="eager")(
                torch.randn(4), torch.randn(4)
            )


def test_registration_fails_opcheck(native):
    ops = torch.ops.rewardfuse
    a, b, m = (torch.randn(5, requires_grad=True) for _ in range(3))
    mask, w = torch.rand(5) > 0.3, torch.rand(5)
    torch.library.opcheck(ops.bradley_terry_loss.default, (a, b, m, mask, w), {"return_stats": True, "beta": 0.5})
    torch.library.opcheck(ops.bradley_terry_tie_loss.default, (a, b, None, m.abs().detach(), mask), {"model": 1})
    a, b, m = a.detach(), b.detach(), m.detach()
    numbers = [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    for name in ("bradley_terry_loss", "bradley_terry_tie_loss"):
        forward, backward = getattr(ops, f"_{name}_forward"), getattr(ops, f"_{name}_backward")
        torch.library.opcheck(forward.default, (a, b, m.abs(), mask, w, None, None, numbers, 2, True))
        count = torch.tensor(4.0, dtype=torch.float64)
        needs = (True, False, True)
        arguments = (torch.ones(()), a, b, m.abs(), mask, w, None, None, count, numbers, 2, *needs)
        torch.library.opcheck(backward.default, arguments)


def test_fake_or_meta_tensors_reach_a_kernel(native):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        loss, stats = rewardfuse.bradley_terry_loss(torch.randn(4), torch.randn(4), return_stats=True)
        assert loss.shape == () and stats.accuracy.shape == ()
    meta = torch.randn(4, device="meta")
    assert rewardfuse.bradley_terry_loss(meta, meta, reduction="none").device.type == "meta"
