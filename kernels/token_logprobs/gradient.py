"""The gradient of the logits of token_logprobs in Triton; equations, decomposition and traffic stand in triton.py."""

from __future__ import annotations

import triton
import triton.language as tl
from rewardfuse.kernels.pairwise.triton import load_mask, load_operand, number
from rewardfuse.kernels.token_logprobs.triton import (
    FORWARD,
    LOG2E,
    NONE,
    REVERSE,
    cap,
    inverse_temperature,
    tanh,
    tile_offsets,
)


@triton.jit
def _origin(lse, item, inverse, ACC: tl.constexpr):
    """(center, 1/temperature, rest) with log softmax = (logit − center)/temperature − rest: the center next to the lse,
    so that nothing large is rounded after it was scaled."""
    z = tl.load(lse + item).to(tl.float64)
    center = (z / inverse).to(ACC)
    return center, inverse.to(ACC), (z - center * inverse).to(ACC)


@triton.jit
def _log_softmax(x, origin):
    return (x - origin[0]) * origin[1] - origin[2]


@triton.jit
def _slope(
    x,
    y,
    is_token,
    origin,  # as _origin() says
    ref_origin,
    softcap,
    coefficients,  # c0 … c3 and what the token's logit gets
    CAPPED: tl.constexpr,
    DIRECTION: tl.constexpr,
    LOGARITHMS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradient of a tile of logits x (reference y), but for 1/temperature."""
    c0, c1, c2, c3, of_token = coefficients
    x = x.to(ACC)
    bend = tl.zeros_like(x)
    if CAPPED:
        bend = tanh(x / softcap, ACC)
        x = softcap * bend
    log_pi = tl.minimum(_log_softmax(x, origin), 0.0)
    pi = tl.exp2(log_pi * LOG2E)
    slope = tl.zeros_like(x) + c0
    if LOGARITHMS:
        slope += c1 * log_pi
    if DIRECTION != NONE:
        log_rho = _log_softmax(cap(y, softcap, CAPPED, ACC), ref_origin)
    if DIRECTION == REVERSE:
        slope += tl.where(c2 == 0, 0.0, c2 * log_rho)  # of a KL that nobody asks for log ρ may be −inf
    if LOGARITHMS:
        slope = tl.where(pi == 0, 0.0, slope)
    slope = slope * pi
    if DIRECTION == FORWARD:
        slope += c3 * tl.exp2(log_rho * LOG2E)
    slope += tl.where(is_token, of_token, 0.0)
    if CAPPED:
        slope = slope * (1.0 - bend * bend)
    return slope


@triton.jit
def _coefficients(
    item,
    g_logprob,
    g_kl,
    g_entropy,
    kl,
    entropy,
    DIRECTION: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
):
    c0 = -g_logprob
    c1 = -g_entropy
    c2 = tl.zeros_like(c0)
    c3 = c2
    if HAS_ENTROPY:
        c0 -= g_entropy * tl.load(entropy + item).to(ACC)
    if DIRECTION == REVERSE:
        of_row = tl.load(kl + item).to(ACC)
        of_row = tl.where(of_row == float("inf"), float("nan"), of_row)
        c0 -= tl.where(g_kl == 0, 0.0, g_kl * of_row)
        c1 += g_kl
        c2 -= g_kl
    if DIRECTION == FORWARD:
        c0 += g_kl
        c3 -= g_kl
    return c0, c1, c2, c3, g_logprob


@triton.jit
def backward_kernel(
    grad_logprobs,  # [rows], strided, like the other two
    grad_kl,
    grad_entropy,
    logits,  # as in forward, down to temperature
    ref_logits,
    tokens,
    mask,
    temperature,
    kl,  # [rows]
    entropy,
    lse,
    ref_lse,
    gradient,  # [rows, size] contiguous
    strides,  # of the five inputs and the three gradients
    numbers,
    inner,
    size,
    vocab,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    CAPPED: tl.constexpr,
    DIRECTION: tl.constexpr,  # NONE where nobody asks for the gradient of KL
    ACC: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    BLOCK: tl.constexpr = VECTORS * THREADS * WIDTH
    LOGARITHMS: tl.constexpr = HAS_ENTROPY or DIRECTION == REVERSE
    item = tl.program_id(0).to(tl.int64)
    row = item // inner
    column = item % inner
    valid = load_mask(mask, strides[6], strides[7], row, column, item >= 0, HAS_MASK)
    out_row = gradient + item * size
    if WIDTH > 1:
        out_row = tl.multiple_of(out_row, 16)  # bytes
    offsets = tile_offsets(VECTORS, THREADS, WIDTH)
    end = size // WIDTH * WIDTH  # as in forward
    if valid:
        token = tl.load(tokens + row * strides[4] + column * strides[5]).to(tl.int64)
        token = tl.where((token >= 0) & (token < vocab), token, -1).to(tl.int32)  # −1: it stands in another tile
        inverse = inverse_temperature(
            temperature, strides[8], strides[9], row, column, number(numbers, 0, tl.float64), HAS_TEMPERATURE
        )
        softcap = number(numbers, 1, ACC)
        g_logprob = load_operand(grad_logprobs, strides[10], strides[11], 0.0, row, column, valid, HAS_LOGPROB, ACC)
        g_kl = load_operand(grad_kl, strides[12], strides[13], 0.0, row, column, valid, DIRECTION != NONE, ACC)
        g_entropy = load_operand(grad_entropy, strides[14], strides[15], 0.0, row, column, valid, HAS_ENTROPY, ACC)
        c = _coefficients(item, g_logprob, g_kl, g_entropy, kl, entropy, DIRECTION, HAS_ENTROPY, ACC)
        origin = _origin(lse, item, inverse, ACC)
        ref_origin = origin
        if DIRECTION != NONE:
            ref_origin = _origin(ref_lse, item, inverse, ACC)
        factor = tl.where(origin[0] == origin[0], origin[1], float("nan"))  # a broken row's gradient is NaN
        x_row = logits + row * strides[0] + column * strides[1]
        y_row = ref_logits + row * strides[2] + column * strides[3]
        if WIDTH > 1:
            x_row = tl.multiple_of(x_row, 16)
            y_row = tl.multiple_of(y_row, 16)
        whole = vocab // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            x = tl.load(x_row + start + offsets)
            y = x
            if DIRECTION != NONE:
                y = tl.load(y_row + start + offsets)
            is_token = offsets == token - start
            slope = _slope(x, y, is_token, origin, ref_origin, softcap, c, CAPPED, DIRECTION, LOGARITHMS, ACC)
            tl.store(out_row + start + offsets, (slope * factor).to(gradient.dtype.element_ty))
        for start in range(whole, end, BLOCK):
            place = start + offsets
            here = place < end
            x = tl.load(x_row + place, mask=here, other=0)
            y = x
            if DIRECTION != NONE:
                y = tl.load(y_row + place, mask=here, other=0)
            slope = _slope(x, y, place == token, origin, ref_origin, softcap, c, CAPPED, DIRECTION, LOGARITHMS, ACC)
            slope = tl.where(place < vocab, slope * factor, 0.0)
            tl.store(out_row + place, slope.to(gradient.dtype.element_ty), mask=here)
    else:
        zeros = tl.zeros([VECTORS, THREADS, WIDTH], gradient.dtype.element_ty)
        for start in range(0, end, BLOCK):
            tl.store(out_row + start + offsets, zeros, mask=start + offsets < end)
