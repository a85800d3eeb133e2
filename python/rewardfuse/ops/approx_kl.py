"""Estimators of the KL divergence from the log-probs of sampled tokens."""

from __future__ import annotations

from torch import Tensor

from rewardfuse import _backend
from rewardfuse.ops import _checks
from rewardfuse.ops._kl_options import Estimator, promoted


def approx_kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = "k1",
    gradient_estimator: str | None = None,
    input_clamp: float | tuple[float | None, float | None] | None = None,
    output_clamp: float | tuple[float | None, float | None] | None = None,
    importance_weight: Tensor | float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""KL of the policy from the reference, estimated at each sampled token, in one pass each way.

    With :math:`x = \log π(a) - \log π_{ref}(a)` of a token :math:`a` drawn from :math:`π`:

    .. math:: k_1 = x \qquad k_2 = x^2/2 \qquad k_3 = e^{-x} - 1 + x \qquad |x|

    k1 and k3 are unbiased for KL(π‖π_ref), and k3 is never negative. As losses they differ: the expected gradient of k1
    is 0, that of k2 is the gradient of KL(π‖π_ref), that of k3 is the gradient of KL(π_ref‖π).

    Args:
        logprobs: log π of the sampled tokens in nats, any shape; float16, bfloat16, float32 or float64.
        ref_logprobs: log π_ref of the same tokens, same shape; a constant. Where dtypes differ, the wider one rules.
        estimator: ``"k1"``, ``"k2"``, ``"k3"`` or ``"abs"``: the value.
        gradient_estimator: whose gradient to take with that value (straight-through). None: that of the value itself,
            exactly 0 where a clamp holds x or the value (ends included in the inside, as ``torch.clamp``). Given: that
            of this estimator at the unclamped x, whatever the clamps do to the value, even if it is ``estimator``.
        input_clamp: x is clamped to ±c, or to a pair (low, high) in which None is open.
        output_clamp: likewise the value, after the importance weight. On k3, ±10 makes the gradient exactly 0 beyond
            x ≈ −2.6 and x ≈ 11.
        importance_weight: :math:`w`, a number, a 0-d tensor or one a token, times the value; may want a gradient. A 0
            multiplies like any other number: what is to be left out belongs in the mask.
        mask: boolean, the shape of ``logprobs``; where False the value and its gradients are 0, whatever stands there.

    Returns:
        The shape of ``logprobs``, in nats, float32 (float64 for float64 log-probs).

    k3 saturates at 80 nats: for x < −80 it is e^80 − 81 with gradient 0. k1, k2, abs are finite as long as x (x²) is.
    Against float64 k3 and its gradient are right to 4 units in the last place down to the smallest x (a series takes
    over near 0, where e^{−x} − 1 + x would cancel). Backward saves the arguments, nothing else; a second derivative
    raises NotImplementedError.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that it cannot have.
        ValueError: a shape, device, option or range is wrong.

    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

    >>> import torch, rewardfuse
    >>> rewardfuse.approx_kl(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), estimator="k3")
    tensor([0.1065, 0.7183])
    """
    _checks.check_tensors(logprobs=logprobs, ref_logprobs=ref_logprobs)
    _checks.check_options(mask)
    options = Estimator.of(estimator, gradient_estimator, input_clamp, output_clamp)
    weight, weight_value = _checks.tensor_or_number("importance_weight", importance_weight, 1.0)
    logprobs, ref_logprobs = promoted(logprobs, ref_logprobs)
    namespace = _backend.namespace_for(logprobs)
    if not _backend.is_native(namespace):
        _checks.check_pairs("logprobs", logprobs, "ref_logprobs", ref_logprobs, mask=mask, importance_weight=weight)
    return namespace.approx_kl(logprobs, ref_logprobs, weight, mask, weight_value, *options)
