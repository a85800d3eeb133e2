"""Naive float64 oracles of the KL-penalized rewards: plain Python loops over the equations, with ``math`` alone.

``approx_kl`` takes flat lists; ``kl_penalized_rewards`` takes rows of tokens, and what comes once a row (scores [B],
ended) as one value a row. Clamps are pairs (low, high). What the mask leaves out is never evaluated.
"""

import math

from oracles import flatten, mean, total

OPEN = (-math.inf, math.inf)
LIMIT = -80.0  # below it k3 and its slope stand still: e^80 is about 5.5e34


def clamp(x, bounds):
    """x within its bounds; a NaN stays one."""
    low, high = bounds
    return low if x < low else high if x > high else x


def outside(x, bounds):
    """Strictly beyond a bound, which a NaN never is."""
    return x < bounds[0] or x > bounds[1]


def k3(x):
    """e^-x - 1 + x, which cancels near 0: there its Taylor series (-x)^2/2! + (-x)^3/3! + ..."""
    if abs(x) > 1:
        return math.exp(-x) - 1 + x
    return math.fsum((-x) ** n / math.factorial(n) for n in range(2, 25))


def value(estimator, x):
    """The estimator of x = log pi - log ref (Schulman 2020, "Approximating KL divergence")."""
    if estimator == "k3":
        return k3(LIMIT if x < LIMIT else x)
    return {"k1": x, "k2": x * x / 2, "abs": abs(x)}[estimator]


def derivative(estimator, x):
    """d value / dx, with sign(0) = 0."""
    if estimator == "k3":
        return 0.0 if x < LIMIT else -math.expm1(-x)
    sign = math.nan if math.isnan(x) else float(x > 0) - float(x < 0)
    return {"k1": 1.0, "k2": x, "abs": sign}[estimator]


def item(x, w, estimator, gradient_estimator, input_clamp, output_clamp):
    """(out, d out / d log pi, d out / d w) of one token: out = clamp(w value(clamp(x))).

    Without a gradient estimator the slope is that of ``out``, 0 strictly outside a clamp; with one it is w times that
    estimator's slope at the x given, whatever the clamps (straight-through).
    """
    plain = value(estimator, clamp(x, input_clamp))
    weighted = w * plain
    beyond = outside(weighted, output_clamp)
    if gradient_estimator is not None:
        slope = w * derivative(gradient_estimator, x)
    elif beyond or outside(x, input_clamp):
        slope = 0.0
    else:
        slope = w * derivative(estimator, clamp(x, input_clamp))
    return clamp(weighted, output_clamp), slope, 0.0 if beyond else plain


def approx_kl(
    logprobs,
    ref_logprobs,
    estimator="k1",
    gradient_estimator=None,
    input_clamp=OPEN,
    output_clamp=OPEN,
    importance_weight=None,
    mask=None,
):
    """kl, d_logprobs and d_importance_weight (one an item) of the sum, each 0 where the mask is False."""
    n = len(logprobs)
    valid, w = flatten(mask, n, True), flatten(importance_weight, n, 1.0)
    results = [(0.0, 0.0, 0.0)] * n
    for i in range(n):
        if valid[i]:
            x = logprobs[i] - ref_logprobs[i]
            results[i] = item(x, w[i], estimator, gradient_estimator, input_clamp, output_clamp)
    kl, d_logprobs, d_weight = ([r[part] for r in results] for part in range(3))
    return {"kl": kl, "d_logprobs": d_logprobs, "d_importance_weight": d_weight}


def score_terms(scores, valid, ended, clip, penalty, replace, place):
    """{position: (amount, its slope in the score there)} of one row.

    One score a row stands at ``place``, one a token at every valid position. A row that did not end pays the penalty:
    after its score is clipped, at ``place``, and with ``replace`` instead of the score.
    """
    per_token = isinstance(scores, list)
    terms = {}
    for t in valid if per_token else [place] if scores is not None else []:
        s = scores[t] if per_token else scores
        terms[t] = (clamp(s, clip), 0.0 if outside(s, clip) else 1.0)
    if not ended and penalty is not None:
        amount, slope = (0.0, 0.0) if replace else terms.get(place, (0.0, 0.0))
        terms[place] = (amount - penalty, slope)
    return terms


def row(logprobs, ref_logprobs, mask, scores, ended, kl_coef, grads, options, kl_options):
    """Everything of one row; ``grads`` are its cotangents: (of rewards, kl, sequence_kl, sequence_reward)."""
    n = len(logprobs)
    rewards, kl, slopes = [0.0] * n, [0.0] * n, [0.0] * n
    valid = [t for t in range(n) if mask[t]]
    per_token = isinstance(scores, list)
    d_scores = [0.0] * n if per_token else 0.0
    if not valid:
        return {"valid": valid, "rewards": rewards, "kl": kl, "score": 0.0, "d_logprobs": slopes, "d_scores": d_scores}
    place = valid[-1]
    if options["terminal"] == "one_past" and place + 1 < n:
        place += 1
    of_rewards, of_kl, of_sequence_kl, of_sequence_reward = grads
    for t in valid:
        kl[t], slope, _ = item(logprobs[t] - ref_logprobs[t], 1.0, *kl_options)
        upstream = of_kl[t] + of_sequence_kl
        if kl_coef != 0:  # otherwise there is no KL term: 0 * inf is never formed
            rewards[t] = -kl_coef * kl[t]
            upstream -= kl_coef * (of_rewards[t] + of_sequence_reward)
        slopes[t] = slope * upstream if slope != 0 else 0.0
    penalty = options["missing_eos_penalty"]
    replace = options["missing_eos"] == "replace"
    terms = score_terms(scores, valid, ended, options["score_clip"], penalty, replace, place)
    for t, (amount, slope) in terms.items():
        rewards[t] += amount
        if per_token:
            d_scores[t] = slope * (of_rewards[t] + of_sequence_reward)
        else:
            d_scores = slope * (of_rewards[t] + of_sequence_reward)
    score = total([amount for amount, _ in terms.values()])
    return {"valid": valid, "rewards": rewards, "kl": kl, "score": score, "d_logprobs": slopes, "d_scores": d_scores}


def kl_penalized_rewards(
    logprobs,
    ref_logprobs,
    mask=None,
    scores=None,
    ended=None,
    kl_coef=0.1,
    missing_eos_penalty=None,
    missing_eos="subtract",
    score_clip=OPEN,
    estimator="k1",
    gradient_estimator=None,
    input_clamp=OPEN,
    output_clamp=OPEN,
    terminal="last",
    grads=None,
):
    """rewards_t = -kl_coef kl_t at valid t, plus the score at the last of them, or one past it where there is room
    (Ziegler et al. 2019, eq. 2, token by token as in Stiennon et al. 2020).

    ``grads``: cotangents by output name (rewards, kl: rows; sequence_kl, sequence_reward: one a row), absent = 0.
    Returns rows (rewards, kl, d_logprobs), one a row (sequence_kl, sequence_reward, d_scores) and ``stats``: means over
    the valid tokens (kl) and over the rows that have one (the others), and the counts of both.
    """
    rows, grads = len(logprobs), grads or {}
    options = {"missing_eos_penalty": missing_eos_penalty, "missing_eos": missing_eos}
    options |= {"score_clip": score_clip, "terminal": terminal}
    kl_options = (estimator, gradient_estimator, input_clamp, output_clamp)
    results = []
    for r in range(rows):
        n = len(logprobs[r])
        cotangents = [grads[name][r] if name in grads else [0.0] * n for name in ("rewards", "kl")]
        cotangents += [grads[name][r] if name in grads else 0.0 for name in ("sequence_kl", "sequence_reward")]
        results.append(
            row(
                logprobs[r],
                ref_logprobs[r],
                mask[r] if mask is not None else [True] * n,
                scores[r] if scores is not None else None,
                ended[r] if ended is not None else True,
                kl_coef,
                cotangents,
                options,
                kl_options,
            )
        )
    output = {name: [r[name] for r in results] for name in ("rewards", "kl", "d_logprobs", "d_scores")}
    output["sequence_kl"] = [total(r["kl"]) for r in results]
    output["sequence_reward"] = [total(r["rewards"]) for r in results]
    counted = [i for i, r in enumerate(results) if r["valid"]]
    tokens = sum(len(r["valid"]) for r in results)
    output["stats"] = {
        "kl": total([output["sequence_kl"][i] for i in counted]) / max(tokens, 1),
        "sequence_kl": mean([output["sequence_kl"][i] for i in counted]),
        "score": mean([results[i]["score"] for i in counted]),
        "sequence_reward": mean([output["sequence_reward"][i] for i in counted]),
        "tokens": tokens,
        "sequences": len(counted),
    }
    return output


def masked_whiten(values, mask=None, shift_mean=True, epsilon=1e-8):
    """(v - mean) / sqrt(var + epsilon) of the valid values, the variance unbiased; their mean is put back where
    ``shift_mean`` is False; 0 elsewhere."""
    valid = [i for i in range(len(values)) if mask is None or mask[i]]
    center = mean([values[i] for i in valid])
    variance = total([(values[i] - center) ** 2 for i in valid]) / max(len(valid) - 1, 1)
    result = [0.0] * len(values)
    for i in valid:
        result[i] = (values[i] - center) / math.sqrt(variance + epsilon) + (0.0 if shift_mean else center)
    return result
