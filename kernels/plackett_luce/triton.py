"""Plackett–Luce in Triton: equations as in math.h.

Decomposition: a program takes ROWS lists at a time, BLOCK positions of each; longer lists in chunks of BLOCK, in
forward from the last to the first, in backward from the first to the last. L is a suffix scan of (max, sum), Q a
prefix scan of affine maps. r_{i−1} = 1 / (1 + e^{s_{i−1} − L_i}) needs the score before, which is read again (from
L1): 1 − p_{i−1} would cancel. Forward leaves (max, sum) behind each chunk, so that backward is one pass too. Traffic,
float32: forward reads 4 bytes a score, backward reads 4 and writes 4; an order, a mask and weights by position are
read once more each way. Precision: float32 (float64 for float64), sums over stages and lists in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rewardfuse.kernels.lists.triton import gradient_scale, list_weight, reduce_lists, rows_of, weighted
from rewardfuse.kernels.pairwise.triton import NONE, number
from rewardfuse.kernels.plackett_luce.places import (
    at,
    compose,
    finite,
    index_at,
    lists_of,
    mix,
    score_at,
    suffixes,
    valid_items,
)


@triton.jit
def forward_kernel(
    scores,  # [count, size] or, packed, [size]; strided, like all that follow
    order,  # like scores
    mask,  # like scores
    u,  # like scores, by position
    v,
    cu_seqlens,  # [count + 1] contiguous
    lengths,  # [count]
    top_k,  # [count]
    weight,  # [count] or a number
    normalizer,  # []
    loss,  # [count] or []
    list_loss,  # [count]
    saved,  # (max, sum) behind each chunk but a list's last
    denominator,  # []
    strides,  # of scores, order, mask, u, v: (outer, inner) each; of weight, lengths, top_k
    numbers,  # weight, normalizer (0: none)
    count,
    size,
    slots,  # chunks a padded list; 1 where packed
    limit,  # stages where there is no top_k
    flags,
    partials,
    nonce,
    PACKED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    CHUNKED: tl.constexpr,
    REDUCTION: tl.constexpr,
    ACC: tl.constexpr,
    LOWEST: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sum_loss = tl.zeros([ROWS, 1], tl.float64)
    sum_valid = tl.zeros([ROWS, 1], tl.float64)
    weight_number = number(numbers, 0, ACC)
    column = tl.arange(0, BLOCK)[None, :]
    for group in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row, live = rows_of(group, count, ROWS)
        begin, n, width, k, bad = lists_of(
            row, live, cu_seqlens, lengths, top_k, strides, count, size, limit, PACKED, HAS_LENGTHS, HAS_TOP_K
        )
        w = list_weight(weight, strides[10], weight_number, row, live, HAS_WEIGHT, ACC)
        read = live & (w != 0) & (bad == 0)
        scores_of = scores + row * strides[0] + begin * strides[1]
        order_of = order + row * strides[2] + begin * strides[3]
        mask_of = mask + row * strides[4] + begin * strides[5]
        slot = row * slots + begin // BLOCK
        nll = tl.zeros([ROWS, 1], tl.float64)
        surplus = tl.zeros([ROWS, 1], tl.int64)  # of the order's indices over the valid places; 0 for a permutation
        carry_max = tl.full([ROWS, 1], LOWEST, ACC)
        carry_sum = tl.zeros([ROWS, 1], ACC)
        behind = tl.zeros([ROWS, 1], tl.int32)  # valid items in the chunks so far
        if HAS_V:  # what is taken off scores and L alike, lest large scores cancel
            _first, best = index_at(order_of, strides[3], n * 0, read & (n > 0), width, HAS_ORDER)
            common = score_at(scores_of, strides[1], best, read & (n > 0), 0.0, ACC)
        chunks = 1
        if CHUNKED:
            chunks = tl.cdiv(tl.max(tl.where(read, width if HAS_MASK else n, 0)), BLOCK)
        for done in range(0, chunks):
            chunk = chunks - 1 - done
            place = chunk * BLOCK + column
            valid = valid_items(mask_of, strides[5], place, n, width, read, HAS_MASK)
            there = read & (place < n) if HAS_ORDER else valid
            named, index = index_at(order_of, strides[3], place, there, width, HAS_ORDER)
            score = score_at(scores_of, strides[1], index, there, LOWEST, ACC)
            if CHUNKED:
                onward = read & ((chunk + 1) * BLOCK < (width if HAS_MASK else n))
                tl.store(saved + 2 * (slot + chunk), carry_max, mask=onward)
                tl.store(saved + 2 * (slot + chunk) + 1, carry_sum, mask=onward)
            top, sum = suffixes(score, there, carry_max, carry_sum, LOWEST, CHUNKED, ACC)
            carry_max = at(top, column, 0)
            carry_sum = at(sum, column, 0)
            position = place
            if HAS_MASK and not HAS_ORDER:
                position = n - behind - tl.cumsum(valid.to(tl.int32), axis=1, reverse=True)
                behind += tl.sum(valid.to(tl.int32), axis=1, keep_dims=True)
            if HAS_ORDER:
                extra = tl.where(there, mix(named), 0) - tl.where(valid, mix(place.to(tl.int64)), 0)
                surplus += tl.sum(extra, axis=1, keep_dims=True)
            stage = there & (position < k)
            log_sum = tl.log(tl.where(stage, sum, 1.0))
            term = (top - score) + log_sum
            u_here = stage.to(ACC)
            if HAS_U:
                u_at = row * strides[6] + (begin + position) * strides[7]
                u_here = tl.load(u + u_at, mask=stage, other=0).to(ACC)
                term = tl.where(u_here == 0, 0.0, u_here * term)
            if HAS_V:
                v_at = row * strides[8] + (begin + position) * strides[9]
                v_here = tl.load(v + v_at, mask=stage, other=0).to(ACC)
                term = tl.where(u_here == 0, 0.0, u_here * ((top - common) + log_sum))
                term -= tl.where(v_here == 0, 0.0, v_here * (score - common))
            nll += tl.sum(tl.where(stage, term, 0.0).to(tl.float64), axis=1, keep_dims=True)
        bad = bad | (surplus != 0) | (carry_sum != carry_sum)  # or NaN among the scores
        value = weighted(nll.to(ACC), w, bad)
        tl.store(list_loss + row, value, mask=live)
        if REDUCTION == NONE:
            tl.store(loss + row, value, mask=live)
        sum_loss += tl.where(live, value, 0.0).to(tl.float64)
        sum_valid += (live & ((n > 0) | bad)).to(tl.float64)
    reduce_lists(
        sum_loss,
        sum_valid,
        loss,
        denominator,
        normalizer,
        number(numbers, 1, tl.float64),
        flags,
        partials,
        nonce,
        HAS_NORMALIZER,
        REDUCTION,
        PROGRAMS,
        ACC,
    )


@triton.jit
def backward_kernel(
    grad_output,  # [count] or []
    scores,  # as in forward, down to normalizer
    order,
    mask,
    u,
    v,
    cu_seqlens,
    lengths,
    top_k,
    weight,
    normalizer,
    list_loss,  # [count]
    saved,
    denominator,
    gradient,  # like scores, contiguous
    strides,  # and of grad_output, gradient (outer)
    numbers,
    count,
    size,
    slots,
    limit,
    PACKED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    CHUNKED: tl.constexpr,
    REDUCTION: tl.constexpr,
    ACC: tl.constexpr,
    LOWEST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = gradient_scale(denominator, normalizer, numbers, HAS_NORMALIZER, REDUCTION, ACC)
    weight_number = number(numbers, 0, ACC)
    column = tl.arange(0, BLOCK)[None, :]
    for group in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row, live = rows_of(group, count, ROWS)
        begin, n, width, k, _bad = lists_of(
            row, live, cu_seqlens, lengths, top_k, strides, count, size, limit, PACKED, HAS_LENGTHS, HAS_TOP_K
        )
        w = list_weight(weight, strides[10], weight_number, row, live, HAS_WEIGHT, ACC)
        of_list = tl.load(list_loss + row, mask=live, other=0.0)
        bad = of_list != of_list
        read = live & (w != 0) & (bad == 0)
        factor = tl.load(grad_output + row * strides[13], mask=live, other=0.0).to(ACC) * scale * w
        scores_of = scores + row * strides[0] + begin * strides[1]
        order_of = order + row * strides[2] + begin * strides[3]
        mask_of = mask + row * strides[4] + begin * strides[5]
        gradient_of = gradient + row * strides[14] + begin
        slot = row * slots + begin // BLOCK
        carry_max = tl.full([ROWS, 1], LOWEST, ACC)
        carry_sum = tl.zeros([ROWS, 1], ACC)
        carry_q = tl.zeros([ROWS, 1], ACC)
        before = tl.zeros([ROWS, 1], tl.int32)  # valid items in the chunks so far
        chunks = 1
        if CHUNKED:
            chunks = tl.cdiv(tl.max(tl.where(live, width, 0)), BLOCK)
        for chunk in range(0, chunks):
            place = chunk * BLOCK + column
            valid = valid_items(mask_of, strides[5], place, n, width, live, HAS_MASK)
            there = read & (place < n) if HAS_ORDER else read & valid
            _named, index = index_at(order_of, strides[3], place, there, width, HAS_ORDER)
            score = finite(score_at(scores_of, strides[1], index, there, LOWEST, ACC), LOWEST)
            if HAS_ORDER:
                there_before = read & (place >= 1) & (place <= n)
            else:
                there_before = valid_items(mask_of, strides[5], place - 1, n, width, read, HAS_MASK)
            _named_before, index_before = index_at(order_of, strides[3], place - 1, there_before, width, HAS_ORDER)
            score_before = score_at(scores_of, strides[1], index_before, there_before, LOWEST, ACC)
            if CHUNKED:
                onward = read & ((chunk + 1) * BLOCK < (width if HAS_MASK else n))
                carry_max = tl.load(saved + 2 * (slot + chunk), mask=onward, other=LOWEST)
                carry_sum = tl.load(saved + 2 * (slot + chunk) + 1, mask=onward, other=0.0)
            top, sum = suffixes(score, there, carry_max, carry_sum, LOWEST, CHUNKED, ACC)

            gap = finite(score_before, LOWEST) - top
            e = tl.exp(-tl.abs(gap))
            r = tl.where(gap > 0, sum * e, sum) / tl.where(gap > 0, sum * e + 1.0, sum + e)
            position = place
            if HAS_MASK and not HAS_ORDER:
                position = before + tl.cumsum(valid.to(tl.int32), axis=1) - 1
                before += tl.sum(valid.to(tl.int32), axis=1, keep_dims=True)
            stage = there & (position < k)
            u_here = stage.to(ACC)
            if HAS_U:
                u_at = row * strides[6] + (begin + position) * strides[7]
                u_here = tl.load(u + u_at, mask=stage, other=0).to(ACC)
            v_here = u_here
            if HAS_V:
                v_at = row * strides[8] + (begin + position) * strides[9]
                v_here = tl.load(v + v_at, mask=stage, other=0).to(ACC)
            scales, q = tl.associative_scan((r, u_here), 1, compose)
            if CHUNKED:
                q += scales * carry_q
                carry_q = at(q, column, BLOCK - 1)
            p = tl.exp(score - top) / tl.where(there, sum, 1.0)
            value = tl.where(there, factor * (p * q - v_here), 0.0)
            nothing = tl.where(valid & bad, float("nan"), 0.0)
            inside = live & (place < width)
            if HAS_ORDER:
                tl.store(gradient_of + index, value, mask=there)
                tl.store(gradient_of + place, nothing, mask=inside & ((valid & read) == 0))
            else:
                tl.store(gradient_of + place, tl.where(there, value, nothing), mask=inside)
