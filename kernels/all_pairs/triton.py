"""All pairs of a list in Triton: the mean of −log σ(s_i − s_j − margin·(y_i − y_j)) over pairs with y_i > y_j.

Decomposition: a program takes ROWS lists at a time and BLOCK items i of each, and runs over all j; nothing of the size
of the pairs is held. Forward counts a pair where i is its better item. Traffic: scores and labels are read once from
memory (K times from L1) each way, the gradient is written once; arithmetic is the limit. Precision: float32 (float64
for float64); runs of 16 pairs of an item are summed in it, runs and items in float64. Labels are compared as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rewardfuse.kernels.lists.triton import (
    gradient_scale,
    list_weight,
    padded_lengths,
    reduce_lists,
    rows_of,
    weighted,
)
from rewardfuse.kernels.pairwise.triton import NONE, exp_nonpositive, log1p_unit, number

BLOCK = 256
RUN = tl.constexpr(16)


@triton.jit
def _margin(margin, numbers, HAS: tl.constexpr, ACC: tl.constexpr):
    if HAS:
        return tl.load(margin).to(ACC)
    else:
        return number(numbers, 2, ACC)


@triton.jit
def _load(
    scores,
    labels,
    mask,
    strides,
    row,
    place,
    n,
    live,
    read,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
    LABEL: tl.constexpr,
):
    """(score, label, valid) of items of the lists; scores are read where `read` is."""
    valid = live & (place < n)
    if HAS_MASK:
        valid = valid & (tl.load(mask + row * strides[4] + place * strides[5], mask=valid, other=0) != 0)
    label = tl.load(labels + row * strides[2] + place * strides[3], mask=valid, other=0).to(LABEL)
    score = tl.load(scores + row * strides[0] + place * strides[1], mask=valid & read, other=0).to(ACC)
    return score, label, valid


@triton.jit
def _gap(s_i, y_i, s_j, y_j, margin, ACC: tl.constexpr):
    """By how much the better item of a pair leads, less the margin."""
    lead = tl.where(y_i > y_j, s_i - s_j, s_j - s_i)
    return lead - margin * tl.abs((y_i - y_j).to(ACC))


@triton.jit
def forward_kernel(
    scores,  # [count, size], strided, like all that follow
    labels,
    mask,
    lengths,  # [count]
    weight,  # [count] or a number
    margin,  # [] or a number
    normalizer,  # []
    loss,  # [count] or []
    list_loss,  # [count]
    pairs,  # [count]
    denominator,  # []
    strides,  # of scores, labels, mask: (outer, inner) each; of weight, lengths
    numbers,  # weight, normalizer (0: none), margin
    count,
    size,
    flags,
    partials,
    nonce,
    HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    REDUCTION: tl.constexpr,
    ACC: tl.constexpr,
    LABEL: tl.constexpr,
    TERMS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sum_loss = tl.zeros([ROWS, 1], tl.float64)
    sum_valid = tl.zeros([ROWS, 1], tl.float64)
    weight_number = number(numbers, 0, ACC)
    by = _margin(margin, numbers, HAS_MARGIN, ACC)
    for group in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row, live = rows_of(group, count, ROWS)
        n, bad = padded_lengths(lengths, strides[7], size, row, live, HAS_LENGTHS)
        w = list_weight(weight, strides[6], weight_number, row, live, HAS_WEIGHT, ACC)
        read = w != 0
        longest = tl.max(n)
        sum_list = tl.zeros([ROWS, 1], tl.float64)
        n_pairs = tl.zeros([ROWS, 1], tl.int64)
        unknown = tl.zeros([ROWS, 1], tl.int32)
        for start in range(0, longest, BLOCK):
            place = (start + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
            s_i, y_i, valid_i = _load(scores, labels, mask, strides, row, place, n, live, read, HAS_MASK, ACC, LABEL)
            unknown += tl.max((valid_i & (y_i != y_i)).to(tl.int32), axis=1, keep_dims=True)
            total = tl.zeros([ROWS, BLOCK], tl.float64)
            worse = tl.zeros([ROWS, BLOCK], tl.int64)
            for first in range(0, longest, RUN):
                run = tl.zeros([ROWS, BLOCK], ACC)
                for j in range(first, tl.minimum(first + RUN, longest)):
                    at = tl.zeros_like(row) + j
                    s_j, y_j, valid_j = _load(
                        scores, labels, mask, strides, row, at, n, live, read, HAS_MASK, ACC, LABEL
                    )
                    pair = valid_i & valid_j & (y_i > y_j)
                    z = _gap(s_i, y_i, s_j, y_j, by, ACC)
                    softplus = log1p_unit(exp_nonpositive(-tl.abs(z)), TERMS) + tl.where(z < 0, -z, 0.0)
                    run += tl.where(pair, softplus, 0.0)
                    worse += pair.to(tl.int64)
                total += run.to(tl.float64)
            sum_list += tl.sum(total, axis=1, keep_dims=True)
            n_pairs += tl.sum(worse, axis=1, keep_dims=True)
        of_list = n_pairs.to(tl.float64)
        value = weighted((sum_list / tl.maximum(of_list, 1.0)).to(ACC), w, bad | (unknown != 0))
        tl.store(pairs + row, of_list, mask=live)
        tl.store(list_loss + row, value, mask=live)
        if REDUCTION == NONE:
            tl.store(loss + row, value, mask=live)
        sum_loss += tl.where(live, value, 0.0).to(tl.float64)
        sum_valid += (live & (n_pairs > 0)).to(tl.float64)
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
    labels,
    mask,
    lengths,
    weight,
    margin,
    normalizer,
    list_loss,
    pairs,
    denominator,
    gradient,  # [count, size] contiguous
    strides,  # and of grad_output
    numbers,
    count,
    size,
    HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    REDUCTION: tl.constexpr,
    ACC: tl.constexpr,
    LABEL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = gradient_scale(denominator, normalizer, numbers, HAS_NORMALIZER, REDUCTION, ACC)
    weight_number = number(numbers, 0, ACC)
    by = _margin(margin, numbers, HAS_MARGIN, ACC)
    for group in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row, live = rows_of(group, count, ROWS)
        n, _bad = padded_lengths(lengths, strides[7], size, row, live, HAS_LENGTHS)
        w = list_weight(weight, strides[6], weight_number, row, live, HAS_WEIGHT, ACC)
        of_list = tl.load(list_loss + row, mask=live, other=0.0)
        bad = of_list != of_list
        read = (w != 0) & (bad == 0)
        n_pairs = tl.load(pairs + row, mask=live, other=0.0)
        share = tl.where(n_pairs > 0, 1.0 / tl.maximum(n_pairs, 1.0), 0.0).to(ACC)
        factor = tl.load(grad_output + row * strides[8], mask=live, other=0.0).to(ACC) * scale * w * share
        longest = tl.max(tl.where(read, n, 0))
        for start in range(0, size, BLOCK):
            place = (start + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
            s_i, y_i, valid_i = _load(scores, labels, mask, strides, row, place, n, live, read, HAS_MASK, ACC, LABEL)
            slope = tl.zeros([ROWS, BLOCK], ACC)
            for j in range(0, longest):
                at = tl.zeros_like(row) + j
                s_j, y_j, valid_j = _load(scores, labels, mask, strides, row, at, n, live, read, HAS_MASK, ACC, LABEL)
                pair = valid_i & valid_j & read & (y_i != y_j)
                z = _gap(s_i, y_i, s_j, y_j, by, ACC)
                e = exp_nonpositive(-tl.abs(z))
                against = tl.where(z < 0, 1.0, e) / (1.0 + e)  # σ(−z)
                slope += tl.where(pair, tl.where(y_i > y_j, -against, against), 0.0)
            value = tl.where(valid_i & bad, float("nan"), tl.where(slope == 0, 0.0, factor * slope))
            tl.store(gradient + row * size + place, value, mask=live & (place < size))
