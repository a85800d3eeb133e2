"""Naive float64 oracles for rows of a vocabulary: loops over the equations, with ``math`` alone.

Logits come as a list of rows, tokens and what comes once a row (mask, temperature, upstream gradients) as flat lists or
one number. A row whose mask is False is never evaluated: its outputs and its gradients are 0.
"""

import math

from oracles import flatten, total

# KL estimators of x = log pi(token) - log rho(token): value and derivative. k3 saturates at 80 nats.
ESTIMATORS = {
    "k1": (lambda x: x, lambda x: 1.0),
    "k2": (lambda x: x * x / 2, lambda x: x),
    "k3": (lambda x: math.expm1(-max(x, -80.0)) + max(x, -80.0), lambda x: -math.expm1(-x) if x >= -80 else 0.0),
    "abs": (abs, lambda x: math.copysign(1.0, x) if x else 0.0),
}


def scaled(row, temperature, softcap):
    """(c tanh(l / c) / temperature, its derivative) of every logit; without a softcap c tanh(l / c) is l."""
    if softcap is None:
        return [x / temperature for x in row], [1.0 / temperature] * len(row)
    bent = [math.tanh(x / softcap) for x in row]
    return [softcap * t / temperature for t in bent], [(1 - t) * (1 + t) / temperature for t in bent]


def log_softmax(p):
    """log(e^p_j / sum e^p): NaN throughout where a value is NaN or +inf, or all are -inf."""
    if any(math.isnan(x) or x == math.inf for x in p) or max(p) == -math.inf:
        return [math.nan] * len(p)
    top = max(p)
    rest = math.log(math.fsum(math.exp(x - top) for x in p))
    return [(x - top) - rest for x in p]


def entropy(a):
    """-sum e^a a; what has no probability adds nothing."""
    return -total([math.exp(x) * x for x in a if x != -math.inf])


def divergence(a, b):
    """KL = sum e^a (a - b): +inf where b lacks something that a has; what a lacks adds nothing."""
    if any(math.isnan(x) for x in (*a, *b)):
        return math.nan
    if any(x > -math.inf and y == -math.inf for x, y in zip(a, b, strict=True)):
        return math.inf
    return total([math.exp(x) * (x - y) for x, y in zip(a, b, strict=True) if x != -math.inf])


def d_entropy(a):
    """dH/dp_j = -pi_j (log pi_j + H)."""
    h = entropy(a)
    return [-math.exp(x) * (x + h) if x != -math.inf else 0.0 for x in a]


def d_divergence(a, b, direction):
    """d/dp of KL(pi || rho): pi_j (log pi_j - log rho_j - KL); of KL(rho || pi): pi_j - rho_j. a log pi, b log rho."""
    if direction == "forward":
        return [math.exp(x) - math.exp(y) for x, y in zip(a, b, strict=True)]
    kl = divergence(a, b)
    return [math.exp(x) * (x - y - kl) if x != -math.inf else 0.0 for x, y in zip(a, b, strict=True)]


def d_logprob(a, token):
    """d log pi_token / dp_j = [j = token] - pi_j."""
    return [float(j == token) - math.exp(x) for j, x in enumerate(a)]


def vocabulary(
    logits,
    tokens,
    ref_logits=None,
    mask=None,
    temperature=1.0,
    logit_softcap=None,
    vocab_size=None,
    estimator="k1",
    upstream=None,
):
    """Log-probabilities of the tokens, entropy and KL of every row, and the gradient of what is made of them.

    pi = softmax(softcap(logits) / temperature) over the first ``vocab_size`` logits, rho alike from ``ref_logits``.
    ``estimator``: one of :data:`ESTIMATORS` of x = log pi(token) - log rho(token), "full" for KL(pi || rho),
    "full_forward" for KL(rho || pi). ``upstream``: weights by the names logprobs, entropy and kl; ``d_logits`` is the
    gradient of the sum of the weighted outputs with respect to ``logits``.
    """
    n = len(logits)
    tokens, valid, t = flatten(tokens, n), flatten(mask, n, True), flatten(temperature, n)
    weights = {name: flatten((upstream or {}).get(name), n, 0.0) for name in ("logprobs", "entropy", "kl")}
    result = {name: [0.0] * n for name in ("logprobs", "ref_logprobs", "entropy", "kl")}
    result["d_logits"] = [[0.0] * len(row) for row in logits]
    for r in (r for r in range(n) if valid[r]):
        size = len(logits[r]) if vocab_size is None else vocab_size
        p, slope = scaled(logits[r][:size], t[r], logit_softcap)
        a, token = log_softmax(p), tokens[r]
        slopes = {"logprobs": d_logprob(a, token), "entropy": d_entropy(a)}
        result["logprobs"][r], result["entropy"][r] = a[token], entropy(a)
        if ref_logits is not None:
            b = log_softmax(scaled(ref_logits[r][:size], t[r], logit_softcap)[0])
            result["ref_logprobs"][r] = b[token]
            result["kl"][r], slopes["kl"] = kl_of_row(a, b, token, estimator)
        for j in range(size):
            parts = [weights[name][r] * slopes[name][j] for name in slopes if weights[name][r] != 0]
            result["d_logits"][r][j] = total(parts) * slope[j]
    return result


def kl_of_row(a, b, token, estimator):
    """(KL, its gradient with respect to p) from log pi, log rho and the token that was drawn."""
    if estimator in ("full", "full_forward"):
        pair, direction = ((a, b), "reverse") if estimator == "full" else ((b, a), "forward")
        return divergence(*pair), d_divergence(a, b, direction)
    value, derivative = ESTIMATORS[estimator]
    x = a[token] - b[token]
    return value(x), [derivative(x) * slope for slope in d_logprob(a, token)]


def linear(hidden, weight, bias=None):
    """Rows of logits: hidden weight^T + bias."""
    bias = bias or [0.0] * len(weight)
    return [
        [math.fsum(map(math.prod, zip(h, w, strict=True))) + b for w, b in zip(weight, bias, strict=True)]
        for h in hidden
    ]


def vocabulary_from_hidden(
    hidden, weight, tokens, bias=None, ref_hidden=None, ref_weight=None, ref_bias=None, mask=None, **options
):
    """:func:`vocabulary` of hidden weight^T + bias, with d_hidden, d_weight and d_bias by the chain rule."""
    valid = flatten(mask, len(hidden), True)

    def logits_of(rows, matrix, offset):
        return linear([h if ok else [0.0] * len(h) for h, ok in zip(rows, valid, strict=True)], matrix, offset)

    ref_logits = None if ref_hidden is None else logits_of(ref_hidden, ref_weight, ref_bias)
    result = vocabulary(logits_of(hidden, weight, bias), tokens, ref_logits, mask=mask, **options)
    d, rows, size = result["d_logits"], range(len(hidden)), range(len(weight[0]) if weight else 0)
    counted = [r for r in rows if valid[r]]
    result["d_hidden"] = [
        [total([d[r][j] * weight[j][k] for j in range(len(weight))]) if valid[r] else 0.0 for k in size] for r in rows
    ]
    result["d_weight"] = [[total([d[r][j] * hidden[r][k] for r in counted]) for k in size] for j in range(len(weight))]
    result["d_bias"] = [total([d[r][j] for r in counted]) for j in range(len(weight))]
    return result
