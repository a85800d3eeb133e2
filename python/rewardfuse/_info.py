"""``rewardfuse info``: what this installation holds, which backend serves what, and why one is missing."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

import rewardfuse
from rewardfuse import _backend

OPTIONAL_PACKAGES = ("transformers", "accelerate", "datasets", "trl", "triton")
SWITCHES = ("REWARDFUSE_BACKEND", "TRITON_INTERPRET")
DEVICE_TYPES = ("cpu", "cuda")
GET_NATIVE = "pip install --no-build-isolation rewardfuse"
GET_CUDA = "REWARDFUSE_CUDA=ON pip install --no-build-isolation --force-reinstall --no-deps rewardfuse"


def main(args: argparse.Namespace) -> int:
    """Print the facts, as JSON with ``args.json``; returns 0."""
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything that ``rewardfuse info`` prints. Imports no optional package."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    backends = {
        name: {device_type: _missing(name, device_type, gpus) for device_type in DEVICE_TYPES}
        for name in _backend.BACKENDS
    }
    return {
        "rewardfuse": rewardfuse.__version__,
        "python": platform.python_version(),
        "torch": {"version": torch.__version__, **_torch_match()},
        "build": _build_reasons(),
        "instruction_set": None if _backend._C is None else _backend._C.instruction_set(),
        "gpus": gpus,
        "missing": backends,
        "chosen": {device_type: _chosen(device_type, gpus) for device_type in DEVICE_TYPES},
        "environment": {name: os.environ.get(name) for name in SWITCHES},
        "packages": {name: _version(name) for name in OPTIONAL_PACKAGES},
        "hints": _hints(backends, gpus),
    }


def _missing(name: str, device_type: str, gpus: list[str]) -> str | None:
    """Why a backend serves no tensor of a device type here; None where it does."""
    reason = _backend.missing(name, device_type)
    if reason is None and device_type == "cuda" and not gpus:
        return "torch sees no GPU here"
    return reason


def _torch_match() -> dict[str, Any]:
    built = None if _backend._C is None else _backend._C.torch_version
    return {"built_against": built, "matches": None if built is None else built == torch.__version__}


def _build_reasons() -> dict[str, str]:
    try:
        from rewardfuse import _build
    except ImportError:
        return {"native": "rewardfuse was not installed, only imported", "cuda": "not built"}
    return {"native": _build.NATIVE_REASON, "cuda": _build.CUDA_REASON}


def _chosen(device_type: str, gpus: list[str]) -> dict[str, str | None]:
    if device_type == "cuda" and not gpus:
        return {"backend": None, "reason": "torch sees no GPU here"}
    try:
        return {"backend": _backend.backend(device_type), "reason": None}
    except (RuntimeError, ValueError) as error:  # a wish in the environment that is unknown or cannot be met
        return {"backend": None, "reason": str(error)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hints(backends: dict[str, dict[str, str | None]], gpus: list[str]) -> list[str]:
    if _backend._C is None:
        return [f"for the native backend, with torch and a C++ compiler installed: {GET_NATIVE}"]
    hints = []
    if _backend._C.torch_version != torch.__version__:
        hints.append(f"the extension was built against another torch; build it again: {GET_NATIVE} --force-reinstall")
    if gpus and backends["native"]["cuda"] is not None:
        hints.append(f"for the native backend on GPU, with a CUDA build of torch and nvcc installed: {GET_CUDA}")
    return hints


def render(facts: dict[str, Any]) -> str:
    """The facts as aligned text."""
    lines = [f"rewardfuse {facts['rewardfuse']}", ""]
    rows = [
        ("python", facts["python"]),
        ("torch", _torch_text(facts["torch"])),
        ("native build", facts["build"]["native"]),
        ("CUDA kernels", facts["build"]["cuda"]),
        ("GPUs", ", ".join(facts["gpus"]) or "none"),
    ]
    lines += [*_aligned(rows), "", "backends"]
    for name, devices in facts["missing"].items():
        for device_type, reason in devices.items():
            served = "serves " if reason is None else "missing"
            detail = f": {reason}" if reason is not None else ""
            if reason is None and name == "native" and device_type == "cpu":
                detail = f" ({facts['instruction_set']})"
            lines.append(f"  {name:<10} {device_type:<5} {served}{detail}".rstrip())
    lines += ["", "chosen now"]
    lines += _aligned([(kind, c["backend"] or f"none: {c['reason']}") for kind, c in facts["chosen"].items()])
    lines += ["", "environment"]
    lines += _aligned([(name, "not set" if value is None else value) for name, value in facts["environment"].items()])
    lines += ["", "optional packages"]
    lines += _aligned([(name, version or "not installed") for name, version in facts["packages"].items()])
    if facts["hints"]:
        lines += ["", *facts["hints"]]
    return "\n".join(lines)


def _torch_text(torch_facts: dict[str, Any]) -> str:
    built = torch_facts["built_against"]
    if built is None:
        return torch_facts["version"]
    match = "the one that the extension was built against" if torch_facts["matches"] else f"extension built for {built}"
    return f"{torch_facts['version']}, {match}"


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]
