"""The checks of the Python backends, worded as csrc/common/check.h words them for the native one, and what every
public function does with its arguments before a backend sees them."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rewardfuse import _backend

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
_REWARD_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGER_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def reduction_code(reduction: str) -> int:
    """The number by which kernels know a reduction."""
    try:
        return REDUCTIONS[reduction]
    except (KeyError, TypeError):
        raise ValueError(f'reduction: expected "none", "sum" or "mean", got {reduction!r}') from None


def tensor_or_number(name: str, value: object, default: float) -> tuple[Tensor | None, float]:
    """An argument that may be a tensor or a number, as kernels take it: the tensor or None, and the number."""
    if value is None:
        return None, default
    if isinstance(value, Tensor):
        return value, default
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat, Real)):
        if value != value:
            raise ValueError(f"{name}: expected a number, got nan")
        return None, float(value)
    raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")


def normalizer_or_none(value: object) -> tuple[Tensor | None, float]:
    """A normalizer as kernels take it, where the number 0 stands for none."""
    tensor, number = tensor_or_number("normalizer", value, 0.0)
    if tensor is None and value is not None and not number > 0:
        raise ValueError(f"normalizer: expected a positive number or a 0-d tensor, got {number:g}")
    return tensor, number


def check_options(mask: object, **numbers: object) -> None:
    """Raises TypeError for a mask that is no tensor and for an option that is no number."""
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    for name, value in numbers.items():
        if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, Real)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_tensors(**arguments: object) -> None:
    """Raises TypeError for an argument that is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; some, as meta, have none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def promote_under_autocast(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast one model's two outputs may differ in dtype; everywhere else that is an error of the caller."""
    if first.dtype is not second.dtype and autocasts(first.device):
        dtype = torch.promote_types(first.dtype, second.dtype)
        return first.to(dtype), second.to(dtype)
    return first, second


def check_rewards(name: str, tensor: Tensor) -> None:
    """A tensor of a dtype that rewards may have."""
    if tensor.dtype not in _REWARD_DTYPES:
        raise TypeError(f"{name}: expected a tensor of float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """A tensor on the device of another."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {tensor.device}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """A tensor of the shape and on the device of another."""
    if tensor.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {list(other.shape)}, got {list(tensor.shape)}")
    check_device(name, tensor, other_name, other)


def check_mask(mask: Tensor | None, other_name: str, other: Tensor) -> None:
    """None, or a boolean tensor of the shape and on the device of another."""
    if mask is None:
        return
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask: expected a tensor of torch.bool, got {mask.dtype}")
    check_like("mask", mask, other_name, other)


def check_per_item(name: str, tensor: Tensor | None, other_name: str, other: Tensor) -> None:
    """None, a 0-d tensor or one of exactly the rewards' shape, of any real dtype."""
    if tensor is None:
        return
    if tensor.dtype not in _REWARD_DTYPES + _INTEGER_DTYPES:
        raise TypeError(f"{name}: expected a tensor of a real dtype, got {tensor.dtype}")
    if tensor.dim() != 0 and tensor.shape != other.shape:
        raise ValueError(
            f"{name}: expected a number, a 0-d tensor or the shape of {other_name}, {list(other.shape)}, "
            f"got {list(tensor.shape)}"
        )
    check_device(name, tensor, other_name, other)


def check_constants(**tensors: Tensor | None) -> None:
    """Arguments that cannot have a gradient do not ask for one."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}: expected a tensor that requires no gradient")


def check_number(name: str, good: bool, expected: str, value: float) -> None:
    """A number in its range."""
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {value:g}")


def check_pairs(a_name: str, a: Tensor, b_name: str, b: Tensor, mask: Tensor | None, **per_item: Tensor | None) -> None:
    """Two tensors of rewards, their mask, and what comes once a pair."""
    check_rewards(a_name, a)
    check_rewards(b_name, b)
    check_like(b_name, b, a_name, a)
    if a.dtype is not b.dtype:
        raise TypeError(f"{b_name}: expected the dtype of {a_name}, {a.dtype}, got {b.dtype}")
    for name, tensor in per_item.items():
        check_per_item(name, tensor, a_name, a)
    check_mask(mask, a_name, a)


def values_are_checked(rewards: Tensor) -> bool:
    """Values are read to be checked on CPU always and elsewhere on request; never while compiling."""
    if torch.compiler.is_compiling() or rewards.device.type == "meta" or isinstance(rewards, FakeTensor):
        return False
    return rewards.device.type == "cpu" or _backend.checks_enabled()


def check_normalizer(tensor: Tensor | None, number: float, reduction: int, other_name: str, other: Tensor) -> None:
    """A 0-d tensor or a number, positive where it can be seen, and only for a mean."""
    if tensor is None and number == 0:
        return
    if reduction != REDUCTIONS["mean"]:
        raise ValueError('normalizer: expected only with reduction="mean"')
    if tensor is None:
        return
    if tensor.dim() != 0:
        raise ValueError(f"normalizer: expected a positive number or a 0-d tensor, got shape {list(tensor.shape)}")
    check_per_item("normalizer", tensor, other_name, other)
    if values_are_checked(other):
        check_normalizer_value(tensor)


def check_normalizer_value(tensor: Tensor | None) -> None:
    """Raises for a normalizer that is not positive. Waits for the device."""
    if tensor is not None and not tensor.item() > 0:
        raise ValueError(f"normalizer: expected a positive number or a 0-d tensor, got {tensor.item():g}")


def check_values(name: str, values: Tensor | None, good: Tensor, counted: Tensor, expected: str) -> None:
    """Raises for the first counted item where `good` is false. Waits for the device."""
    if values is None:
        return
    bad = (~good.expand(counted.shape) & counted).flatten()
    if bad.any():
        index = int(bad.nonzero()[0])
        value = values.expand(counted.shape).flatten()[index].item()
        raise ValueError(f"{name}: expected {expected}, got {value:g} at index {index}")


def counted_items(rewards: Tensor, mask: Tensor | None, weight: Tensor | None, weight_value: float) -> Tensor:
    """Boolean [*]: the mask is true and the weight is not 0."""
    counted = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    return counted & (weight != 0 if weight is not None else weight_value != 0)
