"""Draws of the KL ops' arguments, and how exact their outputs have to be."""

import math
import random

import torch

import rewardfuse
from kl_oracles import OPEN
from pairs import to_device

OUTPUTS = ("rewards", "kl", "sequence_kl", "sequence_reward")  # of kl_penalized_rewards, but for its statistics
ESTIMATORS = ("k1", "k2", "k3", "abs")
GRADIENT_ESTIMATORS = (None, *ESTIMATORS)
# Largest error of a value against float64 on the same inputs, relative to max(1, |value|), but for what the rounding of
# x itself does (rounding()); a gradient is rounded once more, to the storage type.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
SPREADS = {"near": 1e-3, "normal": 1.0, "wide": 30.0, "far": 5e3}
# As the public functions take them, and as pairs for the oracle.
CLAMPS = {
    "none": (None, OPEN),
    "number": (1.5, (-1.5, 1.5)),
    "pair": ((-0.25, 2.0), (-0.25, 2.0)),
    "open below": ((None, 0.75), (-math.inf, 0.75)),
    "open above": ((0.5, None), (0.5, math.inf)),
}


def chooser(seed):
    """How to choose from a list, by one number drawn. Hypothesis's own draws of many options repeat each other so much
    that three of them hardly meet."""
    torch.manual_seed(seed)
    return random.Random(seed).choice


def dtype_of(pick, backend):
    """A storage type; interpreted Triton truncates to bfloat16 where hardware rounds."""
    dtype = pick([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    return torch.float32 if backend.interpreted and dtype is torch.bfloat16 else dtype


def draw_logprobs(pick, shape, dtype):
    """Log-probs of policy and reference, from nearly equal to thousands of nats apart."""
    spread = SPREADS[pick([*SPREADS])]
    ref = -5 * torch.rand(shape, dtype=torch.float64)
    return (ref + spread * torch.randn(shape, dtype=torch.float64)).to(dtype), ref.to(dtype)


def draw_estimators(pick):
    """Options as the public functions take them, and as the oracle does."""
    clamps = {name: CLAMPS[pick([*CLAMPS])] for name in ("input_clamp", "output_clamp")}
    options = {
        "estimator": pick(ESTIMATORS),
        "gradient_estimator": pick(GRADIENT_ESTIMATORS),
    }
    public, exact = ({name: clamp[i] for name, clamp in clamps.items()} for i in range(2))
    return options | public, options | exact


def rounding(logprobs, ref_logprobs, mask, dtype):
    """What the rounding of x = logprobs - ref_logprobs adds to a relative error: e^-x has that of x times |x|, and no
    exponent is larger than 80."""
    x = (logprobs.double() - ref_logprobs.double()).nan_to_num(0.0)
    x = x if mask is None else x[mask]
    accumulated = torch.float64 if dtype is torch.float64 else torch.float32
    return 2 * torch.finfo(accumulated).eps * min(80.0, x.abs().max().item() if x.numel() else 0.0)


def stored(values, dtype):
    """Numbers as a tensor of ``dtype`` holds them."""
    return torch.tensor(values, dtype=torch.float64).to(dtype).double()


def within(values, dtype):
    """Exact numbers, but for those too large for ``dtype``: they are infinite in it."""
    values = torch.tensor(values, dtype=torch.float64)
    return torch.where(values.to(dtype).isinf(), values.to(dtype).double(), values)


def poisoned(pick, tensor, mask):
    """A tensor with NaN or an infinity wherever the mask is False."""
    if mask is None:
        return tensor
    return torch.where(mask, tensor, pick([torch.nan, torch.inf, -torch.inf]))


def rows(tensor, dtype=torch.float64):
    """A tensor [*, T] as the oracle takes it: a list of rows."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu()
    return tensor.to(dtype).reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]).tolist()


def per_row(tensor, dtype=torch.float64):
    """A tensor [*] as the oracle takes it: one value a row."""
    return None if tensor is None else tensor.detach().cpu().to(dtype).flatten().tolist()


def rewards_of(backend, x, mask=None, *, kl_coef=0.5, **options):
    """The result for log-probs ``x`` above a reference of 0, arguments from nested lists."""
    logprobs = torch.as_tensor(x, dtype=torch.float32).to(backend.device)
    mask = None if mask is None else torch.as_tensor(mask, dtype=torch.bool, device=backend.device)
    for name in ("scores", "ended"):
        if name in options and not isinstance(options[name], torch.Tensor):
            options[name] = torch.tensor(options[name])
    return rewardfuse.kl_penalized_rewards(
        logprobs, torch.zeros_like(logprobs), mask, kl_coef=kl_coef, **to_device(options, backend.device)
    )
