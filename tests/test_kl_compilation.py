"""The KL ops under torch.compile, torch.export and the dispatcher, for the native backend and the reference."""

import os
import subprocess
import sys

import pytest
import torch

import rewardfuse
from kl_ops import OPS, tensors_of
from pairs import to_device

op_cases = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@pytest.mark.parametrize(
    ("name", "op"),
    [*(("native", op) for op in OPS), *(("reference", op) for op in (OPS[1], OPS[2], OPS[4]))],
    ids=lambda value: getattr(value, "name", value),
)
def test_compiled_differs_from_eager(request, op, name):
    if name == "native":
        request.getfixturevalue("native")
    torch._dynamo.reset()
    # Of the reference it is enough to see that Dynamo traces it whole.
    compiler = "aot_eager" if name == "native" else "eager"
    compiled = torch.compile(op.function, fullgraph=True, dynamic=True, backend=compiler)
    with rewardfuse.use_backend(name):
        for shape in ((3, 5), (4, 9)):  # one graph serves all shapes
            tensors = op.tensors("cpu", shape=shape)
            expected, outputs = op.function(**tensors), compiled(**tensors)
            torch.testing.assert_close(tuple(outputs), tuple(expected))
            gradients = op.gradients(tensors, outputs)
            torch.testing.assert_close(gradients, op.gradients(tensors, expected))


@pytest.mark.parametrize("op", OPS[::2], ids=lambda op: op.name)
def test_export_loses_the_op(native, op):
    tensors = {name: t.detach() for name, t in op.tensors("cpu").items()}

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return tuple(op.function(**tensors))

    rows, steps = torch.export.Dim("rows", min=2), torch.export.Dim("steps", min=2)
    dims = {0: (), 1: (rows,), 2: (rows, steps), 3: (rows, steps, None)}
    dynamic = {"tensors": {name: dict(enumerate(dims[t.dim()])) for name, t in tensors.items()}}
    program = torch.export.export(Module(), (tensors,), dynamic_shapes=dynamic)
    assert f"rewardfuse.{op.op}" in program.graph_module.code
    other = {name: t.detach() for name, t in op.tensors("cpu", shape=(4, 9)).items()}
    torch.testing.assert_close(program.module()(other), Module()(other))


@op_cases
def test_fake_or_meta_tensors_reach_a_kernel(native, op):
    tensors = {name: t.detach() for name, t in op.tensors("cpu").items()}
    outputs = op.function(**to_device(tensors, "meta"))
    for meta, real in zip(outputs, op.function(**tensors), strict=True):
        assert meta.device.type == "meta" and meta.shape == real.shape and meta.dtype is real.dtype


def test_a_changing_coefficient_breaks_the_graph(native):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, ref, beta: rewardfuse.kl_penalized_rewards(x, ref, kl_coef=beta).rewards,
        fullgraph=True,
        backend="aot_eager",
    )
    x, ref = torch.randn(2, 3), torch.randn(2, 3)
    for beta in (0.1, 0.2, 0.3, torch.tensor(0.4), torch.tensor(0.5)):
        expected = rewardfuse.kl_penalized_rewards(x, ref, kl_coef=beta).rewards
        torch.testing.assert_close(compiled(x, ref, beta), expected)


def test_whitening_breaks_the_graph(native):
    torch._dynamo.reset()

    def whitened(x, ref, mask, scores):
        options = {"kl_coef": 0.1, "scores": scores, "terminal": "one_past", "whiten_rewards": True}
        return rewardfuse.kl_penalized_rewards(x, ref, mask, **options).rewards

    compiled = torch.compile(whitened, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3), (4, 6)):
        arguments = (torch.randn(shape), torch.randn(shape), torch.rand(shape) > 0.3, torch.randn(shape[0]))
        torch.testing.assert_close(compiled(*arguments), whitened(*arguments))


def test_registration_fails_opcheck(native):
    ops, no = torch.ops.rewardfuse, float("inf")
    t = tensors_of((3, 5), torch.float32)
    clamps = {"input_low": -2.0, "input_high": no, "output_low": -no, "output_high": 4.0}
    how = {"estimator": 2, "gradient_estimator": -1, **clamps}
    leaf, weight, scores = (t[n].requires_grad_() for n in ("logprobs", "importance_weight", "scores"))
    torch.library.opcheck(
        ops.approx_kl.default, (leaf, t["ref_logprobs"], weight, t["mask"]), {"importance_weight_value": 1.0, **how}
    )
    shaping = {"kl_coef_value": 0.0, "missing_eos_penalty": 0.5, "score_low": -1.0, "score_high": 1.0, **how}
    shaping |= {"one_past": True, "replace": False}
    arguments = (leaf, t["ref_logprobs"], t["mask"], scores, t["ended"], t["kl_coef"])
    for differentiable in (False, True):
        options = {**shaping, "differentiable_rewards": differentiable}
        torch.library.opcheck(ops.kl_penalized_rewards.default, arguments, options)
    logits = t["logits"].requires_grad_()
    temperature = t["temperature"].unsqueeze(-1).expand(3, 5)
    cooling = {"temperature_value": 1.0, "softcap": 5.0, "vocab_size": 6}
    for ref, direction in ((None, 0), (t["ref_logits"], 1), (t["ref_logits"], 2)):
        arguments = (logits, ref, t["tokens"], t["mask"], temperature)
        options = {**cooling, "direction": direction, "entropy": True}
        torch.library.opcheck(ops.token_logprobs.default, arguments, options)


def test_a_compiled_call_that_is_a_process_s_first_breaks_the_graph():
    code = (
        "import torch, rewardfuse\n"
        "step = torch.compile(rewardfuse.token_logprobs, fullgraph=True, backend='eager')\n"
        "print(step(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)).exp().sum().item())"
    )
    environment = os.environ | {"REWARDFUSE_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "0.75", done.stderr[-2000:]
