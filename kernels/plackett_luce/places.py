"""What stands at each place of a ranking, and how runs of places join: the parts of the Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from rewardfuse.kernels.lists.triton import packed_bounds, padded_lengths


@triton.jit
def join(max_a, sum_a, max_b, sum_b):
    """log Σ e^s of two runs of positions, each as max + log(sum); of nothing: the lowest finite number and 0."""
    e = tl.exp(-tl.abs(max_a - max_b))
    return tl.maximum(max_a, max_b), tl.where(max_a > max_b, sum_a + sum_b * e, sum_a * e + sum_b)


@triton.jit
def compose(scale_a, shift_a, scale_b, shift_b):
    """The affine map a, then b."""
    return scale_a * scale_b, shift_a * scale_b + shift_b


@triton.jit
def mix(x):
    """A bijection whose sums tell multisets of indices apart: the end of splitmix64."""
    x = x.to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def at(values, column, place):
    return tl.sum(tl.where(column == place, values, 0), axis=1, keep_dims=True)


@triton.jit
def lists_of(
    row,
    live,
    cu_seqlens,
    lengths,
    top_k,
    strides,
    count,
    size,
    limit,
    PACKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
):
    """(begin, n, width, k, bad): where lists begin, their valid items, places and stages, and which cannot be."""
    if PACKED:
        begin, n, bad = packed_bounds(cu_seqlens, count, size, row, live)
        n = n.to(tl.int32)
        width = n
    else:
        begin = tl.zeros_like(row)
        n, bad = padded_lengths(lengths, strides[11], size, row, live, HAS_LENGTHS)
        n = n.to(tl.int32)
        width = tl.zeros_like(n) + size
    if HAS_TOP_K:
        k = tl.load(top_k + row * strides[12], mask=live, other=1).to(tl.int64)
        bad = bad | (k < 1)
        k = tl.minimum(k, n).to(tl.int32)
    else:
        k = tl.zeros_like(n) + limit
    return begin, n, width, k, bad


@triton.jit
def valid_items(mask, inner, place, n, width, live, HAS_MASK: tl.constexpr):
    """Which places of the lists hold a valid item."""
    if HAS_MASK:
        inside = live & (place >= 0) & (place < width)
        return inside & (tl.load(mask + place.to(tl.int64) * inner, mask=inside, other=0) != 0)
    else:
        return live & (place >= 0) & (place < n)


@triton.jit
def index_at(order, inner, place, there, width, HAS_ORDER: tl.constexpr):
    """The items at these places of the ranking: as the order has it, and so that it may be read."""
    if HAS_ORDER:
        index = tl.load(order + place.to(tl.int64) * inner, mask=there, other=0).to(tl.int64)
        return index, tl.minimum(tl.maximum(index, 0), width - 1).to(tl.int32)
    else:
        return place, place


@triton.jit
def score_at(scores, inner, index, there, LOWEST: tl.constexpr, ACC: tl.constexpr):
    return tl.where(there, tl.load(scores + index.to(tl.int64) * inner, mask=there, other=0).to(ACC), LOWEST)


@triton.jit
def finite(score, LOWEST: tl.constexpr):
    """A score whose differences are numbers."""
    return tl.where(score == float("-inf"), LOWEST, score)


@triton.jit
def suffixes(score, there, carry_max, carry_sum, LOWEST: tl.constexpr, CHUNKED: tl.constexpr, ACC: tl.constexpr):
    """L by place as (max, sum)."""
    top, sum = tl.associative_scan((finite(score, LOWEST), there.to(ACC)), 1, join, reverse=True)
    if CHUNKED:
        top, sum = join(top, sum, carry_max, carry_sum)
    return top, sum
