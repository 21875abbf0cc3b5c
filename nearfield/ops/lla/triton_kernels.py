"""The kernels: a forward that keeps one tile of queries on the chip from statistics to output, two backwards.

The equations are those of tiled.py. Rows are queries, columns keys; nothing is added atomically. Columns come
in tiles `[low, high)` that the tile's windows touch, and weights are made again from scores each time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(base, index, limit, stride, width, WIDTH: tl.constexpr):
    """[index, WIDTH] in float32, zero outside."""
    channel = tl.arange(0, WIDTH)
    inside = (index < limit)[:, None] & (channel < width)[None, :]
    at = base + index.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(base, x, index, limit, stride, width, WIDTH: tl.constexpr):
    channel = tl.arange(0, WIDTH)
    inside = (index < limit)[:, None] & (channel < width)[None, :]
    at = base + index.to(tl.int64)[:, None] * stride + channel[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _window(row, offset, num_queries, num_keys, kernel_size, CAUSAL: tl.constexpr, SHIFT: tl.constexpr):
    """[start, end) of the keys that rows see; empty for rows past the last."""
    token = row + offset
    if CAUSAL:
        start = token - kernel_size + 1
        end = token + 1
    else:
        start = token - kernel_size // 2
        if SHIFT:
            start = tl.maximum(tl.minimum(start, num_keys - kernel_size), 0)
        end = tl.minimum(start + kernel_size, num_keys)
    return tl.maximum(start, 0), tl.where(row < num_queries, end, 0)


@triton.jit
def _seen(column, start, end, key_mask, num_keys, HAS_MASK: tl.constexpr):
    seen = (start[:, None] <= column[None, :]) & (column[None, :] < end[:, None])
    if HAS_MASK:
        seen &= tl.load(key_mask + column, mask=column < num_keys, other=0)[None, :] != 0
    return seen


@triton.jit
def _weights(
    q, k, column, start, end, lse, key_mask, num_keys, scale, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr
):
    """Softmax weights of a tile, once the log-sum-exp is known."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    seen = _seen(column, start, end, key_mask, num_keys, HAS_MASK)
    return tl.where(seen, tl.exp(scores - lse[:, None]), 0.0)


@triton.jit
def _solve(
    q, key_mean, lse, rhs, ridge, key, key_stride, key_mask, start, end, low, high, num_keys, head_dim,
    max_iterations, tolerance, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Conjugate gradients of all rows in step, until each row is there or the iterations are used up."""
    x = tl.zeros_like(rhs)
    residual = rhs
    direction = rhs
    norm = tl.sum(rhs * rhs, 1)
    enough = norm * tolerance * tolerance
    active = norm > enough
    iteration = 0
    going = tl.max(active.to(tl.int32), 0)
    while (iteration < max_iterations) & (going > 0):
        level = tl.sum(direction * key_mean, 1)
        image = tl.zeros_like(rhs)
        rest = tl.zeros_like(norm)
        for first in range(low, high, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            k = _load(key, column, num_keys, key_stride, head_dim, D)
            p = _weights(q, k, column, start, end, lse, key_mask, num_keys, scale, HAS_MASK, PRECISION)
            along = p * (tl.dot(direction, tl.trans(k), input_precision=PRECISION) - level[:, None])
            rest += tl.sum(along, 1)
            image += tl.dot(along, k, input_precision=PRECISION)
        image += ridge[:, None] * direction - rest[:, None] * key_mean
        curvature = tl.sum(direction * image, 1)
        step = tl.where(active, norm / tl.where(active, curvature, 1.0), 0.0)
        x += step[:, None] * direction
        residual -= step[:, None] * image
        new = tl.sum(residual * residual, 1)
        turn = tl.where(active, new / tl.where(active, norm, 1.0), 0.0)
        direction = residual + turn[:, None] * direction
        norm = tl.where(active, new, norm)
        active = active & (new > enough)
        going = tl.max(active.to(tl.int32), 0)
        iteration += 1
    return x


@triton.jit
def forward(
    query, key, value, ridge, correction, key_mask, out, solved, lse_out, key_mean_out, value_mean_out,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    heads, group, num_queries, num_keys, head_dim, value_dim, kernel_size, max_iterations, tolerance, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, SHIFT: tl.constexpr, HAS_MASK: tl.constexpr, SOLVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: statistics online, the solve, the output."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    flat = (batch * num_queries) * heads + head  # of contiguous [B, N, H]; a row further is `heads` further
    offset = num_keys - num_queries
    start, end = _window(row, offset, num_queries, num_keys, kernel_size, CAUSAL, SHIFT)
    low = tl.min(start, 0)
    high = tl.max(end, 0)
    key += batch * k_batch + (head // group) * k_head
    value += batch * v_batch + (head // group) * v_head
    key_mask += batch * num_keys
    q = _load(query + batch * q_batch + head * q_head, row, num_queries, q_row, head_dim, D)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    key_mean = tl.zeros([BLOCK_M, D], tl.float32)
    value_mean = tl.zeros([BLOCK_M, DV], tl.float32)
    for first in range(low, high, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        k = _load(key, column, num_keys, k_row, head_dim, D)
        v = _load(value, column, num_keys, v_row, value_dim, DV)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = _seen(column, start, end, key_mask, num_keys, HAS_MASK)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        w = tl.exp(scores - base[:, None])
        shrink = tl.exp(top - base)
        top = higher
        total = total * shrink + tl.sum(w, 1)
        key_mean = key_mean * shrink[:, None] + tl.dot(w, k, input_precision=PRECISION)
        value_mean = value_mean * shrink[:, None] + tl.dot(w, v, input_precision=PRECISION)
    whole = tl.where(total == 0, 1.0, total)
    key_mean /= whole[:, None]
    value_mean /= whole[:, None]
    lse = tl.where(total == 0, 0.0, top + tl.log(whole))

    if SOLVE:
        rows = row < num_queries
        factor = tl.load(ridge + flat + row.to(tl.int64) * heads, mask=rows, other=1.0)
        r = _solve(
            q, key_mean, lse, key_mean - q, factor, key, k_row, key_mask, start, end, low, high, num_keys,
            head_dim, max_iterations, tolerance, scale, D, BLOCK_N, HAS_MASK, PRECISION,
        )  # fmt: skip
        _store(solved + flat * head_dim, r, row, num_queries, heads * head_dim, head_dim, D)
    else:
        r = _load(correction + flat * head_dim, row, num_queries, heads * head_dim, head_dim, D)

    level = tl.sum(r * key_mean, 1)
    rest = tl.zeros([BLOCK_M], tl.float32)
    along_values = tl.zeros([BLOCK_M, DV], tl.float32)
    for first in range(low, high, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        k = _load(key, column, num_keys, k_row, head_dim, D)
        v = _load(value, column, num_keys, v_row, value_dim, DV)
        p = _weights(q, k, column, start, end, lse, key_mask, num_keys, scale, HAS_MASK, PRECISION)
        along = p * (tl.dot(r, tl.trans(k), input_precision=PRECISION) - level[:, None])
        rest += tl.sum(along, 1)
        along_values += tl.dot(along, v, input_precision=PRECISION)
    result = value_mean * (1 + rest[:, None]) - along_values
    _store(out + flat * value_dim, result, row, num_queries, heads * value_dim, value_dim, DV)
    _store(key_mean_out + flat * head_dim, key_mean, row, num_queries, heads * head_dim, head_dim, D)
    _store(value_mean_out + flat * value_dim, value_mean, row, num_queries, heads * value_dim, value_dim, DV)
    lse = tl.where(total == 0, float("-inf"), lse)
    tl.store(lse_out + flat + row.to(tl.int64) * heads, lse, mask=row < num_queries)


@triton.jit
def backward_rows(
    query, key, value, grad, ridge, correction, key_mask, lse_in, key_mean_in, value_mean_in,
    d_query, d_ridge, result, levels,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    heads, group, num_queries, num_keys, num_rows, head_dim, value_dim, kernel_size,
    max_iterations, tolerance, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, SHIFT: tl.constexpr, HAS_MASK: tl.constexpr, SOLVE: tl.constexpr,
    DETACHED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The second solve, d query and d ridge. `result` is t, or d correction where nothing is solved; `levels`
    `[4, B, N, H]` are the row means of r k, g v, t k and of the scores' gradient, which the columns need."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = row < num_queries
    flat = (batch * num_queries) * heads + head
    here = flat + row.to(tl.int64) * heads
    offset = num_keys - num_queries
    start, end = _window(row, offset, num_queries, num_keys, kernel_size, CAUSAL, SHIFT)
    low = tl.min(start, 0)
    high = tl.max(end, 0)
    key += batch * k_batch + (head // group) * k_head
    value += batch * v_batch + (head // group) * v_head
    key_mask += batch * num_keys
    q = _load(query + batch * q_batch + head * q_head, row, num_queries, q_row, head_dim, D)
    g = _load(grad + flat * value_dim, row, num_queries, heads * value_dim, value_dim, DV)
    r = _load(correction + flat * head_dim, row, num_queries, heads * head_dim, head_dim, D)
    key_mean = _load(key_mean_in + flat * head_dim, row, num_queries, heads * head_dim, head_dim, D)
    value_mean = _load(value_mean_in + flat * value_dim, row, num_queries, heads * value_dim, value_dim, DV)
    lse = tl.load(lse_in + here, mask=rows, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)

    of_r = tl.sum(r * key_mean, 1)
    of_g = tl.sum(g * value_mean, 1)
    rest_r = tl.zeros([BLOCK_M], tl.float32)
    rest_g = tl.zeros([BLOCK_M], tl.float32)
    rhs = tl.zeros([BLOCK_M, D], tl.float32)
    for first in range(low, high, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        k = _load(key, column, num_keys, k_row, head_dim, D)
        v = _load(value, column, num_keys, v_row, value_dim, DV)
        p = _weights(q, k, column, start, end, lse, key_mask, num_keys, scale, HAS_MASK, PRECISION)
        e = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - of_g[:, None])
        rest_g += tl.sum(e, 1)
        rest_r += tl.sum(p * (tl.dot(r, tl.trans(k), input_precision=PRECISION) - of_r[:, None]), 1)
        rhs -= tl.dot(e, k, input_precision=PRECISION)
    rhs += rest_g[:, None] * key_mean
    of_r += rest_r
    of_g += rest_g
    if SOLVE:
        factor = tl.load(ridge + here, mask=rows, other=1.0)
        t = _solve(
            q, key_mean, lse, rhs, factor, key, k_row, key_mask, start, end, low, high, num_keys, head_dim,
            max_iterations, tolerance, scale, D, BLOCK_N, HAS_MASK, PRECISION,
        )  # fmt: skip
        _store(result + flat * head_dim, t, row, num_queries, heads * head_dim, head_dim, D)
        tl.store(d_ridge + here, -tl.sum(t * r, 1), mask=rows)
    else:
        t = tl.zeros_like(rhs)
        _store(result + flat * head_dim, rhs, row, num_queries, heads * head_dim, head_dim, D)
    of_t = tl.sum(t * key_mean, 1)

    mean = tl.zeros([BLOCK_M], tl.float32)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for first in range(low, high, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        k = _load(key, column, num_keys, k_row, head_dim, D)
        v = _load(value, column, num_keys, v_row, value_dim, DV)
        p = _weights(q, k, column, start, end, lse, key_mask, num_keys, scale, HAS_MASK, PRECISION)
        e = tl.dot(g, tl.trans(v), input_precision=PRECISION) - of_g[:, None]
        if SOLVE:
            e += tl.dot(t, tl.trans(k), input_precision=PRECISION) - of_t[:, None]
        e *= p * (1 - tl.dot(r, tl.trans(k), input_precision=PRECISION) + of_r[:, None])
        mean += tl.sum(e, 1)
        dq += tl.dot(e, k, input_precision=PRECISION)
    if DETACHED:
        mean = tl.zeros([BLOCK_M], tl.float32)
    dq = scale * (dq - mean[:, None] * key_mean) - t
    _store(d_query + flat * head_dim, dq, row, num_queries, heads * head_dim, head_dim, D)
    tl.store(levels + here, of_r, mask=rows)
    tl.store(levels + num_rows + here, of_g, mask=rows)
    tl.store(levels + 2 * num_rows + here, of_t, mask=rows)
    tl.store(levels + 3 * num_rows + here, mean, mask=rows)


@triton.jit
def backward_columns(
    query, key, value, grad, correction, solved, key_mask, lse_in, levels, d_key, d_value,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    heads, group, num_queries, num_keys, num_rows, head_dim, value_dim, kernel_size, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, SHIFT: tl.constexpr, HAS_MASK: tl.constexpr, SOLVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d key and d value of one tile of keys: over the heads that share it and the queries that see it."""
    kv_heads = heads // group
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    first_column = tl.program_id(0) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    last_column = tl.minimum(first_column + BLOCK_N, num_keys) - 1
    offset = num_keys - num_queries
    if CAUSAL:
        low = first_column - offset
        high = last_column + kernel_size - offset
    else:
        low = first_column + kernel_size // 2 - kernel_size + 1
        high = last_column + kernel_size // 2 + 1
        if SHIFT:
            low = tl.where(first_column < kernel_size, 0, low)
            high = tl.where(last_column >= num_keys - kernel_size, num_queries, high)
    low = tl.maximum(low, 0)
    high = tl.minimum(high, num_queries)
    k = _load(key + batch * k_batch + kv_head * k_head, column, num_keys, k_row, head_dim, D)
    v = _load(value + batch * v_batch + kv_head * v_head, column, num_keys, v_row, value_dim, DV)
    key_mask += batch * num_keys

    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        flat = (batch * num_queries) * heads + head
        for first in range(low, high, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            rows = row < num_queries
            here = flat + row.to(tl.int64) * heads
            q = _load(query + batch * q_batch + head * q_head, row, num_queries, q_row, head_dim, D)
            g = _load(grad + flat * value_dim, row, num_queries, heads * value_dim, value_dim, DV)
            r = _load(correction + flat * head_dim, row, num_queries, heads * head_dim, head_dim, D)
            lse = tl.load(lse_in + here, mask=rows, other=0.0)
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            of_r = tl.load(levels + here, mask=rows, other=0.0)
            of_g = tl.load(levels + num_rows + here, mask=rows, other=0.0)
            mean = tl.load(levels + 3 * num_rows + here, mask=rows, other=0.0)
            start, end = _window(row, offset, num_queries, num_keys, kernel_size, CAUSAL, SHIFT)
            p = _weights(q, k, column, start, end, lse, key_mask, num_keys, scale, HAS_MASK, PRECISION)
            s = p * (1 - tl.dot(r, tl.trans(k), input_precision=PRECISION) + of_r[:, None])
            e = tl.dot(g, tl.trans(v), input_precision=PRECISION) - of_g[:, None]
            if SOLVE:
                t = _load(solved + flat * head_dim, row, num_queries, heads * head_dim, head_dim, D)
                of_t = tl.load(levels + 2 * num_rows + here, mask=rows, other=0.0)
                e += tl.dot(t, tl.trans(k), input_precision=PRECISION) - of_t[:, None]
                dk += tl.dot(tl.trans(s), t, input_precision=PRECISION)
            scores = scale * (s * e - mean[:, None] * p)
            dk += tl.dot(tl.trans(scores), q, input_precision=PRECISION)
            dk -= tl.dot(tl.trans(p * e), r, input_precision=PRECISION)
            dv += tl.dot(tl.trans(s), g, input_precision=PRECISION)
    at = (batch * num_keys) * kv_heads + kv_head
    _store(d_key + at * head_dim, dk, column, num_keys, kv_heads * head_dim, head_dim, D)
    _store(d_value + at * value_dim, dv, column, num_keys, kv_heads * value_dim, value_dim, DV)
