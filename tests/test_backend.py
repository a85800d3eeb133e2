"""Choosing a backend: the order, the wishes, the warnings, and what importing costs."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import rewardfuse
from rewardfuse import _backend, _build


def run(code, **environment):
    """Standard output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout.strip()


def test_the_order_of_choice_is_wish_environment_native(native):
    assert rewardfuse.backend("cpu") == "native"
    with rewardfuse.use_backend("reference"):
        assert rewardfuse.backend("cpu") == "reference"
        with rewardfuse.use_backend("native"):
            assert rewardfuse.backend() == "native"
        assert rewardfuse.backend() == "reference"
    code = "import rewardfuse as r; a = r.backend()\nwith r.use_backend('native'): print(a, r.backend())"
    assert run(code, REWARDFUSE_BACKEND="reference") == "reference native"


def test_use_backend_serves_by_another(native, monkeypatch):
    called = []
    from rewardfuse import reference

    original = reference.bradley_terry_loss
    monkeypatch.setattr(reference, "bradley_terry_loss", lambda *a: called.append(1) or original(*a))
    with rewardfuse.use_backend("reference"):
        rewardfuse.bradley_terry_loss(torch.ones(2), torch.zeros(2))
    rewardfuse.bradley_terry_loss(torch.ones(2), torch.zeros(2))
    assert called == [1]


def test_an_unmet_wish_falls_back_silently(monkeypatch):
    with pytest.raises(ValueError, match="backend: expected one of native, triton, reference, got 'cuda'"):
        rewardfuse.use_backend("cuda").__enter__()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        rewardfuse.use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' was asked for but cannot serve cpu"),
    ):
        rewardfuse.bradley_terry_loss(torch.ones(2), torch.zeros(2))
    monkeypatch.setenv("REWARDFUSE_BACKEND", "fastest")
    monkeypatch.setattr(_backend, "_chosen", {})
    with pytest.raises(ValueError, match="REWARDFUSE_BACKEND: expected one of"):
        rewardfuse.bradley_terry_loss(torch.ones(2), torch.zeros(2))


def test_a_fallback_away_from_native_is_silent_or_warns_twice(monkeypatch):
    monkeypatch.setattr(_backend, "_C", None)
    monkeypatch.setattr(_backend, "_chosen", {})
    monkeypatch.setattr(_build, "NATIVE_REASON", "not built: no C++ compiler was found")
    with pytest.warns(
        RuntimeWarning, match="reference backend for cpu tensors: not built: no C\\+\\+ compiler"
    ) as seen:
        loss = rewardfuse.bradley_terry_loss(torch.ones(2), torch.zeros(2))
        rewardfuse.bradley_terry_loss(torch.ones(2), torch.zeros(2))
    assert len(seen) == 1 and loss.item() == pytest.approx(0.3132616)


def test_another_device_type_crashes(monkeypatch):
    meta = torch.ones(2, device="meta")
    assert rewardfuse.bradley_terry_loss(meta, meta).device.type == "meta"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(_backend, "_chosen", {})
        monkeypatch.setattr(_backend, "_C", None)
        assert rewardfuse.bradley_terry_loss(meta, meta).device.type == "meta"


def test_checks_do_not_come_back_as_they_were():
    assert not _backend.checks_enabled()
    with rewardfuse.checks(True):
        assert _backend.checks_enabled()
        with rewardfuse.checks(False):
            assert not _backend.checks_enabled()
        assert _backend.checks_enabled()
    assert not _backend.checks_enabled()


def test_an_unknown_instruction_set_is_taken(native):
    before = native.instruction_set()
    with pytest.raises(ValueError, match="instruction set: expected one that this machine has"):
        native.set_instruction_set("avx1024")
    assert native.instruction_set() == before


def test_importing_loads_transformers_or_triton_or_takes_long():
    code = """
import time, sys, json, torch
start = time.perf_counter()
import rewardfuse
seconds = time.perf_counter() - start
rewardfuse.bradley_terry_loss(torch.ones(2), torch.zeros(2))
print(json.dumps([seconds, [m for m in ("transformers", "triton", "accelerate", "scipy") if m in sys.modules]]))
"""
    # What torch itself imports is torch's affair; the best of three stands for an idle machine.
    alone = run("import torch, sys, json; print(json.dumps([m for m in ('triton', 'scipy') if m in sys.modules]))")
    results = [json.loads(run(code, TRITON_INTERPRET="0")) for _ in range(3)]
    assert set(results[0][1]) <= set(json.loads(alone))
    assert min(seconds for seconds, _ in results) < 0.3


def test_the_extension_was_built_against_another_torch(native):
    assert native.torch_version == torch.__version__, "reinstall rewardfuse: torch has changed since it was built"
