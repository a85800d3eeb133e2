"""The Triton kernels of every op on pairs, around the maths that an op passes in; launch.py launches them.

Decomposition: a grid of at most eight programs a multiprocessor strides over blocks of pairs; partial sums meet as in
csrc/common/reduce.cuh, which explains the nonce. Traffic: as in pairwise/cuda.cuh. Precision: float32 maths (float64
for float64), sums in float64. A 16-bit value is cast when it is loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rewardfuse.ops._checks import REDUCTIONS

NONE, SUM, MEAN = (tl.constexpr(REDUCTIONS[name]) for name in ("none", "sum", "mean"))
BLOCK = 512
WARPS = 8  # four would spill under float64
SUMS = tl.constexpr(8)  # partial sums a program may leave


@triton.jit
def exp_nonpositive(x):
    return tl.exp(x)


@triton.jit
def log1p_unit(x, TERMS: tl.constexpr):
    """log(1 + x) for 0 ≤ x ≤ 1 as 2·atanh(x / (2 + x)); tl.log alone would lose small x."""
    s = x / (x + 2.0)
    s2 = s * s
    series = tl.zeros_like(x) + 1.0 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS - 1, -1, -1):
        series = series * s2 + 1.0 / (2 * k + 1)
    return 2.0 * s * series


@triton.jit
def number(numbers, k: tl.constexpr, ACC: tl.constexpr):
    """The k-th number. Triton passes a Python float as float32, so each comes as a sum of two."""
    return (tl.full([], 0.0, tl.float64) + numbers[k] + numbers[k + len(numbers) // 2]).to(ACC)


@triton.jit
def options_of(numbers, ACC: tl.constexpr):
    """The model's own numbers: the three of a preference model, the six of a KL estimate."""
    if len(numbers) == 14:
        return number(numbers, 4, ACC), number(numbers, 5, ACC), number(numbers, 6, ACC)
    else:
        return (
            number(numbers, 4, ACC),
            number(numbers, 5, ACC),
            number(numbers, 6, ACC),
            number(numbers, 7, ACC),
            number(numbers, 8, ACC),
            number(numbers, 9, ACC),
        )


@triton.jit
def load_scores(ptr, outer, inner, row, column, live, ACC: tl.constexpr):
    return tl.load(ptr + row * outer + column * inner, mask=live, other=0.0).to(ACC)


@triton.jit
def load_operand(ptr, outer, inner, value, row, column, live, HAS: tl.constexpr, ACC: tl.constexpr):
    """A per-item argument, or the number that stands for it."""
    if HAS:
        return tl.load(ptr + row * outer + column * inner, mask=live, other=0).to(ACC)
    else:
        return tl.zeros_like(row).to(ACC) + value


@triton.jit
def load_mask(ptr, outer, inner, row, column, live, HAS: tl.constexpr):
    if HAS:
        return live & (tl.load(ptr + row * outer + column * inner, mask=live, other=0) != 0)
    else:
        return live


@triton.jit
def publish(partials, k: tl.constexpr, value):
    """Leaves this program's k-th partial sum."""
    tl.store(partials + tl.program_id(0) * SUMS + k, value, cache_modifier=".cg")


@triton.jit
def wait_for_partials(flags, nonce, PROGRAMS: tl.constexpr):
    """Raises this program's flag; the last program waits for all of them, lowers them, and returns True."""
    last = tl.num_programs(0) - 1
    tl.debug_barrier()  # every thread's partials are written
    tl.atomic_xchg(flags + tl.program_id(0), nonce, sem="acq_rel")
    is_last = tl.program_id(0) == last
    if is_last:
        program = tl.arange(0, PROGRAMS)
        here = program <= last
        waiting = 1
        while waiting > 0:
            up = tl.atomic_add(flags + program, tl.zeros_like(program).to(tl.int64), mask=here, sem="acquire") == nonce
            waiting = tl.sum((here & (up == 0)).to(tl.int32))
        tl.debug_barrier()
        tl.store(flags + program, tl.zeros_like(program).to(tl.int64), mask=here)
    return is_last


@triton.jit
def total(partials, k: tl.constexpr, PROGRAMS: tl.constexpr):
    """Sum of all programs' k-th partial sums, in a fixed order."""
    program = tl.arange(0, PROGRAMS)
    here = program < tl.num_programs(0)
    return tl.sum(tl.load(partials + program * SUMS + k, mask=here, other=0.0, cache_modifier=".cg"))


@triton.jit
def mean(sum, count):
    return tl.where(count > 0, sum / tl.where(count > 0, count, 1.0), tl.where(count == 0, 0.0, float("nan")))


@triton.jit
def load_normalizer(ptr, value, otherwise, HAS: tl.constexpr):
    """A normalizer as float64; NaN where it is not positive; `otherwise` where none is given (value 0)."""
    if HAS:
        number = tl.load(ptr).to(tl.float64)
        return tl.where(number > 0, number, float("nan"))
    else:
        return tl.where(value == 0, otherwise, value)


@triton.jit
def forward_kernel(
    a,  # [items] rewards, strided
    b,
    p,  # [items], strided, or a number
    q,
    weight,
    mask,
    normalizer,  # []
    loss,  # [items] or []
    stats,  # [5]
    denominator,  # []
    strides,  # of a, b, p, q, weight, mask: (outer, inner) each
    numbers,  # p, weight, q, normalizer (0: none), the model's options
    items,
    inner,
    flags,
    partials,
    nonce,
    LOSS: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_Q: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    COUNTS: tl.constexpr,
    STATS: tl.constexpr,
    REDUCTION: tl.constexpr,
    ACC: tl.constexpr,
    TERMS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sum_loss = tl.zeros([BLOCK], tl.float64)
    sum_valid = tl.zeros([BLOCK], tl.float64)
    if STATS:
        sum_counted = tl.zeros([BLOCK], tl.float64)
        sum_correct = tl.zeros([BLOCK], tl.float64)
        sum_ties = tl.zeros([BLOCK], tl.float64)
        sum_a = tl.zeros([BLOCK], tl.float64)
        sum_b = tl.zeros([BLOCK], tl.float64)
    p_number = number(numbers, 0, ACC)
    weight_number = number(numbers, 1, ACC)
    q_number = number(numbers, 2, ACC)
    options = options_of(numbers, ACC)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first, items, step):
        item = start + tl.arange(0, BLOCK).to(tl.int64)
        live = item < items
        row = item // inner
        column = item % inner
        x = load_scores(a, strides[0], strides[1], row, column, live, ACC)
        y = load_scores(b, strides[2], strides[3], row, column, live, ACC)
        u = load_operand(p, strides[4], strides[5], p_number, row, column, live, HAS_P, ACC)
        v = load_operand(q, strides[6], strides[7], q_number, row, column, live, HAS_Q, ACC)
        w = load_operand(weight, strides[8], strides[9], weight_number, row, column, live, HAS_WEIGHT, ACC)
        valid = load_mask(mask, strides[10], strides[11], row, column, live, HAS_MASK)
        counted = valid & (w != 0)
        value = w * LOSS(x, y, u, v, *options, TERMS)
        value = tl.where(counted, value, 0.0)
        if REDUCTION == NONE:
            tl.store(loss + item, value, mask=live)
        sum_loss += value.to(tl.float64)
        sum_valid += valid.to(tl.float64)
        if STATS:
            sum_counted += counted.to(tl.float64)
            sum_correct += (counted & (x > y)).to(tl.float64)
            sum_ties += (counted & (x == y)).to(tl.float64)
            sum_a += tl.where(counted, x, 0.0).to(tl.float64)
            sum_b += tl.where(counted, y, 0.0).to(tl.float64)

    if (REDUCTION != NONE) or STATS:
        publish(partials, 0, tl.sum(sum_loss))
        publish(partials, 1, tl.sum(sum_valid))
        if STATS:
            publish(partials, 2, tl.sum(sum_counted))
            publish(partials, 3, tl.sum(sum_correct))
            publish(partials, 4, tl.sum(sum_ties))
            publish(partials, 5, tl.sum(sum_a))
            publish(partials, 6, tl.sum(sum_b))
        if wait_for_partials(flags, nonce, PROGRAMS):
            n_valid = total(partials, 1, PROGRAMS)
            if REDUCTION == SUM:
                tl.store(loss, total(partials, 0, PROGRAMS).to(ACC))
            if REDUCTION == MEAN:
                divisor = load_normalizer(normalizer, number(numbers, 3, tl.float64), n_valid, HAS_NORMALIZER)
                tl.store(loss, mean(total(partials, 0, PROGRAMS), divisor).to(ACC))
            if COUNTS:
                tl.store(denominator, n_valid)
            if STATS:
                n = total(partials, 2, PROGRAMS)
                of_a = total(partials, 5, PROGRAMS)
                of_b = total(partials, 6, PROGRAMS)
                tl.store(stats, mean(total(partials, 3, PROGRAMS), n).to(ACC))
                tl.store(stats + 1, mean(total(partials, 4, PROGRAMS), n).to(ACC))
                tl.store(stats + 2, mean(of_a - of_b, n).to(ACC))
                tl.store(stats + 3, mean(of_a, n).to(ACC))
                tl.store(stats + 4, mean(of_b, n).to(ACC))


@triton.jit
def backward_kernel(
    grad_output,  # [items], strided, or [] (strides 0)
    a,
    b,
    p,
    q,
    weight,
    mask,
    normalizer,
    denominator,  # [] float64
    grad_a,  # [items]
    grad_b,
    grad_p,  # [items] or []
    strides,  # of a, b, p, q, weight, mask, grad_output
    numbers,
    items,
    inner,
    flags,
    partials,
    nonce,
    GRADIENT: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_Q: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    COUNTS: tl.constexpr,
    REDUCTION: tl.constexpr,
    NEED_A: tl.constexpr,
    NEED_B: tl.constexpr,
    NEED_P: tl.constexpr,
    SUM_P: tl.constexpr,
    ACC: tl.constexpr,
    TERMS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    divisor = tl.full([], 1.0, tl.float64)
    if REDUCTION == MEAN:
        divisor = tl.full([], 1.0, tl.float64) * items
        if COUNTS:
            divisor = tl.load(denominator)
        divisor = load_normalizer(normalizer, number(numbers, 3, tl.float64), divisor, HAS_NORMALIZER)
    scale = mean(tl.full([], 1.0, tl.float64), divisor).to(ACC)
    sum_p = tl.zeros([BLOCK], tl.float64)
    p_number = number(numbers, 0, ACC)
    weight_number = number(numbers, 1, ACC)
    q_number = number(numbers, 2, ACC)
    options = options_of(numbers, ACC)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first, items, step):
        item = start + tl.arange(0, BLOCK).to(tl.int64)
        live = item < items
        row = item // inner
        column = item % inner
        x = load_scores(a, strides[0], strides[1], row, column, live, ACC)
        y = load_scores(b, strides[2], strides[3], row, column, live, ACC)
        u = load_operand(p, strides[4], strides[5], p_number, row, column, live, HAS_P, ACC)
        v = load_operand(q, strides[6], strides[7], q_number, row, column, live, HAS_Q, ACC)
        w = load_operand(weight, strides[8], strides[9], weight_number, row, column, live, HAS_WEIGHT, ACC)
        counted = load_mask(mask, strides[10], strides[11], row, column, live, HAS_MASK) & (w != 0)
        factor = load_scores(grad_output, strides[12], strides[13], row, column, live, ACC) * scale * w
        d_a, d_b, d_p = GRADIENT(x, y, u, v, *options, TERMS)
        d_p = tl.where(counted, factor * d_p, 0.0)
        if NEED_A:
            tl.store(grad_a + item, tl.where(counted, factor * d_a, 0.0), mask=live)
        if NEED_B:
            tl.store(grad_b + item, tl.where(counted, factor * d_b, 0.0), mask=live)
        if NEED_P and not SUM_P:
            tl.store(grad_p + item, d_p, mask=live)
        sum_p += d_p.to(tl.float64)
    if SUM_P:
        publish(partials, 0, tl.sum(sum_p))
        if wait_for_partials(flags, nonce, PROGRAMS):
            tl.store(grad_p, total(partials, 0, PROGRAMS).to(ACC))
