r"""TRL's fused LM head on :func:`rewardfuse.token_logprobs_from_hidden`: log-probs and entropy without logits.

TRL's policy trainers call ``add_fused_lm_head(model, …)`` once a model. The function made here takes its place while a
trainer is built. It is TRL's own source with three statements replaced, not a copy of it: one that runs at set-up, the
choice of positions (always those with a label, where TRL computes all of them on a CPU), and the call of the kernel.
So signature, PEFT, FSDP2, devices, ``cast_lm_head_to_fp32``, ``shift_labels``, loss and aux loss stay TRL's, and a
TRL in which one of the three reads otherwise raises HookChangedError at import. Replacing the kernel's name in TRL's
module instead would reach its SFT and DPO trainers too, and notice changed arguments only in the first step.

With z = hidden states times weight (and bias), scale s, cap c and temperature τ, TRL computes
:math:`c \tanh(s z / c) / τ` and this library :math:`c' \tanh(z / c') / τ'`: the same for c' = c/s and τ' = τ/s, as
long as s is positive.

Source: TRL 1.16.0, ``trl/trainer/utils.py`` and ``trl/kernels/chunked_logprob.py``.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import add_fused_lm_head as _trl_add_fused_lm_head

from rewardfuse import token_logprobs_from_hidden
from rewardfuse.integrations._patching import with_statements

#: What ``add_fused_lm_head`` takes.
PARAMETERS = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")
OUTPUTS = ("log_probs", "entropy")  # of TRL's per-token fields, those that are computed here
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UnsupportedHeadError(Exception):
    """What :func:`rewardfuse.token_logprobs_from_hidden` cannot compute; TRL's own head does."""


class FusedHead:
    """Takes the place of TRL's kernel; made once a model, when the head is added."""

    def __init__(self, temperature: float, logit_softcap: float | None, with_entropy: bool):
        self.temperature = temperature
        self.logit_softcap = logit_softcap
        self.with_entropy = with_entropy

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        temperature: float,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> "FusedHead":
        """Raises UnsupportedHeadError with the reason."""
        further = [name for name in outputs if name not in OUTPUTS]
        if further:
            raise UnsupportedHeadError(f"outputs: expected log_probs and entropy, got {', '.join(further)} too")
        numbers = {"temperature": temperature, "logit scale": scale}
        if softcap is not None:
            numbers["final_logit_softcapping"] = softcap
        for name, value in numbers.items():
            if not 0 < value < math.inf:
                raise UnsupportedHeadError(f"{name}: expected positive and finite, got {value}")
        dtype = model.get_output_embeddings().weight.dtype
        if dtype not in _DTYPES:
            raise UnsupportedHeadError(f"head: expected a floating dtype of 16 bits or more, got {dtype}")
        if is_deepspeed_zero3_enabled():
            # Its backward reads the weight that forward was given, which ZeRO-3 has taken away by then.
            raise UnsupportedHeadError("DeepSpeed ZeRO-3 gathers the head's weight for each pass apart")
        return cls(temperature / scale, None if softcap is None else softcap / scale, "entropy" in outputs)

    def __call__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor
    ) -> tuple[Tensor | None, ...]:
        """TRL's five fields for hidden states [N, H] and the tokens [N] drawn from them; absent ones are None."""
        found = token_logprobs_from_hidden(
            hidden,
            weight.to(hidden.dtype),  # as TRL, where the model's dtypes differ
            tokens,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=self.temperature,
            logit_softcap=self.logit_softcap,
            return_entropy=self.with_entropy,
        )
        logprobs, entropy = found if self.with_entropy else (found, None)
        return logprobs, entropy, None, None, None


_SCALE = "logit_scale = 1.0 if logit_scale is None else logit_scale"
_COMPACT = "compact = _use_triton(hidden_states.device)"
_KERNEL = (
    "per_token = _ChunkedLogProbFunction.apply("
    "hidden_states[mask] if compact else hidden_states.reshape(-1, hidden_states.size(-1)), weight, bias, "
    "labels[mask] if compact else labels.clamp(min=0).reshape(-1), temperature, _CHUNKED_LOGPROB_CHUNK_SIZE, "
    "final_logit_softcapping, logit_scale, outputs)"
)
STATEMENTS = {
    _SCALE: f"{_SCALE}\n"
    f"from {__name__} import FusedHead\n"
    "fused_head = FusedHead.of(model, temperature, final_logit_softcapping, logit_scale, outputs)",
    _COMPACT: "compact = True",
    _KERNEL: "per_token = fused_head(hidden_states[mask], weight, bias, labels[mask])",
}
_add_our_head = with_statements(_trl_add_fused_lm_head, STATEMENTS)


def head_adder() -> Callable[..., None]:
    """A function with the signature and the effect of TRL's ``add_fused_lm_head``, for one trainer.

    A model whose head cannot be computed here gets TRL's own, with one warning a reason.
    """
    told: set[str] = set()

    def add_fused_lm_head(
        model: PreTrainedModel,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        arguments: dict[str, Any] = {
            "temperature": temperature,
            "cast_lm_head_to_fp32": cast_lm_head_to_fp32,
            "outputs": outputs,
        }
        try:
            _add_our_head(model, **arguments)  # raises before it touches the model
        except UnsupportedHeadError as error:
            if str(error) not in told:
                told.add(str(error))
                warnings.warn(
                    f"TRL's own LM head computes the log-probs of {type(model).__name__}, rewardfuse cannot: {error}",
                    stacklevel=2,
                )
            _trl_add_fused_lm_head(model, **arguments)

    return add_fused_lm_head
