"""All pairs of a list: Bradley–Terry on every two responses whose labels differ."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardfuse import _backend
from rewardfuse.ops import _checks, _lists


def all_pairs_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    margin: Tensor | float | None = None,
    weight: Tensor | float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Mean Bradley–Terry loss over the pairs of each list whose labels differ, in one pass each way.

    With :math:`P` the pairs (i, j) of a list with :math:`y_i > y_j`:

    .. math:: ℓ = \frac{w}{|P|} \sum_{(i,j) \in P} -\log σ(s_i - s_j - m\,(y_i - y_j))

    Args:
        scores: one score a response, ``[*, K]``; float16, bfloat16, float32 or float64.
        labels: :math:`y`, ``[*, K]``, any real dtype, compared as float64; higher is better, equal labels form no pair.
        lengths: integer ``[*]``; only the first so many items of a list are there.
        mask: boolean ``[*, K]``; only items where it is True are there.
        margin: :math:`m`, a number or a 0-d tensor, by how much the scores should differ for each unit of label.
        weight: :math:`w`, a number, a 0-d tensor or one per list, ``[*]``. The scores of a list of weight 0 are not
            read.
        reduction: ``"mean"`` divides the sum by the number of lists that have a pair (weight 0 included), or by
            ``normalizer``; ``"sum"``; ``"none"`` returns ``[*]``. An empty mean is 0.
        normalizer: a positive number or 0-d tensor, only with ``"mean"``.

    Returns:
        The loss in nats, float32 (float64 for float64 scores).

    Gradients flow to ``scores`` alone; a second derivative raises NotImplementedError. Memory is O(K) a list: nothing
    of the size of the pairs is ever held, and time is O(K²). Against float64 the loss of a list is off by at most
    2e-6·max(1, ℓ) for float32 scores within ±1e4.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that it cannot have.
        ValueError: a shape, device, option or range is wrong, or a label is not finite. Values on a GPU are checked
            under ``rewardfuse.checks(True)``; unchecked, a bad one makes its list NaN.

    Source: Ouyang et al. 2022 (InstructGPT), equation 1; the margin as in Touvron et al. 2023 (Llama 2), equation 2.

    >>> import torch, rewardfuse
    >>> rewardfuse.all_pairs_loss(torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[2, 0, 0]]))
    tensor(0.3937)
    """
    _checks.check_tensors(scores=scores, labels=labels, **({} if lengths is None else {"lengths": lengths}))
    _checks.check_options(mask)
    margin, margin_value = _checks.tensor_or_number("margin", margin, 0.0)
    weight, weight_value = _checks.tensor_or_number("weight", weight, 1.0)
    normalizer, normalizer_value = _checks.normalizer_or_none(normalizer)
    arguments = (
        scores,
        labels,
        lengths,
        mask,
        margin,
        weight,
        normalizer,
        margin_value,
        weight_value,
        normalizer_value,
        _checks.reduction_code(reduction),
    )
    namespace = _backend.namespace_for(scores)
    if not _backend.is_native(namespace):
        _check(*arguments)
    elif _backend.checks_enabled() and not torch.compiler.is_compiling():
        _check_values(scores, labels, lengths, mask, weight, weight_value)
        _checks.check_normalizer_value(normalizer)
    return namespace.all_pairs_loss(*arguments)


class AllPairsLoss(torch.nn.Module):
    """:func:`all_pairs_loss` as a module; the options are given once, the tensors at each call.

    >>> import torch, rewardfuse
    >>> criterion = rewardfuse.AllPairsLoss(margin=0.5)
    >>> criterion(torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 0]]))
    tensor(0.4741)
    """

    def __init__(self, *, margin: float | None = None, reduction: str = "mean") -> None:
        super().__init__()
        _checks.tensor_or_number("margin", margin, 0.0)
        _checks.reduction_code(reduction)
        self.options = {"margin": margin, "reduction": reduction}

    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | float | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of a batch; arguments as in :func:`all_pairs_loss`."""
        tensors = {"lengths": lengths, "mask": mask, "weight": weight, "normalizer": normalizer}
        return all_pairs_loss(scores, labels, **tensors, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check(
    scores: Tensor,
    labels: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    margin: Tensor | None,
    weight: Tensor | None,
    normalizer: Tensor | None,
    margin_value: float,
    weight_value: float,
    normalizer_value: float,
    reduction: int,
) -> None:
    """What csrc/autograd/all_pairs.cpp checks, in its order."""
    _checks.check_constants(labels=labels, margin=margin, weight=weight, normalizer=normalizer)
    shape = _lists.list_shape(scores, None)
    _lists.check_items(scores, shape, lengths, mask)
    _checks.check_like("labels", labels, "scores", scores)
    _checks.check_per_item("labels", labels, "scores", scores)
    if margin is not None and margin.dim() != 0:
        raise ValueError(f"margin: expected a number or a 0-d tensor, got shape {list(margin.shape)}")
    _checks.check_per_item("margin", margin, "scores", scores)
    _lists.check_weight(weight, shape, scores)
    _checks.check_normalizer(normalizer, normalizer_value, reduction, "scores", scores)
    if _checks.values_are_checked(scores):
        _check_values(scores, labels, lengths, mask, weight, weight_value)


def _check_values(
    scores: Tensor,
    labels: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    weight_value: float,
) -> None:
    _lists.check_lengths_values(lengths, scores.shape[-1])
    valid = _lists.valid_items(scores.shape, scores.device, lengths, mask)
    counted = weight_value != 0 if weight is None else (weight != 0).unsqueeze(-1)
    _checks.check_values("labels", labels, labels.isfinite(), valid & counted, "finite numbers")
