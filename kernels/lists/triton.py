"""What the Triton kernels on lists share. A tile is [ROWS, BLOCK], that many items of that many lists; what is said of
a list is a column [ROWS, 1]."""

from __future__ import annotations

import triton
import triton.language as tl
from rewardfuse.kernels.pairwise.triton import (
    MEAN,
    NONE,
    SUM,
    load_normalizer,
    load_operand,
    mean,
    number,
    publish,
    total,
    wait_for_partials,
)


@triton.jit
def rows_of(group, count, ROWS: tl.constexpr):
    """The lists of a group, and which of them there are."""
    row = (group * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
    return row, row < count


@triton.jit
def padded_lengths(lengths, stride, size, row, live, HAS: tl.constexpr):
    """(items, bad): the length of each list, kept within its bounds, and whether it was beyond them."""
    if HAS:
        n = tl.load(lengths + row * stride, mask=live, other=0).to(tl.int64)
        return tl.minimum(tl.maximum(n, 0), size), (n < 0) | (n > size)
    else:
        n = tl.where(live, size, 0).to(tl.int64)
        return n, n != n


@triton.jit
def packed_bounds(cu_seqlens, count, total, row, live):
    """(begin, items, bad) of packed lists. Whatever the bounds, the lists' items stay within the scores; and the first
    begins at 0 and the last ends with the scores, so that every gradient is written."""
    begin = tl.load(cu_seqlens + row, mask=live, other=0)
    end = tl.load(cu_seqlens + row + 1, mask=live, other=0)
    first = tl.where(row == 0, 0, tl.minimum(tl.maximum(begin, 0), total))
    after = tl.where(row == count - 1, total, tl.minimum(tl.maximum(end, 0), total))
    bad = (begin < 0) | (end > total) | (end < begin)
    bad = bad | ((row == 0) & (begin != 0)) | ((row == count - 1) & (end != total))
    return first, tl.where(live, tl.maximum(after - first, 0), 0), bad & live


@triton.jit
def list_weight(weight, stride, value, row, live, HAS: tl.constexpr, ACC: tl.constexpr):
    return load_operand(weight, stride, 0, value, row, row, live, HAS, ACC)


@triton.jit
def weighted(value, weight, bad):
    """Loss of a list: 0 where the weight is, whatever was read, and NaN where the list is bad."""
    return tl.where(weight == 0, 0.0, tl.where(bad, float("nan"), weight * value))


@triton.jit
def reduce_lists(
    sum_loss,  # float64 [ROWS, 1], of this program
    sum_valid,  # lists that a mean counts, likewise
    loss,  # []
    denominator,  # [] float64
    normalizer,
    normalizer_number,
    flags,
    partials,
    nonce,
    HAS_NORMALIZER: tl.constexpr,
    REDUCTION: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The sum or mean over all programs' lists."""
    if REDUCTION != NONE:
        publish(partials, 0, tl.sum(sum_loss))
        publish(partials, 1, tl.sum(sum_valid))
        if wait_for_partials(flags, nonce, PROGRAMS):
            if REDUCTION == SUM:
                tl.store(loss, total(partials, 0, PROGRAMS).to(ACC))
            if REDUCTION == MEAN:
                counted = tl.maximum(total(partials, 1, PROGRAMS), 1.0)
                divisor = load_normalizer(normalizer, normalizer_number, counted, HAS_NORMALIZER)
                tl.store(loss, mean(total(partials, 0, PROGRAMS), divisor).to(ACC))
                tl.store(denominator, counted)


@triton.jit
def gradient_scale(
    denominator, normalizer, numbers, HAS_NORMALIZER: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr
):
    """d(loss)/d(a list's loss), but for grad_output."""
    divisor = tl.full([], 1.0, tl.float64)
    if REDUCTION == MEAN:
        divisor = tl.load(denominator)
        divisor = load_normalizer(normalizer, number(numbers, 1, tl.float64), divisor, HAS_NORMALIZER)
    return mean(tl.full([], 1.0, tl.float64), divisor).to(ACC)
