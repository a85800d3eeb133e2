"""Plackett–Luce: the likelihood of a ranking of any number of responses."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardfuse.ops import _checks, _lists, _rankings
from rewardfuse.ops._stages import Stages, stage_count
from rewardfuse.ops._ties import tied_loss

TIES = ("breslow", "efron")


def plackett_luce_loss(
    scores: Tensor,
    *,
    order: Tensor | None = None,
    ranks: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    top_k: Tensor | int | None = None,
    ties: str = "breslow",
    position_weight: Tensor | None = None,
    weight: Tensor | float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Negative log-likelihood of rankings under the Plackett–Luce model, in one pass each way.

    A ranking is a sequence of choices: the best of all, then the best of the rest, and so on. With the n scores of a
    list in the order of its ranking, best first, and :math:`k = \min(\text{top\_k}, n)`:

    .. math:: ℓ = w \sum_{i=1}^{k} u_i \Big[\log \sum_{j=i}^{n} e^{s_j} - s_i\Big]

    Two items are Bradley–Terry; ``top_k=1`` is cross-entropy with the best item. Tied items (``ranks``) have no order
    among them. With :math:`G` the sum of :math:`e^s` over a tied group of m items and :math:`R` the sum over the group
    and all that is ranked below it, the group adds

    - ``"breslow"``: :math:`m \log R - \sum s`,
    - ``"efron"``: :math:`\sum_{j=0}^{m-1} \log(R - \tfrac{j}{m} G) - \sum s`, closer to the sum over all orders of the
      group where groups are large beside what is left,

    times the mean of its positions' weights. It is observed, whole, if its first position is below k.

    Args:
        scores: one score a response, ``[*, N]``; float16, bfloat16, float32 or float64. Without ``order`` and
            ``ranks`` the items stand best first.
        order: integer ``[*, N]``: 0-based indices of the items, best first. Its first n entries name each valid item
            once; the rest is not read.
        ranks: ``[*, N]``, the rank of each item, 1 = best, equal = tied; gaps do not matter. Any real dtype.
        lengths: integer ``[*]``; only the first so many items of a list are there.
        mask: boolean ``[*, N]``; only items where it is True are there. What is not there is never read and has
            gradient 0.
        top_k: how many stages were observed, at least 1: one int, or an integer tensor ``[*]``. The other items were
            offered but not ranked; their order means nothing.
        ties: ``"breslow"`` or ``"efron"``.
        position_weight: :math:`u`, the weight of each stage by its position in the ranking, ``[N]`` or ``[*, N]``.
        weight: :math:`w`, a number, a 0-d tensor or one per list, ``[*]``. Scores of a list of weight 0 are not read.
        reduction: ``"mean"`` divides the sum by the number of lists that have an item (weight 0 included), or by
            ``normalizer``; ``"sum"``; ``"none"`` returns ``[*]``. An empty mean is 0.
        normalizer: a positive number or 0-d tensor, only with ``"mean"``; for a global batch over processes.

    Returns:
        The loss in nats, float32 (float64 for float64 scores).

    Gradients flow to ``scores`` alone; a second derivative raises NotImplementedError. No finite scores overflow; a NaN
    score makes its own list NaN and no other; one of −inf is never chosen, and makes the loss inf where it was ranked.
    Against float64, for float32 scores within ±1000 and lists up to 65,536, the loss of a list is off by at most
    2e-6·max(1, ℓ) and a gradient g by 1e-5·max(1, \|g\|) on the CPU; neither is off by more than four times what
    ``torch.logcumsumexp`` in float32 is on the same lists (tests/test_plackett_luce.py). Backward keeps the scores and,
    for lists of more than 512 items, two numbers for every 512 or 1,024; with ``ranks`` also an order and, where items
    tie, two weights an item (Efron: about 100 bytes an item).

    Raises:
        TypeError: an argument is no tensor, or of a dtype that it cannot have.
        ValueError: a shape, device, option or range is wrong. Values of ``lengths``, ``order``, ``ranks`` and ``top_k``
            are checked on CPU always and on a GPU under ``rewardfuse.checks(True)``; unchecked, a bad one makes its
            list NaN.

    Sources: Luce 1959; Plackett 1975, Applied Statistics 24; ties: Breslow 1974, Biometrics 30, and Efron 1977,
    J. Amer. Statist. Assoc. 72 (the same likelihood in survival analysis).

    >>> import torch, rewardfuse
    >>> scores = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]])
    >>> rewardfuse.plackett_luce_loss(scores, order=torch.tensor([[1, 2, 0], [0, 1, 2]]), lengths=torch.tensor([3, 2]))
    tensor(0.5171)
    """
    _check_options(scores, ties, order=order, ranks=ranks, lengths=lengths, mask=mask, position_weight=position_weight)
    if order is not None and ranks is not None:
        raise ValueError("order: expected without ranks, which says the same (order lists items, ranks numbers them)")
    call = Stages(scores, lengths, mask, top_k, position_weight, weight, normalizer, reduction)
    if ranks is None:
        return call.loss(order=order)
    shape = _lists.list_shape(scores, None)
    _lists.check_items(scores, shape, lengths, mask)
    _lists.check_by_position("position_weight", position_weight, scores)
    _lists.check_per_list("top_k", call.top_k, shape, scores, scalar=False)
    if _checks.values_are_checked(scores):
        _lists.check_top_k_values(call.top_k)
    valid = _lists.valid_items(scores.shape, scores.device, lengths, mask)
    _check_ranks(ranks, scores, valid)
    limit = call.top_k_value or scores.shape[-1] if call.top_k is None else call.top_k.unsqueeze(-1)
    return tied_loss(call, _rankings.sort_padded(ranks, valid), limit, ties, None)


def plackett_luce_loss_packed(
    scores: Tensor,
    cu_seqlens: Tensor,
    *,
    ranks: Tensor | None = None,
    top_k: Tensor | int | None = None,
    ties: str = "breslow",
    position_weight: Tensor | None = None,
    weight: Tensor | float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r""":func:`plackett_luce_loss` of lists laid end to end, without padding.

    Args:
        scores: the items of all lists, ``[total]``; list r is ``scores[cu_seqlens[r]:cu_seqlens[r + 1]]``, best first
            unless ``ranks`` are given.
        cu_seqlens: integer ``[lists + 1]``, from 0 to ``total``, not decreasing.
        ranks: ``[total]``, the rank of each item within its list, 1 = best, equal = tied.
        position_weight: ``[M]``, the weight of each stage by its position, for lists of at most M items.
        top_k, ties, weight, reduction, normalizer: as in :func:`plackett_luce_loss`, one per list ``[lists]`` where
            that says ``[*]``.

    Returns, gradients, errors, sources: as in :func:`plackett_luce_loss`.

    >>> import torch, rewardfuse
    >>> scores = torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0])
    >>> rewardfuse.plackett_luce_loss_packed(scores, torch.tensor([0, 3, 5]))
    tensor(0.5171)
    """
    _check_options(scores, ties, cu_seqlens=cu_seqlens, ranks=ranks, position_weight=position_weight)
    _lists.list_shape(scores, cu_seqlens)
    call = Stages(scores, None, None, top_k, position_weight, weight, normalizer, reduction)
    call.cu_seqlens = cu_seqlens.long()
    if ranks is None and position_weight is None:
        return call.loss()
    if _checks.values_are_checked(scores):
        _lists.check_bounds_values(cu_seqlens, scores.numel())
    bounds = call.cu_seqlens.clamp(0, scores.numel())
    lists = _rankings.list_of_item(bounds, scores.numel())
    if position_weight is not None:
        place = torch.arange(scores.numel(), device=scores.device) - bounds[lists]
        call.position_weight = _by_item(position_weight, place, scores)
    if ranks is None:
        return call.loss()
    if _checks.values_are_checked(scores):
        _lists.check_top_k_values(call.top_k)
    _check_ranks(ranks, scores, torch.ones_like(scores, dtype=torch.bool))
    _lists.check_per_list("top_k", call.top_k, torch.Size([cu_seqlens.numel() - 1]), scores, scalar=False)
    limit = call.top_k_value or scores.numel() if call.top_k is None else call.top_k[lists]
    return tied_loss(call, _rankings.sort_packed(ranks, bounds, lists), limit, ties, lists)


def plackett_luce_log_prob(
    scores: Tensor,
    *,
    order: Tensor | None = None,
    ranks: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    top_k: Tensor | int | None = None,
    ties: str = "breslow",
    position_weight: Tensor | None = None,
) -> Tensor:
    r"""Log-likelihood of each ranking, :math:`-ℓ` of :func:`plackett_luce_loss`; 0 for a list without items.

    Arguments, shapes, dtypes, errors and sources as there.

    Returns:
        ``[*]`` in nats, float32 (float64 for float64 scores), differentiable.

    >>> import torch, rewardfuse
    >>> rewardfuse.plackett_luce_log_prob(torch.zeros(3)).exp()  # one of six orders
    tensor(0.1667)
    """
    items = {"order": order, "ranks": ranks, "lengths": lengths, "mask": mask, "top_k": top_k, "ties": ties}
    return -plackett_luce_loss(scores, **items, position_weight=position_weight, reduction="none")


def plackett_luce_sample(
    scores: Tensor,
    n: int,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Rankings drawn from the Plackett–Luce model: items sorted by score plus independent Gumbel noise.

    Args:
        scores: ``[*, N]``; float16, bfloat16, float32 or float64.
        n: how many rankings of each list, at least 0.
        lengths, mask: which items are there, as in :func:`plackett_luce_loss`.
        generator: source of the noise; torch's own by default.

    Returns:
        ``[n, *, N]`` int64: indices of the items, best first, as ``order``; items that are not there come last. No
        gradient.

    Raises:
        TypeError, ValueError: as :func:`plackett_luce_loss`, or ``n`` is no whole number from 0.

    Source: Yellott 1977, J. Math. Psychology 15.

    >>> import torch, rewardfuse
    >>> rewardfuse.plackett_luce_sample(torch.tensor([0.0, 100.0, 50.0]), 2)
    tensor([[1, 2, 0],
            [1, 2, 0]])
    """
    items = {"lengths": lengths, "mask": mask}
    _checks.check_tensors(scores=scores, **{name: t for name, t in items.items() if t is not None})
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ValueError(f"n: expected a whole number from 0, got {n!r}")
    shape = _lists.list_shape(scores, None)
    _lists.check_items(scores, shape, lengths, mask)
    there = _lists.valid_items(scores.shape, scores.device, lengths, mask)
    if _checks.values_are_checked(scores):
        _lists.check_lengths_values(lengths, scores.shape[-1])
        _checks.check_values("scores", scores, scores == scores, there, "numbers")
    noise = torch.empty((n, *scores.shape), dtype=torch.float64, device=scores.device).exponential_(generator=generator)
    keys = torch.where(there, scores.detach().double(), 0) - noise.log()  # float64, lest large scores swallow the noise
    order = keys.argsort(dim=-1, descending=True, stable=True)
    if lengths is None and mask is None:
        return order
    there = there.expand(keys.shape).gather(-1, order)
    return order.gather(-1, (~there).to(torch.uint8).argsort(dim=-1, stable=True))


class PlackettLuceLoss(torch.nn.Module):
    """:func:`plackett_luce_loss` as a module; the options are given once, the tensors at each call.

    >>> import torch, rewardfuse
    >>> criterion = rewardfuse.PlackettLuceLoss(top_k=1)
    >>> criterion(torch.tensor([[2.0, 1.0, 0.0]]))
    tensor(0.4076)
    """

    def __init__(self, *, top_k: int | None = None, ties: str = "breslow", reduction: str = "mean") -> None:
        super().__init__()
        _check_ties(ties)
        _checks.reduction_code(reduction)
        stage_count(top_k)
        self.options = {"top_k": top_k, "ties": ties, "reduction": reduction}

    def forward(
        self,
        scores: Tensor,
        *,
        order: Tensor | None = None,
        ranks: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        top_k: Tensor | int | None = None,
        position_weight: Tensor | None = None,
        weight: Tensor | float | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of a batch; arguments as in :func:`plackett_luce_loss`. `top_k` goes before the module's own."""
        tensors = {"order": order, "ranks": ranks, "lengths": lengths, "mask": mask, "position_weight": position_weight}
        options = self.options if top_k is None else self.options | {"top_k": top_k}
        return plackett_luce_loss(scores, **tensors, weight=weight, normalizer=normalizer, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _by_item(position_weight: Tensor, place: Tensor, scores: Tensor) -> Tensor:
    """The weight of each packed item's position, ``[total]``."""
    size = position_weight.shape[0] if position_weight.dim() == 1 else None
    if size is None:
        raise ValueError(f"position_weight: expected one value a position, [M], got {list(position_weight.shape)}")
    _checks.check_device("position_weight", position_weight, "scores", scores)
    _lists.check_real("position_weight", position_weight)
    if _checks.values_are_checked(scores) and place.numel() and int(place.max()) >= size:
        raise ValueError(f"position_weight: expected a value for each of {int(place.max()) + 1} positions, got {size}")
    if size == 0:
        return torch.full(place.shape, torch.nan, device=place.device)
    weight = position_weight if position_weight.is_floating_point() else position_weight.double()
    return torch.where(place < size, weight[place.clamp(0, size - 1)], torch.nan)


def _check_options(scores: Tensor, ties: str, **tensors: Tensor | None) -> None:
    """What no backend could be asked."""
    _checks.check_tensors(scores=scores, **{name: t for name, t in tensors.items() if t is not None})
    _check_ties(ties)
    _checks.check_constants(position_weight=tensors["position_weight"], ranks=tensors["ranks"])


def _check_ties(ties: object) -> None:
    if not isinstance(ties, str) or ties not in TIES:
        raise ValueError(f'ties: expected "breslow" or "efron", got {ties!r}')


def _check_ranks(ranks: Tensor, scores: Tensor, valid: Tensor) -> None:
    _checks.check_like("ranks", ranks, "scores", scores)
    _checks.check_per_item("ranks", ranks, "scores", scores)
    if _checks.values_are_checked(scores):
        good = (ranks >= 1) & (ranks < torch.inf)
        _checks.check_values("ranks", ranks, good, valid, "finite numbers from 1, the best")
