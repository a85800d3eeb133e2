"""KL-penalized rewards in Triton: rewards_t = −kl_coef·kl_t, and a row's score where it ends; see ops/.

Decomposition: a grid of at most eight programs a multiprocessor strides over tiles [ROWS, BLOCK], that many tokens of
that many rows, and runs along the rows: over the mask for their last valid token, then over the tokens; partial sums of
the statistics meet as in pairwise/triton.py. Traffic: forward reads logprobs, ref_logprobs and the mask (again from
L1) and writes rewards and kl; backward reads them and upstream gradients and writes one gradient. What the mask leaves
out is not read. Precision: float32 maths (float64 for float64), sums in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rewardfuse.kernels.approx_kl.triton import clamped, derivative
from rewardfuse.kernels.lists.triton import rows_of
from rewardfuse.kernels.pairwise.triton import (
    load_mask,
    load_operand,
    mean,
    number,
    publish,
    total,
    wait_for_partials,
)

NO_SCORES, ROW_SCORES, TOKEN_SCORES = (tl.constexpr(code) for code in range(3))


@triton.jit
def _estimator(numbers, ACC: tl.constexpr):
    """(estimator, gradient estimator, input clamp, output clamp)."""
    return (
        number(numbers, 4, ACC),
        number(numbers, 5, ACC),
        number(numbers, 6, ACC),
        number(numbers, 7, ACC),
        number(numbers, 8, ACC),
        number(numbers, 9, ACC),
    )


@triton.jit
def _coefficient(kl_coef, numbers, HAS: tl.constexpr, ACC: tl.constexpr):
    """NaN where the device holds none."""
    if HAS:
        beta = tl.load(kl_coef).to(ACC)
        return tl.where((beta >= 0) & (beta < float("inf")), beta, float("nan"))
    else:
        return number(numbers, 0, ACC)


@triton.jit
def _last_valid(mask, outer, inner, row, live, size, HAS: tl.constexpr, BLOCK: tl.constexpr):
    """(last valid token, how many there are) of each row; −1 where there is none."""
    last = tl.where(live, size - 1, -1).to(tl.int64)
    n = last + 1
    if HAS:
        last = last * 0 - 1
        n = n * 0
        for start in range(0, size, BLOCK):
            t = (start + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
            valid = load_mask(mask, outer, inner, row, t, live & (t < size), HAS)
            last = tl.maximum(last, tl.max(tl.where(valid, t, -1), axis=1, keep_dims=True))
            n += tl.sum(valid.to(tl.int64), axis=1, keep_dims=True)
    return last, n


@triton.jit
def _unfinished(ended, stride, row, some, HAS: tl.constexpr):
    """Rows that did not end."""
    if HAS:
        return some & (tl.load(ended + row * stride, mask=some, other=1) == 0)
    else:
        return row < 0


@triton.jit
def _clamped_scores(scores, outer, inner, row, t, where, low, high, ACC: tl.constexpr):
    """(scores within bounds, whether they were); a NaN is."""
    s = tl.load(scores + row * outer + t * inner, mask=where, other=0).to(ACC)
    s = tl.where(where, s, 0.0)
    within = ((s < low) | (s > high)) == 0
    return tl.where(where, tl.where(s < low, low, tl.where(s > high, high, s)), 0.0), within


@triton.jit
def forward_kernel(
    logprobs,  # [count, size], strided, like the next two
    ref_logprobs,
    mask,
    scores,  # [count, size] or [count] (then of stride 0), strided
    ended,  # [count], strided
    kl_coef,  # [] or a number
    rewards,  # [count, size]
    kl,
    sequence_kl,  # [count]
    sequence_reward,
    stats,  # [6]
    strides,  # of logprobs, ref_logprobs, mask, scores: (outer, inner) each; of ended
    numbers,  # kl_coef, missing_eos_penalty, score_low, score_high, then what _estimator() names
    count,
    size,
    flags,
    partials,
    nonce,
    HAS_MASK: tl.constexpr,
    SCORES: tl.constexpr,
    HAS_ENDED: tl.constexpr,
    HAS_COEF: tl.constexpr,
    ONE_PAST: tl.constexpr,
    REPLACE: tl.constexpr,
    ACC: tl.constexpr,
    TERMS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    all_kl = tl.zeros([ROWS, 1], tl.float64)
    all_scores = tl.zeros([ROWS, 1], tl.float64)
    all_rewards = tl.zeros([ROWS, 1], tl.float64)
    all_tokens = tl.zeros([ROWS, 1], tl.float64)
    all_rows = tl.zeros([ROWS, 1], tl.float64)
    coefficient = _coefficient(kl_coef, numbers, HAS_COEF, ACC)
    penalty = number(numbers, 1, ACC)
    low, high = number(numbers, 2, ACC), number(numbers, 3, ACC)
    estimator, _through, input_low, input_high, output_low, output_high = _estimator(numbers, ACC)
    for group in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row, live = rows_of(group, count, ROWS)
        last, n = _last_valid(mask, strides[4], strides[5], row, live, size, HAS_MASK, BLOCK)
        some = n > 0
        unfinished = _unfinished(ended, strides[8], row, some, HAS_ENDED)
        place = last
        if ONE_PAST:
            place = tl.where(some & (last + 1 < size), last + 1, last)
        sum_kl = tl.zeros([ROWS, 1], tl.float64)
        sum_scores = tl.zeros([ROWS, 1], tl.float64)
        sum_rewards = tl.zeros([ROWS, 1], tl.float64)
        for start in range(0, size, BLOCK):
            t = (start + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
            here = live & (t < size)
            valid = load_mask(mask, strides[4], strides[5], row, t, here, HAS_MASK)
            a = tl.load(logprobs + row * strides[0] + t * strides[1], mask=valid, other=0).to(ACC)
            b = tl.load(ref_logprobs + row * strides[2] + t * strides[3], mask=valid, other=0).to(ACC)
            value = clamped(a, b, 1.0, estimator, input_low, input_high, output_low, output_high, TERMS)
            value = tl.where(valid, value, 0.0)
            score = tl.zeros_like(value)
            if SCORES == TOKEN_SCORES:
                score, _within = _clamped_scores(scores, strides[6], strides[7], row, t, valid, low, high, ACC)
            if SCORES == ROW_SCORES:
                score, _within = _clamped_scores(scores, strides[6], 0, row, t, some & (t == place), low, high, ACC)
            kept = score
            if REPLACE:
                kept = tl.zeros_like(score)
            score = tl.where(unfinished & (t == place), kept - penalty, score)
            weight = tl.zeros_like(value) + coefficient
            reward = score - tl.where(weight == 0, 0.0, weight * value)
            tl.store(kl + row * size + t, value, mask=here)
            tl.store(rewards + row * size + t, reward, mask=here)
            sum_kl += tl.sum(value.to(tl.float64), axis=1, keep_dims=True)
            sum_scores += tl.sum(score.to(tl.float64), axis=1, keep_dims=True)
            sum_rewards += tl.sum(reward.to(tl.float64), axis=1, keep_dims=True)
        tl.store(sequence_kl + row, sum_kl.to(ACC), mask=live)
        tl.store(sequence_reward + row, sum_rewards.to(ACC), mask=live)
        all_kl += sum_kl
        all_scores += sum_scores
        all_rewards += sum_rewards
        all_tokens += n.to(tl.float64)
        all_rows += some.to(tl.float64)

    publish(partials, 0, tl.sum(all_kl))
    publish(partials, 1, tl.sum(all_scores))
    publish(partials, 2, tl.sum(all_rewards))
    publish(partials, 3, tl.sum(all_tokens))
    publish(partials, 4, tl.sum(all_rows))
    if wait_for_partials(flags, nonce, PROGRAMS):
        of_kl = total(partials, 0, PROGRAMS)
        tokens = total(partials, 3, PROGRAMS)
        rows = total(partials, 4, PROGRAMS)
        tl.store(stats, mean(of_kl, tokens).to(ACC))
        tl.store(stats + 1, mean(of_kl, rows).to(ACC))
        tl.store(stats + 2, mean(total(partials, 1, PROGRAMS), rows).to(ACC))
        tl.store(stats + 3, mean(total(partials, 2, PROGRAMS), rows).to(ACC))
        tl.store(stats + 4, tokens.to(ACC))
        tl.store(stats + 5, rows.to(ACC))


@triton.jit
def backward_kernel(
    grad_rewards,  # [count, size], strided
    grad_kl,
    grad_sequence_kl,  # [count], strided
    grad_sequence_reward,
    logprobs,  # as in forward, down to kl_coef
    ref_logprobs,
    mask,
    scores,
    ended,
    kl_coef,
    d_logprobs,  # [count, size]
    d_scores,  # of the scores' shape, contiguous
    strides,  # and of grad_rewards, grad_kl: (outer, inner) each; of grad_sequence_kl, grad_sequence_reward
    numbers,
    count,
    size,
    OF_REWARDS: tl.constexpr,  # which gradients there are
    OF_KL: tl.constexpr,
    OF_SEQUENCE_KL: tl.constexpr,
    OF_SEQUENCE_REWARD: tl.constexpr,
    NEED_LOGPROBS: tl.constexpr,
    NEED_SCORES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SCORES: tl.constexpr,
    HAS_ENDED: tl.constexpr,
    HAS_COEF: tl.constexpr,
    ONE_PAST: tl.constexpr,
    REPLACE: tl.constexpr,
    ACC: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    coefficient = _coefficient(kl_coef, numbers, HAS_COEF, ACC)
    low, high = number(numbers, 2, ACC), number(numbers, 3, ACC)
    estimator, through, input_low, input_high, output_low, output_high = _estimator(numbers, ACC)
    for group in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row, live = rows_of(group, count, ROWS)
        g_sequence_kl = load_operand(grad_sequence_kl, strides[13], 0, 0.0, row, row, live, OF_SEQUENCE_KL, ACC)
        g_sequence_reward = load_operand(
            grad_sequence_reward, strides[14], 0, 0.0, row, row, live, OF_SEQUENCE_REWARD, ACC
        )
        if NEED_SCORES:
            last, n = _last_valid(mask, strides[4], strides[5], row, live, size, HAS_MASK, BLOCK)
            some = n > 0
            place = last
            if ONE_PAST:
                place = tl.where(some & (last + 1 < size), last + 1, last)
            replaced = row < 0
            if REPLACE:
                replaced = _unfinished(ended, strides[8], row, some, HAS_ENDED)
            of_row = tl.zeros([ROWS, 1], ACC)
        for start in range(0, size, BLOCK):
            t = (start + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
            here = live & (t < size)
            valid = load_mask(mask, strides[4], strides[5], row, t, here, HAS_MASK)
            at = row + t * 0
            g_reward = load_operand(grad_rewards, strides[9], strides[10], 0.0, at, t, here, OF_REWARDS, ACC)
            g_reward += g_sequence_reward
            if NEED_LOGPROBS:
                a = tl.load(logprobs + row * strides[0] + t * strides[1], mask=valid, other=0).to(ACC)
                b = tl.load(ref_logprobs + row * strides[2] + t * strides[3], mask=valid, other=0).to(ACC)
                g = load_operand(grad_kl, strides[11], strides[12], 0.0, at, t, valid, OF_KL, ACC) + g_sequence_kl
                if OF_REWARDS or OF_SEQUENCE_REWARD:
                    weight = tl.zeros_like(g) + coefficient
                    g -= tl.where(weight == 0, 0.0, weight * g_reward)
                d, _of_weight = derivative(
                    a, b, 1.0, estimator, through, input_low, input_high, output_low, output_high, TERMS
                )
                asked = valid & (g != 0)  # what nobody asks for may be infinite
                tl.store(d_logprobs + row * size + t, tl.where(asked, d * g, 0.0), mask=here)
            if NEED_SCORES:
                scored = valid
                if SCORES == ROW_SCORES:
                    scored = some & (t == place)
                _score, within = _clamped_scores(scores, strides[6], strides[7], row, t, scored, low, high, ACC)
                d_score = tl.where(scored & within & ((replaced & (t == place)) == 0), g_reward, 0.0)
                if SCORES == TOKEN_SCORES:
                    tl.store(d_scores + row * size + t, d_score, mask=here)
                else:
                    of_row += tl.sum(d_score, axis=1, keep_dims=True)
        if NEED_SCORES and SCORES == ROW_SCORES:
            tl.store(d_scores + row, of_row, mask=live)
