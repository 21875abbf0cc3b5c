"""Kernels of linear attention for GPUs, in chunks of C tokens: states, scores, outputs, and their gradients.

Tensors of tokens are [B, T, heads, channels] with any strides but the last; what lies between kernels is
contiguous and in float32: states [B, H, N + 1, K, V] before and after N chunks, and scores [B, H, N, C, C].
KIND is 0 without decay, 1 with one a head, 2 with one a channel. No factor is above 1; `decay.py` says how.
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
def load(x, stride, first, rows, T, columns, width):
    """Rows `first + rows` of x [T, width], zeros beyond, in float32."""
    t = first + rows
    inside = (t < T)[:, None] & (columns < width)[None, :]
    place = t[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@jit
def load_column(x, stride, first, rows, last):
    """Entries `first + rows` of x below `last`, zeros beyond, in float32."""
    t = first + rows
    return tl.load(x + t.to(tl.int64) * stride, mask=t < last, other=0.0).to(tl.float32)


@jit
def save(x, value, first, rows, T, stride, columns, width):
    """Write rows `first + rows` of x [T, width]."""
    t = first + rows
    inside = (t < T)[:, None] & (columns < width)[None, :]
    place = t[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(x + place, value.to(x.dtype.element_ty), mask=inside)


@jit
def factors(g, stride, first, rows, T, columns, width, KIND: tl.constexpr, C: tl.constexpr):
    """What a state before the chunk has decayed by at each token, and each token's key at the end."""
    end = tl.minimum(first + C, T)
    if KIND == 1:
        into = tl.exp(tl.cumsum(load_column(g, stride, first, rows, end), 0))[:, None]
        out_of = tl.exp(tl.cumsum(load_column(g, stride, first + 1, rows, end), 0, reverse=True))[:, None]
    else:
        into = tl.exp(tl.cumsum(load(g, stride, first, rows, end, columns, width), 0))
        out_of = tl.exp(tl.cumsum(load(g, stride, first + 1, rows, end, columns, width), 0, reverse=True))
    return into, out_of


@jit
def whole_factor(g, stride, first, rows, T, columns, width, KIND: tl.constexpr):
    """What a state decays by in the chunk, for each of `columns`."""
    if KIND == 1:
        return tl.exp(tl.sum(load_column(g, stride, first, rows, T), 0)) + 0.0 * columns
    return tl.exp(tl.sum(load(g, stride, first, rows, T, columns, width), 0))


@jit
def fading(g, stride, first, rows, T):
    """[C, C]: what key s has decayed by at query t, if there is one decay a head; 0 for s > t."""
    steps = load_column(g, stride, first, rows, T)
    after = rows[:, None] > rows[None, :]
    sums = tl.cumsum(tl.where(after, steps[:, None], 0.0), 0)
    return tl.where(rows[:, None] >= rows[None, :], tl.exp(sums), 0.0)


@jit
def sides(rows, level):
    """Which tokens come after the middle of their block of 2^(level + 1) [C, 1]; pairs across it [C, C]."""
    is_after, block = (rows >> level) & 1, rows >> (level + 1)
    pairs = (block[:, None] == block[None, :]) & (is_after[:, None] > is_after[None, :])
    return (is_after == 1)[:, None], pairs


@jit
def middle_factors(steps, rows, level):
    """[C, K]: decays between each token and the middle of its block; and which steps those are."""
    middle = (((rows >> (level + 1)) * 2 + 1) << level) - 1
    low, high = tl.minimum(rows, middle), tl.maximum(rows, middle)
    between = (rows[None, :] > low[:, None]) & (rows[None, :] <= high[:, None])
    between = between.to(tl.float32)  # sums as a product with 0 and 1: of one sign, so nothing cancels
    return between, tl.exp(tl.dot(between, steps, input_precision="ieee"))


@jit
def pair_scores(
    q, k, g, sq, sk, sg, first, rows, T, K,
    KIND: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[C, C]: q_t k_s, as far as it has decayed, for s <= t."""
    scores = tl.zeros([C, C], tl.float32)
    for start in range(0, K, BK):
        columns = start + tl.arange(0, BK)
        queries = load(q, sq, first, rows, T, columns, K)
        keys = load(k, sk, first, rows, T, columns, K)
        if KIND == 2:
            steps = load(g, sg, first, rows, T, columns, K)
            own = tl.sum(queries * keys, 1)
            scores += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
            for level in range(LEVELS):
                is_after, pairs = sides(rows, level)
                _, factor = middle_factors(steps, rows, level)
                after = tl.where(is_after, queries * factor, 0.0)
                before = tl.where(is_after, 0.0, keys * factor)
                product = tl.dot(after, tl.trans(before), input_precision=PRECISION)
                scores += tl.where(pairs, product, 0.0)
        else:
            scores += tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if KIND == 1:
        scores *= fading(g, sg, first, rows, T)
    return tl.where(rows[:, None] >= rows[None, :], scores, 0.0)


@jit
def scores_kernel(
    q, k, g, out, qb, qt, qh, kb, kt, kh, gb, gt, gh, T, H, GROUP, K, N,
    KIND: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the queries with the keys of their chunk."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, rows = head // H, head % H, tl.arange(0, C)
    found = pair_scores(
        q + b * qb + h * qh, k + b * kb + h // GROUP * kh, g + b * gb + h * gh,
        qt, kt, gt, chunk * C, rows, T, K, KIND, C, LEVELS, BK, PRECISION,
    )  # fmt: skip
    tl.store(out + (head * N + chunk) * C * C + rows[:, None] * C + rows[None, :], found)


@jit
def states_kernel(
    k, v, g, initial, states, kb, kt, kh, vb, vt, vh, gb, gt, gh, T, H, GROUP, K, V, N,
    KIND: tl.constexpr, HAS_INITIAL: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The states before every chunk and after the last."""
    head = tl.program_id(2).to(tl.int64)
    b, h, rows = head // H, head % H, tl.arange(0, C)
    ks, vs = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    g += b * gb + h * gh
    place = ks[:, None] * V + vs[None, :]
    inside = (ks < K)[:, None] & (vs < V)[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + head * K * V + place, mask=inside, other=0.0)
    for chunk in range(N):
        tl.store(states + (head * (N + 1) + chunk) * K * V + place, state, mask=inside)
        keys = load(k, kt, chunk * C, rows, T, ks, K)
        values = load(v, vt, chunk * C, rows, T, vs, V)
        if KIND > 0:
            _, out_of = factors(g, gt, chunk * C, rows, T, ks, K, KIND, C)
            keys *= out_of
            state *= whole_factor(g, gt, chunk * C, rows, T, ks, K, KIND)[:, None]
        state += tl.dot(tl.trans(keys), values, input_precision=PRECISION)
    tl.store(states + (head * (N + 1) + N) * K * V + place, state, mask=inside)


@jit
def outputs_kernel(
    q, v, g, scores, states, out, qb, qt, qh, vb, vt, vh, gb, gt, gh, T, H, GROUP, K, V, N, scale,
    KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each query reads: from its chunk by scores, from before by the state."""
    chunk, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h, rows = head // H, head % H, tl.arange(0, C)
    vs = tl.program_id(0) * BV + tl.arange(0, BV)
    q += b * qb + h * qh
    g += b * gb + h * gh
    values = load(v + b * vb + h // GROUP * vh, vt, chunk * C, rows, T, vs, V)
    pairs = tl.load(scores + (head * N + chunk) * C * C + rows[:, None] * C + rows[None, :])
    found = tl.dot(pairs, values, input_precision=PRECISION)
    for start in range(0, K, BK):
        ks = start + tl.arange(0, BK)
        queries = load(q, qt, chunk * C, rows, T, ks, K)
        if KIND > 0:
            into, _ = factors(g, gt, chunk * C, rows, T, ks, K, KIND, C)
            queries *= into
        inside = (ks < K)[:, None] & (vs < V)[None, :]
        state = tl.load(
            states + (head * (N + 1) + chunk) * K * V + ks[:, None] * V + vs[None, :], mask=inside, other=0.0
        )
        found += tl.dot(queries, state, input_precision=PRECISION)
    save(out + (b * T * H + h) * V, found * scale, chunk * C, rows, T, H * V, vs, V)


@jit
def state_gradients_kernel(
    q, grad, g, grad_last, after, first, qb, qt, qh, ob, ot, oh, gb, gt, gh, T, H, K, V, N, scale,
    KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the states after every chunk and before the first."""
    head = tl.program_id(2).to(tl.int64)
    b, h, rows = head // H, head % H, tl.arange(0, C)
    ks, vs = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    q += b * qb + h * qh
    grad += b * ob + h * oh
    g += b * gb + h * gh
    place = ks[:, None] * V + vs[None, :]
    inside = (ks < K)[:, None] & (vs < V)[None, :]
    state = tl.load(grad_last + head * K * V + place, mask=inside, other=0.0)
    for back in range(N):
        chunk = N - 1 - back
        tl.store(after + (head * (N + 1) + chunk) * K * V + place, state, mask=inside)
        queries = load(q, qt, chunk * C, rows, T, ks, K) * scale
        pull = load(grad, ot, chunk * C, rows, T, vs, V)
        if KIND > 0:
            into, _ = factors(g, gt, chunk * C, rows, T, ks, K, KIND, C)
            queries *= into
            state *= whole_factor(g, gt, chunk * C, rows, T, ks, K, KIND)[:, None]
        state += tl.dot(tl.trans(queries), pull, input_precision=PRECISION)
    tl.store(first + head * K * V + place, state, mask=inside)


@jit
def value_gradients_kernel(
    k, grad, g, scores, after, out, kb, kt, kh, ob, ot, oh, gb, gt, gh, T, H, GROUP, K, V, N, scale,
    KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the values, for each query head."""
    chunk, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h, rows = head // H, head % H, tl.arange(0, C)
    vs = tl.program_id(0) * BV + tl.arange(0, BV)
    k += b * kb + h // GROUP * kh
    g += b * gb + h * gh
    pull = load(grad + b * ob + h * oh, ot, chunk * C, rows, T, vs, V)
    pairs = tl.load(scores + (head * N + chunk) * C * C + rows[:, None] * C + rows[None, :])
    found = tl.dot(tl.trans(pairs), pull, input_precision=PRECISION) * scale
    for start in range(0, K, BK):
        ks = start + tl.arange(0, BK)
        keys = load(k, kt, chunk * C, rows, T, ks, K)
        if KIND > 0:
            _, out_of = factors(g, gt, chunk * C, rows, T, ks, K, KIND, C)
            keys *= out_of
        inside = (ks < K)[:, None] & (vs < V)[None, :]
        state = tl.load(
            after + (head * (N + 1) + chunk) * K * V + ks[:, None] * V + vs[None, :], mask=inside, other=0.0
        )
        found += tl.dot(keys, state, input_precision=PRECISION)
    save(out + (b * T * H + h) * V, found, chunk * C, rows, T, H * V, vs, V)


@jit
def score_gradients_kernel(
    v, grad, out, vb, vt, vh, ob, ot, oh, T, H, GROUP, V, N, scale,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, rows = head // H, head % H, tl.arange(0, C)
    v += b * vb + h // GROUP * vh
    grad += b * ob + h * oh
    found = tl.zeros([C, C], tl.float32)
    for start in range(0, V, BV):
        vs = start + tl.arange(0, BV)
        pull = load(grad, ot, chunk * C, rows, T, vs, V)
        values = load(v, vt, chunk * C, rows, T, vs, V)
        found += tl.dot(pull, tl.trans(values), input_precision=PRECISION)
    found = tl.where(rows[:, None] >= rows[None, :], found * scale, 0.0)
    tl.store(out + (head * N + chunk) * C * C + rows[:, None] * C + rows[None, :], found)


@jit
def gradients_kernel(
    q, k, v, g, grad, d_scores, states, after, dq, dk, dg,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh, ob, ot, oh, T, H, GROUP, K, V, N, scale,
    KIND: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and log decays in a block of channels; keys' for each query head.

    With one decay a head, dg [blocks, B, T, H] holds what each block of channels adds to its gradient.
    """
    chunk, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h, rows = head // H, head % H, tl.arange(0, C)
    ks = tl.program_id(0) * BK + tl.arange(0, BK)
    first = chunk * C
    g += b * gb + h * gh
    queries = load(q + b * qb + h * qh, qt, first, rows, T, ks, K)
    keys = load(k + b * kb + h // GROUP * kh, kt, first, rows, T, ks, K)
    v += b * vb + h // GROUP * vh
    grad += b * ob + h * oh
    d_pairs = tl.load(d_scores + (head * N + chunk) * C * C + rows[:, None] * C + rows[None, :])

    dq_in = tl.zeros([C, BK], tl.float32)  # through the state before
    dk_out = tl.zeros([C, BK], tl.float32)  # through the state after
    d_whole = tl.zeros([BK], tl.float32)
    for start in range(0, V, BV):
        vs = start + tl.arange(0, BV)
        inside = (ks < K)[:, None] & (vs < V)[None, :]
        place = (head * (N + 1) + chunk) * K * V + ks[:, None] * V + vs[None, :]
        state = tl.load(states + place, mask=inside, other=0.0)
        d_state = tl.load(after + place, mask=inside, other=0.0)
        dq_in += tl.dot(load(grad, ot, first, rows, T, vs, V), tl.trans(state), input_precision=PRECISION)
        dk_out += tl.dot(load(v, vt, first, rows, T, vs, V), tl.trans(d_state), input_precision=PRECISION)
        d_whole += tl.sum(state * d_state, 1)
    dq_in *= scale

    if KIND == 0:
        d_queries = dq_in + tl.dot(d_pairs, keys, input_precision=PRECISION)
        d_keys = dk_out + tl.dot(tl.trans(d_pairs), queries, input_precision=PRECISION)
    else:
        into, out_of = factors(g, gt, first, rows, T, ks, K, KIND, C)
        d_whole *= whole_factor(g, gt, first, rows, T, ks, K, KIND)
        d_queries, d_keys = dq_in * into, dk_out * out_of
        d_into, d_out = d_queries * queries, d_keys * keys
        now = rows[:, None] == rows[None, :]
        own = tl.sum(tl.where(now, d_pairs, 0.0), 1)[:, None]  # a token does not decay for itself
        if KIND == 1:
            faded = tl.where(now, 0.0, d_pairs * fading(g, gt, first, rows, T))
            from_keys = tl.dot(faded, keys, input_precision=PRECISION)
            from_queries = tl.dot(tl.trans(faded), queries, input_precision=PRECISION)
            d_queries += from_keys
            d_keys += from_queries
            since = tl.sum(d_into + from_keys * queries - from_queries * keys, 1)
            until = tl.sum(d_out, 1)
            d_steps = tl.cumsum(since, 0, reverse=True) + tl.cumsum(until, 0) - until + tl.sum(d_whole, 0)
            blocks_before = tl.program_id(0).to(tl.int64) * (tl.num_programs(2) // H) * T * H
            t = first + rows
            tl.store(dg + blocks_before + b * T * H + t * H + h, d_steps, mask=t < T)
        else:
            steps = load(g, gt, first, rows, T, ks, K)
            d_steps = tl.cumsum(d_into, 0, reverse=True) + tl.cumsum(d_out, 0) - d_out + d_whole[None, :]
            for level in range(LEVELS):
                is_after, pairs = sides(rows, level)
                between, factor = middle_factors(steps, rows, level)
                q_after = tl.where(is_after, queries * factor, 0.0)
                k_before = tl.where(is_after, 0.0, keys * factor)
                block = tl.where(pairs, d_pairs, 0.0)
                from_keys = tl.dot(block, k_before, input_precision=PRECISION)
                from_queries = tl.dot(tl.trans(block), q_after, input_precision=PRECISION)
                d_queries += from_keys * factor
                d_keys += from_queries * factor
                change = from_keys * q_after + from_queries * k_before
                d_steps += tl.dot(tl.trans(between), change, input_precision="ieee")
            save(dg + (b * T * H + h) * K, d_steps, first, rows, T, H * K, ks, K)
        d_queries += own * keys
        d_keys += own * queries
    save(dq + (b * T * H + h) * K, d_queries, first, rows, T, H * K, ks, K)
    save(dk + (b * T * H + h) * K, d_keys, first, rows, T, H * K, ks, K)


@jit
def written_kernel(
    k, v, g, beta, wanted, forgotten, kb, kt, kh, vb, vt, vh, gb, gt, gh, bb, bt, bh, T, H, GROUP, K, V,
    KIND: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What tokens of the delta rule write [B, T, H, V], but for `forgotten` [B, T, H, K] times the state."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, rows = head // H, head % H, tl.arange(0, C)
    first = chunk * C
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    g += b * gb + h * gh
    strength = load_column(beta + b * bb + h * bh, bt, first, rows, T)[:, None]
    overlaps = pair_scores(k, k, g, kt, kt, gt, first, rows, T, K, KIND, C, LEVELS, BK, PRECISION)
    overlaps *= strength
    inverse = (rows[:, None] == rows[None, :]).to(tl.float32)  # of I + overlaps, in blocks of doubling size
    for level in range(LEVELS):
        _, pairs = sides(rows, level)
        corner = tl.dot(tl.where(pairs, overlaps, 0.0), inverse, input_precision="ieee")
        inverse -= tl.dot(inverse, corner, input_precision="ieee")
    inverse *= tl.trans(strength)
    for start in range(0, V, BV):
        vs = start + tl.arange(0, BV)
        found = tl.dot(inverse, load(v, vt, first, rows, T, vs, V), input_precision=PRECISION)
        save(wanted + (b * T * H + h) * V, found, first, rows, T, H * V, vs, V)
    for start in range(0, K, BK):
        ks = start + tl.arange(0, BK)
        keys = load(k, kt, first, rows, T, ks, K)
        if KIND > 0:
            into, _ = factors(g, gt, first, rows, T, ks, K, KIND, C)
            keys *= into
        found = tl.dot(inverse, keys, input_precision=PRECISION)
        save(forgotten + (b * T * H + h) * K, found, first, rows, T, H * K, ks, K)


@jit
def delta_states_kernel(
    k, g, wanted, forgotten, initial, states, kb, kt, kh, gb, gt, gh, T, H, GROUP, K, V, N,
    KIND: tl.constexpr, HAS_INITIAL: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `states_kernel`, with all channels of keys in a block; `wanted` becomes what each token writes."""
    head = tl.program_id(1).to(tl.int64)
    b, h, rows = head // H, head % H, tl.arange(0, C)
    ks, vs = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    k += b * kb + h // GROUP * kh
    g += b * gb + h * gh
    wanted += (b * T * H + h) * V
    forgotten += (b * T * H + h) * K
    place = ks[:, None] * V + vs[None, :]
    inside = (ks < K)[:, None] & (vs < V)[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + head * K * V + place, mask=inside, other=0.0)
    for chunk in range(N):
        tl.store(states + (head * (N + 1) + chunk) * K * V + place, state, mask=inside)
        first = chunk * C
        keys = load(k, kt, first, rows, T, ks, K)
        gone = load(forgotten, H * K, first, rows, T, ks, K)
        written = load(wanted, H * V, first, rows, T, vs, V) - tl.dot(gone, state, input_precision=PRECISION)
        save(wanted, written, first, rows, T, H * V, vs, V)
        if KIND > 0:
            _, out_of = factors(g, gt, first, rows, T, ks, K, KIND, C)
            keys *= out_of
            state *= whole_factor(g, gt, first, rows, T, ks, K, KIND)[:, None]
        state += tl.dot(tl.trans(keys), written, input_precision=PRECISION)
    tl.store(states + (head * (N + 1) + N) * K * V + place, state, mask=inside)
