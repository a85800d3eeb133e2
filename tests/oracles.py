"""Naive float64 oracles: plain Python loops over the equations, with ``math`` alone.

Every input may be a number (it stands for every pair), a flat or nested list, or an array with ``tolist``; results are
flat lists in row-major order. A pair whose mask is False, or whose weight is 0, is never evaluated.
"""

import math


def flatten(value, count, default=None):
    """``count`` values from a number, a list of any nesting, an array, or None (``default`` then)."""
    value = default if value is None else value
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        return [value] * count
    while value and isinstance(value[0], (list, tuple)):
        value = [item for row in value for item in row]
    if len(value) != count:
        raise ValueError(f"expected {count} values, got {len(value)}")
    return list(value)


def size(value):
    """Number of values in a list of any nesting or in an array."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return sum(size(item) for item in value) if isinstance(value, (list, tuple)) else 1


def total(values):
    """Exactly rounded sum; inf and NaN follow IEEE rules (``fsum`` alone would raise on inf - inf)."""
    return math.fsum(values) if all(math.isfinite(v) for v in values) else sum(values)


def mean(values):
    """Mean, 0 of nothing."""
    return total(values) / len(values) if values else 0.0


def sigmoid(x):
    """1 / (1 + e^-x), without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def log_sigmoid(x):
    """log(1 / (1 + e^-x)), without overflow or cancellation."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def reduce_pairs(losses, gradients, mask, reduction, normalizer):
    """Reduce per-pair losses; scale per-pair gradients alike (for "none": the gradients of the sum)."""
    scale = 1.0
    if reduction == "mean":
        scale = 1.0 / (normalizer if normalizer is not None else max(sum(mask), 1))
    loss = losses if reduction == "none" else total(losses) * scale
    return {"loss": loss, **{name: [g * scale for g in values] for name, values in gradients.items()}}


def bradley_terry(
    chosen,
    rejected,
    margin=None,
    mask=None,
    weight=None,
    target=None,
    label_smoothing=0.0,
    beta=1.0,
    center_rewards_coefficient=0.0,
    reduction="mean",
    normalizer=None,
):
    """Bradley-Terry negative log-likelihood (Bradley and Terry 1952, Biometrika 39, eq. for pi_i / (pi_i + pi_j)).

    z = beta (c - r) - margin;  t = target (1 - eps) + (1 - target) eps
    l = weight [-t log sigma(z) - (1 - t) log sigma(-z) + coefficient (c + r)^2]   (centering: Eisenstein et al. 2023)
    "mean" divides by the pairs whose mask is True (zero weights included), or by ``normalizer``.
    Returns loss, d_chosen, d_rejected, d_margin, and the stats as means over pairs with mask and weight != 0.
    """
    n = size(chosen)
    c, r, m = flatten(chosen, n), flatten(rejected, n), flatten(margin, n, 0.0)
    valid, w, y = flatten(mask, n, True), flatten(weight, n, 1.0), flatten(target, n, 1.0)
    losses, d_chosen, d_rejected, d_margin = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n
    counted = [i for i in range(n) if valid[i] and w[i] != 0]
    for i in counted:
        z = beta * (c[i] - r[i]) - m[i]
        t = y[i] * (1 - label_smoothing) + (1 - y[i]) * label_smoothing
        loss = d_z = 0.0
        if t != 0:
            loss, d_z = -t * log_sigmoid(z), -t * sigmoid(-z)
        if t != 1:
            loss, d_z = loss - (1 - t) * log_sigmoid(-z), d_z + (1 - t) * sigmoid(z)
        d_center = 0.0
        if center_rewards_coefficient != 0:
            loss += center_rewards_coefficient * (c[i] + r[i]) * (c[i] + r[i])
            d_center = 2 * center_rewards_coefficient * (c[i] + r[i])
        losses[i] = w[i] * loss
        d_chosen[i], d_rejected[i] = w[i] * (beta * d_z + d_center), w[i] * (-beta * d_z + d_center)
        d_margin[i] = -w[i] * d_z
    gradients = {"d_chosen": d_chosen, "d_rejected": d_rejected, "d_margin": d_margin}
    return reduce_pairs(losses, gradients, valid, reduction, normalizer) | {
        "accuracy": mean([float(c[i] > r[i]) for i in counted]),
        "tie_rate": mean([float(c[i] == r[i]) for i in counted]),
        "reward_margin": mean([c[i] - r[i] for i in counted]),
        "chosen": mean([c[i] for i in counted]),
        "rejected": mean([r[i] for i in counted]),
    }


def rao_kupper_pair(d, eta, outcome):
    """(-log P, d/dd, d/deta): win sigma(d - eta), loss sigma(-d - eta), tie the rest (Rao and Kupper 1967).

    tie = (theta^2 - 1) sigma(d - eta) sigma(-d - eta) with theta = e^eta
        = (1 - e^-2eta) e^min(0, eta - |d|) / [(1 + e^-|d - eta|) (1 + e^-|d + eta|)]; impossible at eta = 0.
    d/dd of its log is -sinh(d) / (cosh(eta) + cosh(d)), written with every exponent at most 0.
    """
    if outcome == 1:
        return -log_sigmoid(d - eta), -sigmoid(eta - d), sigmoid(eta - d)
    if outcome == 0:
        return -log_sigmoid(-d - eta), sigmoid(eta + d), sigmoid(eta + d)
    a = abs(d)
    top = max(eta, a)
    slope = -math.expm1(-2 * a) * math.exp(a - top) / sum(math.exp(x - top) for x in (eta, -eta, a, -a))
    if eta == 0:
        return math.inf, math.copysign(slope, d), -math.inf
    nll = math.log1p(math.exp(-abs(d - eta))) + math.log1p(math.exp(-abs(d + eta))) - min(0.0, eta - a)
    possible = -math.expm1(-2 * eta)
    d_eta = -2 * math.exp(-2 * eta) / possible - sigmoid(d - eta) - sigmoid(-d - eta)
    log_possible = math.log(possible) if eta < 0.5 else math.log1p(-math.exp(-2 * eta))
    return nll - log_possible, math.copysign(slope, d), d_eta


def davidson_pair(d, log_nu, outcome):
    """(-log P, d/dd, d/dlog nu): win : loss : tie = e^(d/2) : e^(-d/2) : nu (Davidson 1970)."""
    logits = {1: d / 2, 0: -d / 2, 0.5: log_nu}

    def nll(k):
        top, *rest = sorted((other - logits[k] for other in logits.values()), reverse=True)
        return top + math.log1p(sum(math.exp(x - top) for x in rest))

    first, second, tie = (math.exp(-nll(k)) for k in (1, 0, 0.5))
    if outcome == 1:
        return nll(1), -(second + tie / 2), tie
    if outcome == 0:
        return nll(0), first + tie / 2, tie
    # first - second = max(first, second) (1 - e^-|d|), signed
    return nll(0.5), math.copysign(-math.expm1(-abs(d)) * max(first, second) / 2, d), -(first + second)


def bradley_terry_tie(
    first, second, outcome, log_tie, model="rao_kupper", mask=None, weight=None, reduction="mean", normalizer=None
):
    """Negative log-likelihood of pairs with ties; outcome 1 first wins, 0.5 tie, 0 second wins.

    ``model``: :func:`rao_kupper_pair` (log_tie = ln theta >= 0) or :func:`davidson_pair` (log_tie = ln nu).
    Returns loss, d_first, d_second, d_log_tie (one per pair; sum it where log_tie is one number).
    """
    pair = {"rao_kupper": rao_kupper_pair, "davidson": davidson_pair}[model]
    n = size(first)
    a, b, y, tie = flatten(first, n), flatten(second, n), flatten(outcome, n), flatten(log_tie, n)
    valid, w = flatten(mask, n, True), flatten(weight, n, 1.0)
    losses, d_first, d_second, d_log_tie = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n
    for i in range(n):
        if valid[i] and w[i] != 0:
            loss, d_d, d_tie = (w[i] * x for x in pair(a[i] - b[i], tie[i], y[i]))
            losses[i], d_first[i], d_second[i], d_log_tie[i] = loss, d_d, -d_d, d_tie
    gradients = {"d_first": d_first, "d_second": d_second, "d_log_tie": d_log_tie}
    return reduce_pairs(losses, gradients, valid, reduction, normalizer)
