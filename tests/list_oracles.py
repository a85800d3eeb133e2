"""Naive float64 oracles for lists: double loops over the equations, with ``math`` alone.

``scores`` is a list of rows, which may differ in length (so packed lists need no oracle of their own); what comes once
an item (order, ranks, labels, mask) has the shape of scores, what comes once a list (lengths, top_k, weight) is a
number or one number a row. A list of weight 0 is never evaluated. Results: ``loss`` and ``d_scores``, rows like scores.
"""

import itertools
import math

from oracles import log_sigmoid, sigmoid, total


def per_list(value, count, default):
    """``count`` values from None, a number, or a list of them."""
    value = default if value is None else value
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def valid_items(row, length, mask):
    """Positions of the items that count."""
    return [i for i in range(len(row)) if (mask is None or mask[i]) and (length is None or i < length)]


def ranked_groups(valid, order, ranks):
    """The valid items best first, as groups of tied ones: one item a group unless ``ranks`` holds ties."""
    if ranks is None:
        return [[i] for i in (valid if order is None else order[: len(valid)])]
    return [[i for i in valid if ranks[i] == rank] for rank in sorted({ranks[i] for i in valid})]


def stages(groups, top_k, ties, position_weight):
    """Yields (weight, the item chosen, what it was chosen from: (coefficient, item)) for every observed stage.

    Without ties stage i chooses item i from items i, i+1, ... A group of m tied items takes the mean of the weights of
    its m positions and is observed whole where its first position is before top_k. Breslow 1974: each of the m is
    chosen from the group and all after it. Efron 1977: in the j-th of m choices, j from 0, the group counts 1 - j/m.
    """
    position = 0
    for g, group in enumerate(groups):
        m, after = len(group), [item for later in groups[g + 1 :] for item in later]
        if position >= top_k:
            return
        weight = math.fsum(position_weight[position : position + m]) / m
        for j, chosen in enumerate(group):
            share = 1.0 if ties == "breslow" else (m - j) / m
            yield weight, chosen, [(share, item) for item in group] + [(1.0, item) for item in after]
        position += m


def plackett_luce_list(row, groups, top_k, ties, position_weight):
    """(NLL, gradient) of one list: NLL = sum over stages of w [log sum c exp(s) - s_chosen] (Luce 1959, Plackett 1975).

    dNLL/ds_t = sum over stages of w [c_t exp(s_t) / sum c exp(s) - (1 if t was chosen)].
    """
    terms, slopes = [], {item: [] for group in groups for item in group}
    for weight, chosen, offered in stages(groups, top_k, ties, position_weight):
        top = max(row[item] for _, item in offered)
        masses = [c * math.exp(row[item] - top) for c, item in offered]
        terms.append(weight * ((top - row[chosen]) + math.log1p(math.fsum([*masses, -1.0]))))
        mass = math.fsum(masses)
        others = math.fsum(x for x, (_, item) in zip(masses, offered, strict=True) if item != chosen)
        for x, (_, item) in zip(masses, offered, strict=True):  # of the chosen one p - 1, without cancellation
            slopes[item].append(weight * x / mass if item != chosen else -weight * others / mass)
    return total(terms), {item: total(values) for item, values in slopes.items()}


def reduce_lists(losses, gradients, counted, reduction, normalizer):
    """Reduce losses of lists; scale their gradients alike (for "none": the gradients of the sum)."""
    scale = 1.0
    if reduction == "mean":
        scale = 1.0 / (normalizer if normalizer is not None else max(counted, 1))
    loss = losses if reduction == "none" else total(losses) * scale
    return {"loss": loss, "d_scores": [[g * scale for g in row] for row in gradients]}


def plackett_luce(
    scores,
    order=None,
    ranks=None,
    lengths=None,
    mask=None,
    top_k=None,
    ties="breslow",
    position_weight=None,
    weight=None,
    reduction="mean",
    normalizer=None,
):
    """Plackett-Luce negative log-likelihood of every list, :func:`plackett_luce_list`, times its weight.

    "mean" divides by the lists with at least one valid item (zero weights included), or by ``normalizer``.
    """
    rows = len(scores)
    n, k, w = per_list(lengths, rows, None), per_list(top_k, rows, math.inf), per_list(weight, rows, 1.0)
    losses, gradients, counted = [0.0] * rows, [[0.0] * len(row) for row in scores], 0
    for r, row in enumerate(scores):
        valid = valid_items(row, n[r], mask and mask[r])
        counted += bool(valid)
        if w[r] == 0:
            continue
        by_position = position_weight or [1.0] * len(row)
        if isinstance(by_position[0] if by_position else 0, (list, tuple)):
            by_position = by_position[r]
        groups = ranked_groups(valid, order and order[r], ranks and ranks[r])
        nll, slopes = plackett_luce_list(row, groups, k[r], ties, by_position)
        losses[r] = w[r] * nll
        for item, slope in slopes.items():
            gradients[r][item] = w[r] * slope
    return reduce_lists(losses, gradients, counted, reduction, normalizer)


def all_pairs(scores, labels, lengths=None, mask=None, margin=0.0, weight=None, reduction="mean", normalizer=None):
    """Mean over a list's pairs of differing label of -log sigma(s_hi - s_lo - margin |label_hi - label_lo|), times its
    weight (Ouyang et al. 2022, eq. 1, with the margin of Touvron et al. 2023, eq. 2).

    "mean" divides by the lists that have a pair (zero weights included), or by ``normalizer``.
    """
    rows = len(scores)
    n, w = per_list(lengths, rows, None), per_list(weight, rows, 1.0)
    losses, gradients, counted = [0.0] * rows, [[0.0] * len(row) for row in scores], 0
    for r, row in enumerate(scores):
        valid = valid_items(row, n[r], mask and mask[r])
        pairs = [(i, j) for i, j in itertools.permutations(valid, 2) if labels[r][i] > labels[r][j]]
        counted += bool(pairs)
        if w[r] == 0 or not pairs:
            continue
        terms, slopes = [], {item: [] for item in valid}
        for i, j in pairs:
            z = row[i] - row[j] - margin * (labels[r][i] - labels[r][j])
            terms.append(-log_sigmoid(z))
            slopes[i].append(-sigmoid(-z))
            slopes[j].append(sigmoid(-z))
        losses[r] = w[r] * total(terms) / len(pairs)
        for item in valid:
            gradients[r][item] = w[r] * total(slopes[item]) / len(pairs)
    return reduce_lists(losses, gradients, counted, reduction, normalizer)
