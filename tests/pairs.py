"""Both ops on pairs behind one face, so that the contract is tested once for both."""

import torch
from hypothesis import strategies as st

import oracles
import rewardfuse

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Largest error of a value or gradient against float64 on the same inputs, relative to max(1, |value|).
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
# A gradient is rounded once more, to the storage type.
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


class BradleyTerry:
    name, names = "bradley_terry", ("chosen", "rejected", "margin")
    function = staticmethod(rewardfuse.bradley_terry_loss)

    @staticmethod
    def draw(draw, shape, dtype):
        """Arguments beyond the two rewards: tensors by name, options by name."""
        tensors = {
            "margin": draw(st.sampled_from([None, 0.5, torch.rand(()), torch.rand(shape), torch.rand(shape).double()])),
            "target": draw(st.sampled_from([None, 0.25, torch.rand(shape), torch.randint(0, 2, shape)])),
            "weight": draw(st.sampled_from([None, 2.0, torch.rand(shape).half(), torch.randint(0, 3, shape)])),
            "mask": draw(st.sampled_from([None, torch.rand(shape) > 0.4])),
        }
        options = {
            "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5])),
            "beta": draw(st.sampled_from([1.0, 0.1, 3.0])),
            "center_rewards_coefficient": draw(st.sampled_from([0.0, 0.01])),
        }
        return tensors, options

    @staticmethod
    def oracle(a, b, tensors, options):
        return oracles.bradley_terry(a, b, **tensors, **options)

    @staticmethod
    def plain(shape):
        return {}


class Tie:
    def __init__(self, model):
        self.model = model
        self.name, self.names = model, ("first", "second", "log_tie")

    def function(self, a, b, outcome=1.0, log_tie=0.5, **arguments):
        return rewardfuse.bradley_terry_tie_loss(a, b, outcome, log_tie=log_tie, model=self.model, **arguments)

    def draw(self, draw, shape, dtype):
        low = 0.0 if self.model == "rao_kupper" else -2.0
        tensors = {
            "outcome": draw(st.sampled_from([1, 0.5, torch.randint(0, 3, shape) / 2, torch.randint(0, 2, shape)])),
            "log_tie": draw(st.sampled_from([0.5, 20.0, low + 3 * torch.rand(()), low + 3 * torch.rand(shape)])),
            "weight": draw(st.sampled_from([None, 2.0, torch.rand(shape).half(), torch.randint(0, 3, shape)])),
            "mask": draw(st.sampled_from([None, torch.rand(shape) > 0.4])),
        }
        return tensors, {}

    def oracle(self, a, b, tensors, options):
        return oracles.bradley_terry_tie(a, b, model=self.model, **tensors, **options)

    @staticmethod
    def plain(shape):
        return {"outcome": torch.randint(0, 3, shape) / 2, "log_tie": torch.tensor(0.5)}


OPS = (BradleyTerry(), Tie("rao_kupper"), Tie("davidson"))


def to_device(arguments, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def strided(tensor, layout):
    """The same values in another memory layout."""
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every second":
        return torch.stack([tensor, torch.ones_like(tensor)], -1)[..., 0]
    if layout == "three strides" and tensor.dim() == 3:
        return tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return tensor


def assert_close(actual, expected, tolerance, what):
    actual = torch.as_tensor(actual).detach().double().cpu().flatten()
    expected = torch.as_tensor(expected, dtype=torch.float64).flatten()
    both_infinite = (actual == expected) & actual.isinf()
    error = (actual - expected).abs() / expected.abs().clamp(min=1)
    error = torch.where(both_infinite | (actual.isnan() & expected.isnan()), 0.0, error)
    worst = error.nan_to_num(nan=torch.inf).max().item() if error.numel() else 0.0
    assert worst <= tolerance, f"{what}: error {worst:.3g} > {tolerance:.3g} at {int(error.argmax())}"
