"""The one place where a backend is chosen.

A backend is a namespace that exports the same differentiable functions with the same signatures: ``native`` (the C++
extension), ``triton`` (``rewardfuse.kernels``) and ``reference`` (plain torch).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

try:
    from rewardfuse import _C
except ImportError as error:
    _C = None
    _native_error = str(error)

BACKENDS = ("native", "triton", "reference")
#: Ops of which the native backend has no CUDA kernel: Triton alone serves them on a GPU.
WITHOUT_NATIVE_CUDA = frozenset({"token_logprobs"})

# Plain module-level values, so that Dynamo can guard on them: the wish, the choice per device, value checks.
_wish: str | None = None
_chosen: dict[tuple[torch.device, bool], Any] = {}
_checks: bool = False


def native_missing(device_type: str) -> str | None:
    """Why the native backend cannot serve a device type; None where it can."""
    if _C is None:
        try:
            from rewardfuse._build import NATIVE_REASON
        except ImportError:
            return f"rewardfuse was not installed, only imported ({_native_error})"
        return (
            f"the C++ extension failed to load: {_native_error}" if NATIVE_REASON.startswith("built") else NATIVE_REASON
        )
    if device_type == "cpu" or (device_type == "cuda" and _C.has_cuda):
        return None
    if device_type == "cuda":
        from rewardfuse._build import CUDA_REASON

        return f"CUDA kernels {CUDA_REASON}"
    return f"there are no kernels for device type {device_type!r}"


def triton_missing(device_type: str) -> str | None:
    """Why the Triton backend cannot serve a device type; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"Triton compiles for GPUs, not for device type {device_type!r} (TRITON_INTERPRET=1 interprets it on CPU)"


def missing(name: str, device_type: str, native_cuda: bool = True) -> str | None:
    """Why a backend cannot serve a device type, with an op that has native CUDA kernels or not; None where it can."""
    if name == "native" and device_type == "cuda" and not native_cuda:
        return "this op has no native CUDA kernel; Triton serves it"
    if name == "native":
        return native_missing(device_type)
    if name == "triton":
        return triton_missing(device_type)
    return None


_modules: dict[str, ModuleType] = {}


def _load(name: str) -> str:
    _modules[name] = importlib.import_module("rewardfuse.kernels" if name == "triton" else "rewardfuse.reference")
    return name


# Dynamo runs it while it traces instead of tracing it, which it cannot: what torch.compiler.assume_constant_result
# sets, without importing Dynamo here.
_load._dynamo_marked_constant = True


def _namespace(name: str) -> ModuleType:
    return _C if name == "native" else _modules[_load(name)]


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def choose(device_type: str, native_cuda: bool = True) -> str:
    """Name of the backend that serves a device type now, with an op that has native CUDA kernels or not; an explicit
    wish that cannot be met raises RuntimeError."""
    wish = _wish
    if wish is None and os.environ.get("REWARDFUSE_BACKEND"):
        wish = _checked(os.environ["REWARDFUSE_BACKEND"], "REWARDFUSE_BACKEND")
    if wish is not None:
        reason = missing(wish, device_type, native_cuda)
        if reason is not None:
            raise RuntimeError(f"backend {wish!r} was asked for but cannot serve {device_type} tensors: {reason}")
        return wish
    reason = missing("native", device_type, native_cuda)
    if reason is None:
        return "native"
    name = "triton" if device_type == "cuda" and triton_missing(device_type) is None else "reference"
    as_intended = name == "triton" and not native_cuda
    if not as_intended and not torch.compiler.is_compiling():
        warnings.warn(
            f"rewardfuse uses its {name} backend for {device_type} tensors: {reason}. See `rewardfuse info`.",
            RuntimeWarning,
            stacklevel=2,
        )
    return name


def namespace_for(tensor: torch.Tensor, op: str | None = None) -> Any:
    """The backend namespace that serves an op on a tensor's device. The first choice for a device is kept until the
    wish changes, which is also why a fallback warns once."""
    native_cuda = op not in WITHOUT_NATIVE_CUDA
    namespace = _chosen.get((tensor.device, native_cuda))
    if namespace is None:
        device_type = tensor.device.type
        # Meta tensors have no data: every backend gives the same shapes, and the reference needs no kernels.
        name = (
            "reference"
            if device_type == "meta" and _C is None
            else choose("cpu" if device_type == "meta" else device_type, native_cuda)
        )
        namespace = _namespace(name)
        _chosen[tensor.device, native_cuda] = namespace
    return torch.ops.rewardfuse if namespace is _C and torch.compiler.is_compiling() else namespace


def is_native(namespace: Any) -> bool:
    """Whether a namespace is the C++ extension, which does its own checks."""
    return namespace is _C or namespace is torch.ops.rewardfuse


def backend(device: str | torch.device = "cpu") -> str:
    """Name of the backend that would serve tensors on ``device``: ``"native"``, ``"triton"`` or ``"reference"``.

    >>> import rewardfuse
    >>> with rewardfuse.use_backend("reference"):
    ...     rewardfuse.backend("cpu")
    'reference'
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return choose(torch.device(device).type)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op inside the ``with`` block by one backend; raise RuntimeError where it cannot serve a tensor.

    Args:
        name: ``"native"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _wish
    before = _wish
    _wish = _checked(name, "backend")
    _chosen.clear()
    try:
        yield
    finally:
        _wish = before
        _chosen.clear()


class checks:
    """Turn checks of values that live on a GPU on or off; as a statement for good, or as ``with checks(True):``.

    On CPU such values (targets, outcomes, orders) are always checked. On a GPU reading them waits for the device, so by
    default a bad value turns its row into NaN instead of raising.
    """

    def __init__(self, enabled: bool) -> None:
        global _checks
        self._before = _checks
        _checks = bool(enabled)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        global _checks
        _checks = self._before


def checks_enabled() -> bool:
    """Whether values on a GPU are checked."""
    return _checks
