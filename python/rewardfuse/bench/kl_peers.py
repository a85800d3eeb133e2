"""Other libraries' ways to what the cases of ``rewardfuse bench kl_rewards`` compute; each takes part if installed.

A builder imports its library and returns a function of the case's tensors, whose results come in the order of
kl_lines.py; a peer may leave out the last ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rewardfuse.bench.kl_lines import KL_COEF, from_hidden, k3_rewards

Function = Callable[..., tuple[Tensor, ...]]
TRL_TWICE, TRL_CHUNKED = "TRL selective_log_softmax twice", "TRL ChunkedLogProbFunction twice"
TRL_DIVERGENCE, LIGER = "TRL ChunkedDivergenceFunction", "Liger fused_linear_kl_div"
TORCH_LINEAR = "torch linear_cross_entropy twice"


def trl_logits() -> Function:
    """TRL's log-prob of each model (Triton on a GPU), and torch for the rest."""
    from trl.trainer.utils import selective_log_softmax

    def call(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return k3_rewards(selective_log_softmax(logits, tokens), selective_log_softmax(ref_logits, tokens))

    return call


def trl_whole_logits() -> Function:
    """The same from hidden states, by whole logits."""
    return from_hidden(trl_logits())


def trl_chunked() -> Function:
    """TRL's log-prob from hidden states, without whole logits."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
        return ChunkedLogProbFunction.apply(_rows(hidden), weight, None, tokens.reshape(-1), *options)[0]

    return _of_each(logprobs)


def torch_linear() -> Function:
    """torch's own loss of a linear layer, in chunks of rows."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions()

    def logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        given = (_rows(hidden), weight, tokens.reshape(-1))
        return -linear_cross_entropy(*given, reduction="none", options=options)

    return _of_each(logprobs)


def trl_divergence(beta: float) -> Callable[[], Function]:
    """TRL's exact KL from hidden states: 1 is KL(π‖π_ref), 0 is KL(π_ref‖π). It gives no log-probs."""

    def build() -> Function:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def call(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, tokens: Tensor) -> Any:
            heads = (_rows(hidden), weight, None, _rows(ref_hidden), ref_weight, None)
            kl = ChunkedDivergenceFunction.apply(*heads, beta)[0].reshape(tokens.shape)
            return kl, -KL_COEF * kl.detach()

        return call

    return build


def liger() -> Function:
    """Liger's mean KL(target‖π). It takes the reference's probabilities, whole, and computes gradients in forward."""
    from liger_kernel.transformers.functional import liger_fused_linear_kl_div

    def call(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, tokens: Tensor) -> Any:
        target = torch.mm(_rows(ref_hidden), ref_weight.t()).softmax(-1)
        return (liger_fused_linear_kl_div(_rows(hidden), weight, target),)

    return call


def _of_each(logprobs: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    def call(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, tokens: Tensor) -> Any:
        with torch.no_grad():
            ref_logprobs = logprobs(ref_hidden, ref_weight, tokens)
        both = logprobs(hidden, weight, tokens), ref_logprobs
        return k3_rewards(*(found.reshape(tokens.shape) for found in both))

    return call


def _rows(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def installed(builders: Mapping[str, Callable[[], Function]]) -> tuple[dict[str, Function], dict[str, str]]:
    """(peers that can take part, why the others cannot)"""
    peers, missing = {}, {}
    for name, build in builders.items():
        try:
            peers[name] = build()
        except ImportError as error:
            missing[name] = str(error)
    return peers, missing
