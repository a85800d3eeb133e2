"""Every op stands in every layer under one stem, or in the table below with the reason why not."""

import pathlib

import pytest
import torch

import rewardfuse
import rewardfuse.reference

ROOT = pathlib.Path(__file__).parent.parent
OPS = {
    "all_pairs": "all_pairs_loss",
    "approx_kl": "approx_kl",
    "bradley_terry": "bradley_terry_loss",
    "bradley_terry_tie": "bradley_terry_tie_loss",
    "kl_penalized_rewards": "kl_penalized_rewards",
    "plackett_luce": "plackett_luce_loss",
    "token_logprobs": "token_logprobs",
}
FILES = (
    "csrc/autograd/{}.cpp",
    "kernels/{}/math.h",
    "kernels/{}/cpu.cpp",
    "kernels/{}/cuda.cu",
    "kernels/{}/triton.py",
    "python/rewardfuse/ops/{}.py",
    "python/rewardfuse/reference/{}.py",
)
# (stem, file pattern): why that op does without that layer.
WITHOUT: dict[tuple[str, str], str] = {
    ("token_logprobs", "kernels/{}/cuda.cu"): "bound by memory: Triton alone serves it on a GPU",
}
# Rooms that are no ops: what several ops share.
SHARED = {
    "kernels": {"lists", "pairwise"},
    "csrc/autograd": {"kl_penalized_rewards_cuda", "lists", "lists_cuda", "pairwise", "pairwise_cuda"},
}


@pytest.mark.parametrize("stem", OPS)
def test_an_op_lacks_a_layer(stem):
    lacking = [f for f in FILES if not (ROOT / f.format(stem)).exists() and (stem, f) not in WITHOUT]
    assert lacking == []
    assert all((ROOT / f.format(s)).exists() is False for s, f in WITHOUT), "the table excuses what exists"


def test_an_op_is_missing_from_the_table():
    kernels = {
        p.parent.name for p in (ROOT / "kernels").glob("*/*") if p.name != "__init__.py" and p.parent.name[0] != "_"
    }
    autograd = {p.stem for p in (ROOT / "csrc/autograd").glob("*.cpp")}
    ops = {p.stem for p in (ROOT / "python/rewardfuse/ops").glob("*.py") if not p.stem.startswith("_")}
    assert kernels - SHARED["kernels"] == autograd - SHARED["csrc/autograd"] == ops == set(OPS)


@pytest.mark.parametrize("name", OPS.values())
def test_a_backend_lacks_an_op(native, name):
    assert callable(getattr(rewardfuse, name))
    assert callable(getattr(rewardfuse.reference, name))
    assert callable(getattr(native, name))
    for registered in (name, f"_{name}_forward", f"_{name}_backward"):
        assert hasattr(torch.ops.rewardfuse, registered)
    kernels = pytest.importorskip("rewardfuse.kernels", reason="triton is not installed")
    assert callable(getattr(kernels, name))


def test_a_public_name_has_no_docstring():
    assert [name for name in rewardfuse.__all__ if not (getattr(rewardfuse, name).__doc__ or "").strip()] == []


def test_cpu_and_cuda_kernels_include_torch():
    sources = [*ROOT.glob("kernels/**/*.cpp"), *ROOT.glob("kernels/**/*.cu"), *ROOT.glob("kernels/**/*.h")]
    assert sources and not [p for p in sources if "torch/" in p.read_text() or "ATen/" in p.read_text()]
