"""Log-probabilities of tokens, KL and entropy of rows of a vocabulary in Triton, and the gradient of the logits.

With p = softcap(logits)/temperature and q likewise of the reference, π = softmax(p), ρ = softmax(q):
logprob = p_token − lse p;  KL(π‖ρ) = Σ π (p − q) − lse p + lse q;  KL(ρ‖π) = Σ ρ (q − p) − lse q + lse p;
entropy = lse p − Σ π p. The gradient is (softcap'/temperature) · [π·(c0 + c1·log π + c2·log ρ) + c3·ρ + (j = token)·g].

Decomposition: a program a row, which it reads in tiles [VECTORS, THREADS, WIDTH]: a thread loads WIDTH neighbours at
once (16 bytes; one element where rows do not begin at 16-byte boundaries), VECTORS times before it uses any. It keeps
its own maxima and sums until the row ends, so that no thread waits for another. A row is not split over programs:
with fewer rows than multiprocessors, some of these are idle. launch.py chooses the tile.
Traffic: each logits tensor is read once each way, the gradient written once; of masked rows only zeros are written.
Backward reads the reference only for the gradient of KL. Arithmetic: one exponential an element and tensor; softcap
adds one, and a division. Precision: exponentials and the sums of a thread in float32 (float64 for float64), what
follows in float64. Differences to the maximum are taken before they are scaled: no finite logit overflows. An element
whose probability underflows beside its thread's largest counts as impossible: it adds nothing to KL or entropy.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rewardfuse.kernels.pairwise.triton import load_mask, load_operand, number

LOG2E = tl.constexpr(1.4426950408889634)
NONE, REVERSE, FORWARD = (tl.constexpr(code) for code in range(3))


@triton.jit
def tanh(x, ACC: tl.constexpr):
    """By e^{−2|x|} − 1, and that by its series where it would cancel."""
    y = tl.abs(x)
    near = y < 0.3
    z = tl.where(near, y * -2.0, 0.0)
    series = tl.zeros_like(x) + 1.0
    TERMS: tl.constexpr = 17 if tl.float64 == ACC else 9
    for k in tl.static_range(TERMS, 1, -1):
        series = 1.0 + series * z * (1.0 / k)
    expm1 = tl.where(near, z * series, tl.exp2(y * (-2.0 * LOG2E)) - 1.0)
    size = -expm1 / (2.0 + expm1)
    return tl.where(x < 0, -size, size)


@triton.jit
def cap(logits, softcap, CAPPED: tl.constexpr, ACC: tl.constexpr):
    x = logits.to(ACC)
    if CAPPED:
        x = softcap * tanh(x / softcap, ACC)
    return x


@triton.jit
def tile_offsets(VECTORS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Where the elements of a tile stand."""
    vector = tl.arange(0, VECTORS)[:, None, None]
    thread = tl.arange(0, THREADS)[None, :, None]
    return (vector * THREADS + thread) * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _tile_max(x):
    return tl.max(tl.max(x, axis=2), axis=0)  # both within a thread


@triton.jit
def _tile_sum(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _rise(old, new, scale):
    """(by, factor): old − new ≤ 0 of two maxima, and what sums relative to the old one are multiplied by."""
    by = tl.where(old == new, 0.0, old - new)
    return by, tl.exp2(by * scale)


@triton.jit
def _known(by, top):
    """By how much a maximum rose for a sum over both tensors. Where it was −inf, that sum is 0 or inf: no matter."""
    return tl.where(top == float("-inf"), 0.0, by)


@triton.jit
def _carry(sum, weight, by, factor):
    """Σ e^x·(x + …) after x has fallen by −`by`; `weight` is Σ e^x. What weighs nothing any more is gone, even inf."""
    return tl.where(factor == 0, 0.0, factor * (sum + weight * by))


@triton.jit
def _below(x, top):
    return x - tl.where(top == float("-inf"), 0.0, top)[None, :, None]


@triton.jit
def _weighted(e, x):
    return _tile_sum(e * tl.where(e == 0, 0.0, x))


@triton.jit
def _absorb(state, x, y, scale, DIRECTION: tl.constexpr, ENTROPY: tl.constexpr):
    """Takes a tile of logits x and reference logits y into what every thread keeps: its maxima `top` and `ref_top`,
    with d = x − top and ref d likewise `total` = Σ e^d and `ref_total`, `ents` = Σ e^d·d, and `kls` = Σ e^d·(d − ref d)
    or, forward, Σ e^{ref d}·(ref d − d)."""
    top, total, ents, ref_top, ref_total, kls = state
    new_top = tl.maximum(top, _tile_max(x))
    by, factor = _rise(top, new_top, scale)
    d = _below(x, new_top)
    e = tl.exp2(d * scale)
    if ENTROPY:
        ents = _carry(ents, total, by, factor) + _weighted(e, d)
    if DIRECTION != NONE:
        new_ref_top = tl.maximum(ref_top, _tile_max(y))
        ref_by, ref_factor = _rise(ref_top, new_ref_top, scale)
        ref_d = _below(y, new_ref_top)
        ref_e = tl.exp2(ref_d * scale)
        shift = _known(by, top) - _known(ref_by, ref_top)
        if DIRECTION == REVERSE:
            kls = _carry(kls, total, shift, factor) + _weighted(e, d - ref_d)
        else:
            kls = _carry(kls, ref_total, -shift, ref_factor) + _weighted(ref_e, ref_d - d)
        ref_total = ref_total * ref_factor + _tile_sum(ref_e)
        ref_top = new_ref_top
    total = total * factor + _tile_sum(e)
    return new_top, total, ents, ref_top, ref_total, kls


@triton.jit
def _meet(top, total, scale):
    """(maximum, sum relative to it, each thread's distance to it and factor); the sum in float64."""
    highest = tl.max(top)
    by, factor = _rise(top, highest, scale)
    return highest, tl.sum((total * factor).to(tl.float64)), by, factor


@triton.jit
def _put(ptr, row, value, valid):
    tl.store(ptr + row, tl.where(valid, value, 0.0).to(ptr.dtype.element_ty))


@triton.jit
def inverse_temperature(temperature, outer, inner, row, column, value, HAS: tl.constexpr):
    """In float64; NaN where it is not positive and finite."""
    t = load_operand(temperature, outer, inner, value, row, column, row >= 0, HAS, tl.float64)
    return tl.where((t > 0) & (t < float("inf")), 1.0 / t, float("nan"))


@triton.jit
def forward_kernel(
    logits,  # [rows, size], strided by row
    ref_logits,
    tokens,  # [rows], strided, like what follows
    mask,
    temperature,
    logprobs,  # [rows], like all outputs
    ref_logprobs,
    kl,
    entropy,
    lse,  # float64, like the next
    ref_lse,
    strides,  # of the five inputs: (outer, inner) each
    numbers,  # temperature, softcap
    inner,
    size,
    vocab,  # how many logits of a row are real
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    CAPPED: tl.constexpr,
    DIRECTION: tl.constexpr,
    ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    BLOCK: tl.constexpr = VECTORS * THREADS * WIDTH
    item = tl.program_id(0).to(tl.int64)
    row = item // inner
    column = item % inner
    valid = load_mask(mask, strides[6], strides[7], row, column, item >= 0, HAS_MASK)
    token = tl.load(tokens + row * strides[4] + column * strides[5], mask=valid, other=0).to(tl.int64)
    inverse = inverse_temperature(
        temperature, strides[8], strides[9], row, column, number(numbers, 0, tl.float64), HAS_TEMPERATURE
    )
    scale = (inverse * LOG2E).to(ACC)
    softcap = number(numbers, 1, ACC)
    x_row = logits + row * strides[0] + column * strides[1]
    y_row = ref_logits + row * strides[2] + column * strides[3]
    if WIDTH > 1:
        x_row = tl.multiple_of(x_row, 16)  # bytes
        y_row = tl.multiple_of(y_row, 16)
    offsets = tile_offsets(VECTORS, THREADS, WIDTH)
    nothing = tl.zeros([THREADS], ACC)
    nowhere = nothing + float("-inf")
    state = (nowhere, nothing, nothing, nowhere, nothing, nothing)
    n = tl.where(valid, vocab, 0)
    whole = n // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x_raw = tl.load(x_row + start + offsets)
        y_raw = x_raw
        if DIRECTION != NONE:
            y_raw = tl.load(y_row + start + offsets)
        x, y = cap(x_raw, softcap, CAPPED, ACC), cap(y_raw, softcap, CAPPED, ACC)
        state = _absorb(state, x, y, scale, DIRECTION, ENTROPY)
    if whole < n:
        place = whole + offsets
        here = place < size // WIDTH * WIDTH  # the same number, and tells that masks are alike within WIDTH
        live = place < n
        x_raw = tl.load(x_row + place, mask=here, other=0)
        y_raw = x_raw
        if DIRECTION != NONE:
            y_raw = tl.load(y_row + place, mask=here, other=0)
        x = tl.where(live, cap(x_raw, softcap, CAPPED, ACC), float("-inf"))
        y = tl.where(live, cap(y_raw, softcap, CAPPED, ACC), float("-inf"))
        state = _absorb(state, x, y, scale, DIRECTION, ENTROPY)

    top, total, ents, ref_top, ref_total, kls = state
    there = valid & (token >= 0) & (token < vocab)
    highest, z, by, factor = _meet(top, total, scale)
    # A row of −inf, and one whose token is not in the vocabulary, is NaN.
    log_z = tl.log(tl.where(there & (z > 0), z, float("nan")))
    chosen = cap(tl.load(x_row + token, mask=there, other=0), softcap, CAPPED, ACC)
    _put(logprobs, item, (chosen - highest) * inverse - log_z, valid)
    _put(lse, item, highest * inverse + log_z, valid)
    if ENTROPY:
        mean_d = tl.sum(_carry(ents, total, _known(by, top), factor).to(tl.float64)) / z
        _put(entropy, item, log_z - mean_d * inverse, valid)
    if DIRECTION != NONE:
        ref_highest, ref_z, ref_by, ref_factor = _meet(ref_top, ref_total, scale)
        ref_log_z = tl.log(tl.where(there & (ref_z > 0), ref_z, float("nan")))
        ref_chosen = cap(tl.load(y_row + token, mask=there, other=0), softcap, CAPPED, ACC)
        _put(ref_logprobs, item, (ref_chosen - ref_highest) * inverse - ref_log_z, valid)
        _put(ref_lse, item, ref_highest * inverse + ref_log_z, valid)
        shift = _known(by, top) - _known(ref_by, ref_top)
        if DIRECTION == REVERSE:
            mean_d = tl.sum(_carry(kls, total, shift, factor).to(tl.float64)) / z
            _put(kl, item, mean_d * inverse - log_z + ref_log_z, valid)
        else:
            mean_d = tl.sum(_carry(kls, ref_total, -shift, ref_factor).to(tl.float64)) / ref_z
            _put(kl, item, mean_d * inverse - ref_log_z + log_z, valid)
