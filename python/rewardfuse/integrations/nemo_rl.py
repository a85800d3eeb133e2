"""NeMo-RL's reward-model loss and KL on the fused ops, under NeMo-RL's names.

Either give ``rm_train`` this loss, or let :func:`install` put it in NeMo-RL's place::

    from rewardfuse.integrations.nemo_rl import PreferenceLossFn

    loss_fn = PreferenceLossFn()  # was: from nemo_rl.algorithms.loss import PreferenceLossFn

The loss travels to NeMo-RL's workers as an object of this module, which their environments must have.

Written from the source of NeMo-RL's main branch (August 2026), which is not on PyPI: held to its formulas, not to its
code, and never run inside it.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rewardfuse import approx_kl, bradley_terry_loss, presets
from rewardfuse.integrations._patching import Patches, check_alike
from rewardfuse.ops import _checks

__all__ = ["LossInputType", "LossType", "PreferenceLossFn", "calculate_kl", "install", "uninstall"]

try:
    # The trainer compares with these very enums.
    from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("nemo_rl"):
        raise

    class LossType(enum.Enum):
        """NeMo-RL's, where it is not installed."""

        TOKEN_LEVEL = "token_level"
        SEQUENCE_LEVEL = "sequence_level"

    class LossInputType(enum.Enum):
        """As much of NeMo-RL's as is needed here, where it is not installed."""

        LOGIT = "logit"
        LOGPROB = "logprob"


class PreferenceLossFn:
    r"""Bradley–Terry on interleaved pairs, over the number of valid pairs of the whole step.

    .. math:: \frac{\sum_i -w_i \log σ(β (c_i - r_i))}{N/2 + 10^{-8}}

    where N is the number of valid sequences in all micro-batches and processes; β is 1 for a reward model.

    Call with

    - ``logits``: rewards of 2B rows, chosen, rejected, chosen, …; ``[2B]`` or ``[2B, 1]``, of any floating dtype;
    - ``data``: a mapping with ``sample_mask`` ``[2B]`` (w, 0: left out; the chosen response's holds for the pair, and
      the rejected one's for ``rewards_rejected_mean``). If it also has ``pair_index`` (int) and ``is_chosen``,
      ``[2B]``, rows may stand in any order;
    - ``global_valid_seqs``: N, a number or a 0-d tensor; ``global_valid_toks``: not used.

    Returns:
        The loss, a 0-d tensor, float32 (float64 for float64 rewards), and NeMo-RL's metrics, floats, as its workers
        need them: ``loss``; ``accuracy`` (chosen > rejected, strictly), ``rewards_chosen_mean`` and
        ``rewards_rejected_mean``, sums over this batch over N/2 + 1e-8, so that they add up over micro-batches; and
        ``num_valid_samples``, half the sum of ``sample_mask``. All five are read from the device at once.

    Deviations from NeMo-RL: pairs of mask 0 are selected away, so a NaN there reaches neither loss, gradient nor
    metric; 16-bit rewards are taken in float32, where NeMo-RL's log-sigmoid is rounded to 16 bits; one wait for the
    device instead of five.

    Raises:
        ValueError, TypeError: an odd number of rows; arguments of another kind or shape; (checked where values are) a
            negative ``sample_mask`` or ``global_valid_seqs``, a ``pair_index`` without just one chosen and one rejected
            row.

    Source: Bradley and Terry 1952; NeMo-RL, ``algorithms/loss/loss_functions.py``.

    >>> loss, metrics = PreferenceLossFn()(torch.tensor([2.0, 1.0]), {"sample_mask": torch.ones(2)}, 2, None)
    >>> round(loss.item(), 4), round(metrics["accuracy"], 4)
    (0.3133, 1.0)
    """

    loss_type = LossType.SEQUENCE_LEVEL
    input_type = LossInputType.LOGIT

    def __call__(
        self,
        logits: Tensor,  # [2B] or [2B, 1]
        data: Mapping[str, Any],
        global_valid_seqs: Tensor | float,
        global_valid_toks: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, float]]:
        mask = data.get("sample_mask")
        _checks.check_tensors(logits=logits, sample_mask=mask)
        rewards = logits.squeeze(-1)
        means = self._preference_loss(rewards, mask, global_valid_seqs, data=data)
        names = ("loss", "accuracy", "rewards_chosen_mean", "rewards_rejected_mean", "num_valid_samples")
        values = torch.stack([value.detach().double() for value in (*means, mask.sum() / 2)]).tolist()
        return means[0], dict(zip(names, values, strict=True))

    def split_output_tensor(self, tensor: Tensor, data: Mapping[str, Any] | None = None) -> tuple[Tensor, Tensor]:
        """The rows of chosen and of rejected responses, in one order: [::2] and [1::2], or as ``data`` says."""
        if len(tensor) % 2:
            raise ValueError(f"logits: expected an even number of rows, chosen and rejected in turn, got {len(tensor)}")
        if data is not None and "pair_index" in data and "is_chosen" in data:
            tensor = tensor[_interleaving(data["pair_index"], data["is_chosen"], tensor)]
        return tensor[::2], tensor[1::2]

    def _preference_loss(
        self,
        rewards: Tensor,  # [2B]
        sample_mask: Tensor,  # [2B]
        global_valid_seqs: Tensor | float,
        beta: float = 1.0,
        data: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, accuracy, mean reward of chosen, of rejected responses)."""
        if rewards.dim() != 1 or sample_mask.shape != rewards.shape:
            raise ValueError(
                "logits: expected one reward a row, the shape of sample_mask, "
                f"{list(sample_mask.shape)}, got {list(rewards.shape)}"
            )
        _checks.check_rewards("logits", rewards)
        _check_weights(sample_mask, global_valid_seqs)
        chosen, rejected = self.split_output_tensor(rewards, data)
        chosen_mask, rejected_mask = self.split_output_tensor(sample_mask, data)
        pairs = global_valid_seqs / 2 + 1e-8
        total = bradley_terry_loss(chosen, rejected, weight=chosen_mask, beta=beta, reduction="sum")
        loss = (total / pairs).to(total.dtype)
        with torch.no_grad():
            accuracy = _sum(chosen > rejected, chosen_mask) / pairs
            return loss, accuracy, _sum(chosen, chosen_mask) / pairs, _sum(rejected, rejected_mask) / pairs


def calculate_kl(
    logprobs: Tensor,
    logprobs_reference: Tensor,
    kl_type: str = "k3",
    input_clamp_value: float | None = 20.0,
    output_clamp_value: float | None = 10.0,
) -> Tensor:
    r"""KL of the policy from the reference at each token.

    With :math:`x` = ``logprobs`` − ``logprobs_reference``, clamped to ±\ ``input_clamp_value``: k1 is :math:`x`, k2
    :math:`x^2/2`, k3 :math:`e^{-x} - 1 + x`, clamped to ±\ ``output_clamp_value``. The gradient is 0 where a clamp
    holds: on k3, with the default, beyond x ≈ −2.6 and x ≈ 11.

    Args:
        logprobs: log π of the sampled tokens in nats, any shape; float16, bfloat16, float32 or float64.
        logprobs_reference: log π_ref of the same tokens, same shape; a constant.
        kl_type: "k1", "k2" or "k3".
        input_clamp_value, output_clamp_value: a positive number, or None: no clamp.

    Returns:
        The shape of ``logprobs``, in nats, float32 (float64 for float64 log-probs).

    Deviations from NeMo-RL: k3 is right near x = 0, where NeMo-RL's cancels (1.7e-8 at x = −1e-4, where it is 5e-9);
    without clamps k3 saturates at 80 nats instead of reaching inf; ``logprobs_reference`` gets no gradient.

    Raises:
        ValueError, TypeError: an unknown type, a clamp that is not positive, tensors that do not fit.

    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

    >>> calculate_kl(torch.tensor([-1.0, -9.0]), torch.tensor([-1.5, -1.0]))
    tensor([ 0.1065, 10.0000])
    """
    check_alike(logprobs=logprobs, logprobs_reference=logprobs_reference)
    return approx_kl(logprobs, logprobs_reference, **presets.nemo_rl(kl_type, input_clamp_value, output_clamp_value).kl)


def _check_weights(sample_mask: Tensor, global_valid_seqs: Tensor | float) -> None:
    """Raises by name for a count that is none, and, where values are checked, for negative weights."""
    if not isinstance(global_valid_seqs, Real | Tensor):
        raise TypeError(f"global_valid_seqs: expected a number or a tensor, got {type(global_valid_seqs).__name__}")
    if isinstance(global_valid_seqs, Tensor) and global_valid_seqs.dim():
        raise ValueError(f"global_valid_seqs: expected a number or a 0-d tensor, got {list(global_valid_seqs.shape)}")
    if not _checks.values_are_checked(sample_mask):
        return
    if (sample_mask < 0).any():
        raise ValueError(f"sample_mask: expected no negative weight, got {sample_mask.min().item():g}")
    if global_valid_seqs < 0:
        raise ValueError(f"global_valid_seqs: expected at least 0, got {float(global_valid_seqs):g}")


def _interleaving(pair_index: Tensor, is_chosen: Tensor, rows: Tensor) -> Tensor:
    """The order of rows in which each pair's chosen one stands first, its rejected one behind it, int64 ``[2B]``."""
    _checks.check_tensors(pair_index=pair_index, is_chosen=is_chosen)
    pair_index, is_chosen = pair_index.to(rows.device).long(), is_chosen.to(rows.device).bool()
    for name, tensor in (("pair_index", pair_index), ("is_chosen", is_chosen)):
        if tensor.shape != rows.shape[:1]:
            raise ValueError(f"{name}: expected one a row, {list(rows.shape[:1])}, got {list(tensor.shape)}")
    order = (2 * pair_index + (~is_chosen).long()).argsort(stable=True)
    if _checks.values_are_checked(rows):
        chosen, rejected = pair_index[order].view(-1, 2).unbind(1)
        right = is_chosen[order].view(-1, 2)
        if not (torch.equal(chosen, rejected) and right[:, 0].all() and not right[:, 1].any()):
            raise ValueError("pair_index: expected just one chosen and one rejected row for each")
    return order


def _sum(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted, in float64; what has weight 0 is not looked at."""
    return torch.where(weight != 0, values.double(), 0.0).mul(weight).sum()


_LOSS, _UTILS = "nemo_rl.algorithms.loss.loss_functions", "nemo_rl.algorithms.utils"
_CALL = ("self", "logits", "data", "global_valid_seqs", "global_valid_toks")
_KL = ("logprobs", "logprobs_reference", "kl_type", "input_clamp_value", "output_clamp_value")

_patches = Patches()


def install() -> None:
    """Put :class:`PreferenceLossFn` and :func:`calculate_kl` in the place of NeMo-RL's, wherever its modules have them.

    Losses that inherit from NeMo-RL's class (DPO) stay as they are. The loss reaches the workers with the object that
    is sent to them; ``calculate_kl`` is replaced in this process alone. Calling it again does no harm.

    Raises:
        ImportError: NeMo-RL is not installed.
        HookChangedError: this NeMo-RL lacks one of them, or it takes other arguments. Nothing is replaced then.
    """
    loss, utils = importlib.import_module(_LOSS), importlib.import_module(_UTILS)
    try:
        _patches.take_over(loss, "PreferenceLossFn", PreferenceLossFn, _CALL)
        _patches.take_over(utils, "calculate_kl", calculate_kl, _KL)
    except Exception:
        uninstall()
        raise


def uninstall() -> None:
    """Put everything back, also in modules of NeMo-RL that were imported since :func:`install`."""
    _patches.undo()
