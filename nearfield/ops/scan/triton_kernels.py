"""Kernels of selective scans for GPUs: a program takes L channels of one sequence through chunks of tokens.

Within a chunk of R tokens the states of one number n are an associative scan over pairs (decay, input), whose
products are at most 1: (a, b) then (c, d) is (a c, c b + d). Tensors of tokens have any strides but the last;
chunk states [chunks, channels, N], states and gradients of tables [sequences, channels, N] are contiguous and
in float32, like all arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    jit = triton.jit
else:  # the module still imports; nobody launches

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, never compiled."""
        return function


@jit
def follow(a, b, c, d):
    """One stretch of a recurrence after another: its decay and what it adds."""
    return a * c, c * b + d


@jit
def sequence_of(ends, T, reverse: tl.constexpr, HAS_ENDS: tl.constexpr, R: tl.constexpr):
    """Batch, first token in the order of the scan, direction, length, and number of the first chunk."""
    number = tl.program_id(1).to(tl.int64)
    if HAS_ENDS:
        begin, end = tl.load(ends + number), tl.load(ends + number + 1)
        batch, chunk = number * 0, begin // R + number
    else:
        begin, end = number * 0, number * 0 + T
        batch, chunk = number, number * T // R + number
    return batch, tl.where(reverse, end - 1, begin), tl.where(reverse, -1, 1), end - begin, chunk


@jit
def tile(x, batch_stride, stride, batch, token, inside, channels, present):
    """Rows `token` of x, zeros where not `inside` or not `present`, in float32."""
    place = batch * batch_stride + token[:, None] * stride + channels[None, :]
    return tl.load(x + place, mask=inside[:, None] & present[None, :], other=0.0).to(tl.float32)


@jit
def column(x, batch_stride, stride, batch, token, inside):
    """One number of each of the rows `token` of x."""
    return tl.load(x + batch * batch_stride + token * stride, mask=inside, other=0.0).to(tl.float32)


@jit
def save_tile(x, value, batch_stride, stride, batch, token, inside, channels, present):
    """The counterpart of `tile`."""
    place = batch * batch_stride + token[:, None] * stride + channels[None, :]
    tl.store(x + place, value.to(x.dtype.element_ty), mask=inside[:, None] & present[None, :])


@jit
def negative_exponential(x):
    """e^-|x|, which no argument makes overflow."""
    return tl.exp(-tl.abs(x))


@jit
def steps_of(dt, bias, inside, SOFTPLUS: tl.constexpr):
    """Step sizes, 0 where not `inside`: such a token leaves states as they are.

    log(1 + y) is 2 artanh(y / (2 + y)), by a series: for a small y the sum 1 + y would lose its digits.
    """
    step = dt + bias[None, :]
    if SOFTPLUS:
        y = negative_exponential(step)
        t = y / (y + 2.0)
        w = t * t
        p = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13))))))
        step = tl.maximum(step, 0.0) + 2.0 * t * p
    return tl.where(inside[:, None], step, 0.0)


@jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    y = negative_exponential(x)
    return tl.where(x < 0, y, 1.0) / (1.0 + y)


@jit
def of_state(table, states, n):
    """Row n of a table [N, L]."""
    return tl.sum(tl.where((states == n)[:, None], table, 0.0), 0)


@jit
def with_state(table, states, n, row):
    """The table with `row` as its row n."""
    return tl.where((states == n)[:, None], row[None, :], table)


@jit
def row_of(value, rows, number):
    """One row of a tile [R, L]."""
    return tl.sum(tl.where((rows == number)[:, None], value, 0.0), 0)


@jit
def load_table(x, row, channels, present, states, N, C):
    """[N, L] of row `row` of x [rows, C, N]."""
    place = (row * C + channels[None, :]) * N + states[:, None]
    return tl.load(x + place, mask=present[None, :] & (states < N)[:, None], other=0.0)


@jit
def save_table(x, value, row, channels, present, states, N, C):
    """The counterpart of `load_table`."""
    place = (row * C + channels[None, :]) * N + states[:, None]
    tl.store(x + place, value, mask=present[None, :] & (states < N)[:, None])


@jit
def block_of(C, G, L: tl.constexpr):
    """Group, channels and which of them are there, of this program."""
    width = C // G
    blocks = tl.cdiv(width, L)
    group = tl.program_id(0) // blocks
    inside = tl.program_id(0) % blocks * L + tl.arange(0, L)
    return group, group * width + inside, inside < width


@jit
def scan_kernel(
    x, dt, A, B, C_, D, z, bias, initial, ends, out, final, kept,
    x_batch, x_token, dt_batch, dt_token, B_batch, B_token, B_group, C_batch, C_token, C_group,
    z_batch, z_token, T, C, G, N,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_ENDS: tl.constexpr, KEEP: tl.constexpr,
    R: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Outputs, last states and, with KEEP, those at the starts of chunks. W is N up to a power of two."""
    group, channels, present = block_of(C, G, L)
    batch, first, way, length, chunk = sequence_of(ends, T, REVERSE, HAS_ENDS, R)
    states, rows = tl.arange(0, W), tl.arange(0, R)
    table = load_table(A, 0, channels, present, states, N, C) * 1.4426950408889634
    h = tl.zeros((W, L), tl.float32)
    if HAS_INITIAL:
        h = load_table(initial, tl.program_id(1).to(tl.int64), channels, present, states, N, C)
    offset, skip = tl.zeros((L,), tl.float32), tl.zeros((L,), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channels, mask=present, other=0.0)
    if HAS_D:
        skip = tl.load(D + channels, mask=present, other=0.0)
    for start in range(0, length, R):
        if KEEP:
            save_table(kept, h, chunk, channels, present, states, N, C)
            chunk += 1
        inside = start + rows < length
        token = first + way * (start + rows).to(tl.int64)
        u = tile(x, x_batch, x_token, batch, token, inside, channels, present)
        step = tile(dt, dt_batch, dt_token, batch, token, inside, channels, present)
        step = steps_of(step, offset, inside, SOFTPLUS)
        y = u * skip[None, :]
        for n in range(N):
            b = column(B + group * B_group + n, B_batch, B_token, batch, token, inside)
            c = column(C_ + group * C_group + n, C_batch, C_token, batch, token, inside)
            decay = tl.exp2(step * of_state(table, states, n)[None, :])
            decay, added = tl.associative_scan((decay, step * u * b[:, None]), 0, follow)
            state = decay * of_state(h, states, n)[None, :] + added
            y += state * c[:, None]
            h = with_state(h, states, n, row_of(state, rows, R - 1))
        if HAS_Z:
            gate = tile(z, z_batch, z_token, batch, token, inside, channels, present)
            y *= gate * sigmoid(gate)
        save_tile(out, y, tl.cast(T, tl.int64) * C, C, batch, token, inside, channels, present)
    save_table(final, h, tl.program_id(1).to(tl.int64), channels, present, states, N, C)


@jit
def scan_backward_kernel(
    x, dt, A, B, C_, D, z, bias, ends, kept, grad, grad_final,
    grad_x, grad_dt, grad_z, grad_B, grad_C, grad_A, grad_D, grad_bias, grad_initial,
    x_batch, x_token, dt_batch, dt_token, B_batch, B_token, B_group, C_batch, C_token, C_group,
    z_batch, z_token, grad_batch, grad_token, T, C, G, N,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_ENDS: tl.constexpr,
    R: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """All gradients, chunks from the last to the first.

    Those of B and C are this block's share [blocks, batch, T, N], those of tables this sequence's.
    """
    group, channels, present = block_of(C, G, L)
    batch, first, way, length, chunk = sequence_of(ends, T, REVERSE, HAS_ENDS, R)
    sequence = tl.program_id(1).to(tl.int64)
    states, rows = tl.arange(0, W), tl.arange(0, R)
    table = load_table(A, 0, channels, present, states, N, C) * 1.4426950408889634
    carried, grad_table = tl.zeros((W, L), tl.float32), tl.zeros((W, L), tl.float32)
    if HAS_FINAL:
        carried = load_table(grad_final, sequence, channels, present, states, N, C)
    offset, skip = tl.zeros((L,), tl.float32), tl.zeros((L,), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channels, mask=present, other=0.0)
    if HAS_D:
        skip = tl.load(D + channels, mask=present, other=0.0)
    skip_sum, bias_sum = tl.zeros((L,), tl.float32), tl.zeros((L,), tl.float32)
    batches = 1
    if not HAS_ENDS:
        batches = tl.num_programs(1)
    share = (tl.program_id(0).to(tl.int64) * batches + batch) * T * N  # the block's own rows
    chunks = tl.cdiv(length, R)
    for back in range(chunks):
        start = (chunks - 1 - back) * R
        inside = start + rows < length
        before, after = inside & (rows > 0), inside & (rows < R - 1) & (start + rows + 1 < length)
        token = first + way * (start + rows).to(tl.int64)
        h = load_table(kept, chunk + chunks - 1 - back, channels, present, states, N, C)
        u = tile(x, x_batch, x_token, batch, token, inside, channels, present)
        raw = tile(dt, dt_batch, dt_token, batch, token, inside, channels, present)
        step = steps_of(raw, offset, inside, SOFTPLUS)
        u_before = tile(x, x_batch, x_token, batch, token - way, before, channels, present)
        step_before = tile(dt, dt_batch, dt_token, batch, token - way, before, channels, present)
        step_before = steps_of(step_before, offset, before, SOFTPLUS)
        step_after = tile(dt, dt_batch, dt_token, batch, token + way, after, channels, present)
        step_after = steps_of(step_after, offset, after, SOFTPLUS)
        pull = tile(grad, grad_batch, grad_token, batch, token, inside, channels, present)
        gated = pull
        if HAS_Z:
            gate = tile(z, z_batch, z_token, batch, token, inside, channels, present)
            gated = pull * gate * sigmoid(gate)
        y = u * skip[None, :]
        to_input, to_step = tl.zeros((R, L), tl.float32), tl.zeros((R, L), tl.float32)
        for n in range(N):
            b_at, c_at = B + group * B_group + n, C_ + group * C_group + n
            b = column(b_at, B_batch, B_token, batch, token, inside)
            c = column(c_at, C_batch, C_token, batch, token, inside)
            b_before = column(b_at, B_batch, B_token, batch, token - way, before)
            exponent = of_state(table, states, n)[None, :]
            decay = tl.exp2(step_before * exponent)
            decay, added = tl.associative_scan((decay, step_before * u_before * b_before[:, None]), 0, follow)
            decayed = (decay * of_state(h, states, n)[None, :] + added) * tl.exp2(step * exponent)
            state = decayed + step * u * b[:, None]
            y += state * c[:, None]
            decay = tl.exp2(step_after * exponent)
            decay, added = tl.associative_scan((decay, gated * c[:, None]), 0, follow, reverse=True)
            pulled = decay * of_state(carried, states, n)[None, :] + added
            place = share + token * N + n
            tl.store(grad_B + place, tl.sum(pulled * step * u, 1), mask=inside)
            tl.store(grad_C + place, tl.sum(gated * state, 1), mask=inside)
            to_input += pulled * b[:, None]
            change = pulled * decayed
            to_step += change * exponent
            old = of_state(grad_table, states, n)
            grad_table = with_state(grad_table, states, n, old + tl.sum(change * step, 0))
            passed = pulled * tl.exp2(step * exponent)
            carried = with_state(carried, states, n, row_of(passed, rows, 0))
        to_step = to_step * 0.6931471805599453 + to_input * u
        if SOFTPLUS:
            to_step *= sigmoid(raw + offset[None, :])
        if HAS_Z:
            s = sigmoid(gate)
            grad_gate = pull * y * s * (1.0 + gate * (1.0 - s))
            save_tile(grad_z, grad_gate, tl.cast(T, tl.int64) * C, C, batch, token, inside, channels, present)
        grad_u = to_input * step + gated * skip[None, :]
        save_tile(grad_x, grad_u, tl.cast(T, tl.int64) * C, C, batch, token, inside, channels, present)
        save_tile(grad_dt, to_step, tl.cast(T, tl.int64) * C, C, batch, token, inside, channels, present)
        skip_sum += tl.sum(gated * u, 0)
        bias_sum += tl.sum(tl.where(inside[:, None], to_step, 0.0), 0)
    save_table(grad_initial, carried, sequence, channels, present, states, N, C)
    save_table(grad_A, grad_table, sequence, channels, present, states, N, C)
    tl.store(grad_D + sequence * C + channels, skip_sum, mask=present)
    tl.store(grad_bias + sequence * C + channels, bias_sum, mask=present)
