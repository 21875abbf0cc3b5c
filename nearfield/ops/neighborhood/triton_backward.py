"""The backward kernels of neighborhood attention: each gradient is summed by one program in a fixed order.

`query_gradients` walks key boxes as the forward does, `key_gradients` the query boxes of inverse windows,
`extra_gradients` all queries for keys outside the grid's windows, `bias_gradients` all pairs of an offset.
"""

# mypy: ignore-errors

from __future__ import annotations

from nearfield.ops.neighborhood.triton_boxes import (
    base,
    below,
    clamped,
    coordinates,
    cut,
    elements,
    flat,
    in_windows,
    jit,
    kernel,
    key_boxes,
    lane_elements,
    lanes,
    lengths,
    load_box,
    load_rows,
    locate,
    not_before,
    partial_box,
    per_axis,
    query_boxes,
    seen_by,
    sees_extra,
    split_box,
    store_rows,
    tl,
    tokens,
    whole_box,
    windows,
)
from nearfield.ops.neighborhood.triton_forward import bias_rows, box_scores


@kernel
def query_gradients(
    query, key, value, more_key, more_value, places, bias, key_mask, grad, grad_lse, out, lse, level, less,
    d_query, work, sizes,
    grid, kernel_size, stride, dilation, offset,
    q_strides, k_strides, v_strides, g_strides, more_k_strides, more_v_strides,
    boxes, heads, group_size, num_more, head_dim, value_dim, scale,
    TQ: tl.constexpr, TK: tl.constexpr, CAUSAL: tl.constexpr, BORDER: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, HAS_MORE: tl.constexpr, HAS_PLACES: tl.constexpr,
    PACKED: tl.constexpr, FAR: tl.constexpr, RANK: tl.constexpr, PARTIAL: tl.constexpr,
    WHOLE: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr, BY_BOX: tl.constexpr,
):  # fmt: skip
    """Gradients of a query box; and for the other kernels the log-sum-exp in base 2, and what to subtract."""
    SHIFT: tl.constexpr = BORDER == 0
    item = tl.program_id(0) % boxes
    head = tl.program_id(0) // boxes % heads
    outer = tl.program_id(0) // boxes // heads
    batch, box, sides, first_q, first_k = locate(work, sizes, item, outer, grid, offset, PACKED)
    group, first = split_box(box, sides, dilation, offset, TQ)
    length = lengths(sides, group, dilation)
    if (first[0] >= length[0]) | (first[1] >= length[1]) | (first[2] >= length[2]):
        return
    p, c = coordinates(first, lanes(TQ), group, dilation)
    rows = below(p, length, RANK)
    start, end = windows(p, length, kernel_size, stride, CAUSAL, SHIFT)
    start, end = cut(start, end, length)

    kv_head = head // group_size
    if not BY_BOX:
        key += base(batch, first_k, kv_head, k_strides, PACKED)
        value += base(batch, first_k, kv_head, v_strides, PACKED)
    key_mask += first_k
    query += base(batch, first_q, head, q_strides, PACKED)
    grad += base(batch, first_q, head, g_strides, PACKED)
    here = (c[0], c[1], c[2] - offset)
    q = load_rows(query, elements(here, per_axis(q_strides, sides, PACKED)), rows, head_dim, D, EVEN, True)
    g = load_rows(grad, elements(here, per_axis(g_strides, sides, PACKED)), rows, value_dim, DV, EVEN_V, True)
    row = bias_rows(clamped(p, length), kernel_size)
    if HAS_BIAS:
        bias += head * (2 * kernel_size[0] - 1) * (2 * kernel_size[1] - 1) * (2 * kernel_size[2] - 1)

    place = (first_q + flat(c, sides) - offset) * heads + head
    o = load_rows(out, place * (DV if EVEN_V else value_dim), rows, value_dim, DV, EVEN_V, True)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse + place, mask=rows, other=0.0)
    top = tl.load(lse + place, mask=rows, other=float("-inf")) * 1.4426950408889634
    top = tl.where(top == float("-inf"), float("inf"), top)  # no weight is left where nothing is seen
    tl.store(less + place, delta, mask=rows)
    tl.store(level + place, top, mask=rows)

    dq = tl.zeros([BM, D], tl.float32)
    lane = lanes(TK)
    k_steps = per_axis(k_strides, sides, PACKED)
    v_steps = per_axis(v_strides, sides, PACKED)
    k_near = lane_elements(lane, dilation, k_steps, FAR)
    v_near = lane_elements(lane, dilation, v_steps, FAR)
    v0 = key_boxes(first[0], length[0], kernel_size[0], stride[0], TQ[0], TK[0], CAUSAL[0], SHIFT, False)
    v1 = key_boxes(first[1], length[1], kernel_size[1], stride[1], TQ[1], TK[1], CAUSAL[1], SHIFT, False)
    v2 = key_boxes(first[2], length[2], kernel_size[2], stride[2], TQ[2], TK[2], CAUSAL[2], SHIFT, False)
    if not WHOLE:
        v2 = (v2[0], v2[1], v2[2], v2[3] * 0)
    if PARTIAL:
        count = v0[1] * v1[1] * v2[1] - v0[3] * v1[3] * v2[3]
        for t in range(count):
            at = partial_box(t, v0, v1, v2, TK, RANK)
            scores, factor, k, is_open, origin = box_scores(
                q, key, bias, key_mask, at, lane, k_near, group, length,
                sides, dilation, k_steps, start, end, row, kernel_size, head_dim, scale, outer, kv_head,
                True, False, HAS_MASK, HAS_BIAS, D, EVEN, RANK, TK, BY_BOX,
            )  # fmt: skip
            if BY_BOX:
                v = load_box(value, outer, at, kv_head * DV, TK, DV)
            else:
                v = load_rows(value + elements(origin, v_steps), v_near, is_open, value_dim, DV, EVEN_V, True)
            dq = pull_queries(dq, scores * factor, top, delta, g, k, v)
    if WHOLE:
        for t in range(v0[3] * v1[3] * v2[3]):
            at = whole_box(t, v0, v1, v2, TK, RANK)
            scores, factor, k, is_open, origin = box_scores(
                q, key, bias, key_mask, at, lane, k_near, group, length,
                sides, dilation, k_steps, start, end, row, kernel_size, head_dim, scale, outer, kv_head,
                False, False, False, HAS_BIAS, D, EVEN, RANK, TK, BY_BOX,
            )  # fmt: skip
            if BY_BOX:
                v = load_box(value, outer, at, kv_head * DV, TK, DV)
            else:
                v = load_rows(
                    value + elements(origin, v_steps), v_near, is_open, value_dim, DV, EVEN_V, False
                )
            dq = pull_queries(dq, scores * factor, top, delta, g, k, v)
    if HAS_MORE:
        more_key += batch * more_k_strides[0] + kv_head.to(tl.int64) * more_k_strides[2]
        more_value += batch * more_v_strides[0] + kv_head.to(tl.int64) * more_v_strides[2]
        for low in range(0, num_more, BL):
            extra = low + tl.arange(0, BL)
            is_there = extra < num_more
            k_place = extra.to(tl.int64) * more_k_strides[1]
            v_place = extra.to(tl.int64) * more_v_strides[1]
            k = load_rows(more_key, k_place, is_there, head_dim, D, EVEN, True)
            v = load_rows(more_value, v_place, is_there, value_dim, DV, EVEN_V, True)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            seen = is_there[None, :]
            if HAS_PLACES:
                where = tl.load(places + batch * num_more + extra, mask=is_there, other=-2)
                seen = sees_extra(
                    where[None, :], c[2][:, None], start[2][:, None], end[2][:, None], group[2], dilation[2],
                    CAUSAL[2],
                )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
            dq = pull_queries(dq, scores, top, delta, g, k, v)
    store_rows(d_query, dq * (scale * 0.6931471805599453), place, rows, head_dim, D, EVEN)


@jit
def pull_queries(dq, scores, top, delta, g, k, v):
    """The queries' gradients (without the scale) with those through one more tile of scores."""
    w = tl.exp2(scores - top[:, None])
    pull = w * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(pull.to(k.dtype), k, dq, input_precision="ieee")


@kernel
def key_gradients(
    query, key, value, bias, key_mask, grad, level, less, d_key, d_value, work, sizes,
    grid, kernel_size, stride, dilation, offset,
    q_strides, k_strides, v_strides, g_strides,
    boxes, heads, group_size, head_dim, value_dim, scale,
    TQ: tl.constexpr, TK: tl.constexpr, CAUSAL: tl.constexpr, BORDER: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PACKED: tl.constexpr, FAR: tl.constexpr, RANK: tl.constexpr,
    PARTIAL: tl.constexpr, WHOLE: tl.constexpr, BN: tl.constexpr, BY_BOX: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of a box, over the query heads that share them."""
    SHIFT: tl.constexpr = BORDER == 0
    kv_heads = heads // group_size
    item = tl.program_id(0) % boxes
    kv_head = tl.program_id(0) // boxes % kv_heads
    outer = tl.program_id(0) // boxes // kv_heads
    batch, box, sides, first_q, first_k = locate(work, sizes, item, outer, grid, offset, PACKED)
    group, first = split_box(box, sides, dilation, 0, TK)
    length = lengths(sides, group, dilation)
    if (first[0] >= length[0]) | (first[1] >= length[1]) | (first[2] >= length[2]):
        return
    j, c = coordinates(first, lanes(TK), group, dilation)
    columns = below(j, length, RANK)
    is_open = columns
    if HAS_MASK:
        is_open = tl.load(key_mask + first_k + flat(c, sides), mask=columns, other=0) != 0
    key += base(batch, first_k, kv_head, k_strides, PACKED)
    value += base(batch, first_k, kv_head, v_strides, PACKED)
    k = load_rows(key, elements(c, per_axis(k_strides, sides, PACKED)), is_open, head_dim, D, EVEN, True)
    v = load_rows(
        value, elements(c, per_axis(v_strides, sides, PACKED)), is_open, value_dim, DV, EVEN_V, True
    )
    real = clamped(j, length)
    low0, high0 = seen_by(real[0], length[0], kernel_size[0], stride[0], CAUSAL[0], SHIFT)
    low1, high1 = seen_by(real[1], length[1], kernel_size[1], stride[1], CAUSAL[1], SHIFT)
    low2, high2 = seen_by(real[2], length[2], kernel_size[2], stride[2], CAUSAL[2], SHIFT)
    low, high = (low0, low1, low2), (high0, high1, high2)
    w1 = 2 * kernel_size[1] - 1
    w2 = 2 * kernel_size[2] - 1
    column = (real[0] * w1 + real[1]) * w2 + real[2]
    table = (2 * kernel_size[0] - 1) * w1 * w2

    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, DV], tl.float32)
    lane = lanes(TQ)
    q_near = lane_elements(lane, dilation, per_axis(q_strides, sides, PACKED), FAR)
    g_near = lane_elements(lane, dilation, per_axis(g_strides, sides, PACKED), FAR)
    late = tl.cdiv(tl.maximum(offset - group[2], 0), dilation[2])
    v0 = query_boxes(first[0], length[0], 0, kernel_size[0], stride[0], TQ[0], TK[0], CAUSAL[0], SHIFT)
    v1 = query_boxes(first[1], length[1], 0, kernel_size[1], stride[1], TQ[1], TK[1], CAUSAL[1], SHIFT)
    v2 = query_boxes(first[2], length[2], late, kernel_size[2], stride[2], TQ[2], TK[2], CAUSAL[2], SHIFT)
    if not WHOLE:
        v2 = (v2[0], v2[1], v2[2], v2[3] * 0)
    whole = v0[3] * v1[3] * v2[3]
    partial = v0[1] * v1[1] * v2[1] - whole
    if PARTIAL:  # heads and boxes are one loop: loads run ahead from head to head
        for t in range(partial * group_size):
            head, number = member(t, partial, kv_head, group_size, GROUPED)
            dk, dv = pull_keys(
                dk, dv, k, v, query, grad, bias + head * table, level, less,
                partial_box(number, v0, v1, v2, TQ, RANK), lane, q_near, g_near, group, length, sides,
                dilation, offset, batch, first_q, heads, head, q_strides, g_strides, low, high, column,
                kernel_size, head_dim, value_dim, scale, True, HAS_BIAS, D, DV, EVEN, EVEN_V, RANK, TQ,
                BY_BOX, PACKED,
            )  # fmt: skip
    if WHOLE:
        for t in range(whole * group_size):
            head, number = member(t, whole, kv_head, group_size, GROUPED)
            dk, dv = pull_keys(
                dk, dv, k, v, query, grad, bias + head * table, level, less,
                whole_box(number, v0, v1, v2, TQ, RANK), lane, q_near, g_near, group, length, sides,
                dilation, offset, batch, first_q, heads, head, q_strides, g_strides, low, high, column,
                kernel_size, head_dim, value_dim, scale, False, HAS_BIAS, D, DV, EVEN, EVEN_V, RANK, TQ,
                BY_BOX, PACKED,
            )  # fmt: skip
    if HAS_MASK:
        dk = tl.where(is_open[:, None], dk, 0.0)
        dv = tl.where(is_open[:, None], dv, 0.0)
    place = (first_k + flat(c, sides)) * kv_heads + kv_head
    store_rows(d_key, dk * (scale * 0.6931471805599453), place, columns, head_dim, D, EVEN)
    store_rows(d_value, dv, place, columns, value_dim, DV, EVEN_V)


@jit
def member(t, count, kv_head, group_size, GROUPED: tl.constexpr):
    """The query head of turn t over all that share `kv_head`, `count` boxes each, and the box's number."""
    if GROUPED:
        return kv_head * group_size + t // count, t % count
    else:
        return kv_head, t


@jit
def pull_keys(
    dk, dv, k, v, query, grad, bias, level, less, at, lane, q_near, g_near, group, length, sides, dilation,
    offset, batch, first_q, heads, head, q_strides, g_strides, low, high, column, kernel_size, head_dim,
    value_dim, scale,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, EVEN: tl.constexpr,
    EVEN_V: tl.constexpr, RANK: tl.constexpr, TQ: tl.constexpr, BY_BOX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The keys' gradients (without the scale) and the values' with those through one more box of queries."""
    p = (at[0] + lane[0], at[1] + lane[1], at[2] + lane[2])
    origin = tokens(at, group, dilation)
    origin = (origin[0], origin[1], origin[2] - offset)
    rows = p[2] >= 0
    if MASKED:
        rows = below(p, length, RANK)
    if BY_BOX:
        first = (at[0], at[1], at[2] - offset)
        sample = tl.cast(batch, tl.int32)  # descriptors want no more
        q = load_box(query, sample, first, head * D, TQ, D)
        g = load_box(grad, sample, first, head * DV, TQ, DV)
    else:
        query += base(batch, first_q, head, q_strides, PACKED)
        grad += base(batch, first_q, head, g_strides, PACKED)
        q_steps = per_axis(q_strides, sides, PACKED)
        g_steps = per_axis(g_strides, sides, PACKED)
        q = load_rows(query + elements(origin, q_steps), q_near, rows, head_dim, D, EVEN, MASKED)
        g = load_rows(grad + elements(origin, g_steps), g_near, rows, value_dim, DV, EVEN_V, MASKED)
    place = (first_q + flat(tokens(p, group, dilation), sides) - offset) * heads + head
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
    if MASKED:
        top = tl.load(level + place, mask=rows, other=0.0)
        delta = tl.load(less + place, mask=rows, other=0.0)
        seen = in_windows(low, high, p, RANK)  # a query sees the keys whose inverse windows it lies in
        if HAS_BIAS:
            entry = column[:, None] + bias_rows(p, kernel_size)[None, :]
            scores += tl.load(bias + entry, mask=seen, other=0.0) * 1.4426950408889634
        scores = tl.where(seen, scores, float("-inf"))
    else:
        top = tl.load(level + place)
        delta = tl.load(less + place)
        if HAS_BIAS:
            entry = column[:, None] + bias_rows(p, kernel_size)[None, :]
            scores += tl.load(bias + entry) * 1.4426950408889634
    w = tl.exp2(scores - top[None, :])
    dv = tl.dot(w.to(g.dtype), g, dv, input_precision="ieee")
    pull = w * (tl.dot(v, tl.trans(g), input_precision="ieee") - delta[None, :])
    return tl.dot(pull.to(q.dtype), q, dk, input_precision="ieee"), dv


@kernel
def extra_gradients(
    query, more_key, more_value, places, grad, level, less, d_key, d_value, sizes,
    grid, kernel_size, stride, dilation, offset,
    q_strides, g_strides, more_k_strides, more_v_strides,
    tiles, splits, batches, heads, group_size, num_more, head_dim, value_dim, scale,
    CAUSAL: tl.constexpr, BORDER: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, EVEN: tl.constexpr,
    EVEN_V: tl.constexpr, HAS_PLACES: tl.constexpr, PACKED: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Shares [splits, batches, extra keys, kv_heads, channels] of the gradients of keys that all may see."""
    SHIFT: tl.constexpr = BORDER == 0
    kv_heads = heads // group_size
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    kv_head = tl.program_id(0) // tiles // splits % kv_heads
    outer = tl.program_id(0) // tiles // splits // kv_heads
    if PACKED:
        batch = outer.to(tl.int64)
        first_q = tl.load(sizes + 4 * batch).to(tl.int64)
        sides = (
            tl.load(sizes + 4 * batch + 1),
            tl.load(sizes + 4 * batch + 2),
            tl.load(sizes + 4 * batch + 3),
        )
    else:
        batch = outer.to(tl.int64)
        first_q = batch * grid[0] * grid[1] * (grid[2] - offset)
        sides = grid
    count = sides[0] * sides[1] * (sides[2] - offset)
    share = tl.cdiv(tl.cdiv(count, BM), splits) * BM
    extra = tile * BL + tl.arange(0, BL)
    is_there = extra < num_more
    more_key += batch * more_k_strides[0] + kv_head.to(tl.int64) * more_k_strides[2]
    more_value += batch * more_v_strides[0] + kv_head.to(tl.int64) * more_v_strides[2]
    k = load_rows(more_key, extra.to(tl.int64) * more_k_strides[1], is_there, head_dim, D, EVEN, True)
    v = load_rows(more_value, extra.to(tl.int64) * more_v_strides[1], is_there, value_dim, DV, EVEN_V, True)
    where = extra
    if HAS_PLACES:
        where = tl.load(places + batch * num_more + extra, mask=is_there, other=-2)
    q_steps = per_axis(q_strides, sides, PACKED)
    g_steps = per_axis(g_strides, sides, PACKED)
    dk = tl.zeros([BL, D], tl.float32)
    dv = tl.zeros([BL, DV], tl.float32)
    for member in range(group_size):
        head = kv_head * group_size + member
        q_head = query + base(batch, first_q, head, q_strides, PACKED)
        g_head = grad + base(batch, first_q, head, g_strides, PACKED)
        for low in range(split * share, tl.minimum(split * share + share, count), BM):
            token = low + tl.arange(0, BM)
            rows = token < count
            here = token_coordinates(token, sides, offset)
            q = load_rows(q_head, elements(here, q_steps), rows, head_dim, D, EVEN, True)
            g = load_rows(g_head, elements(here, g_steps), rows, value_dim, DV, EVEN_V, True)
            place = (first_q + token) * heads + head
            top = tl.load(level + place, mask=rows, other=float("inf"))
            delta = tl.load(less + place, mask=rows, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            if HAS_PLACES:
                at = here[2] + offset
                of_group = at % dilation[2]
                size = (sides[2] - of_group + dilation[2] - 1) // dilation[2]
                start, end = window_cut(at // dilation[2], size, kernel_size[2], stride[2], CAUSAL[2], SHIFT)
                seen = sees_extra(
                    where[:, None], at[None, :], start[None, :], end[None, :], of_group[None, :], dilation[2],
                    CAUSAL[2],
                )  # fmt: skip
                scores = tl.where(seen, scores, float("-inf"))
            w = tl.exp2(scores - top[None, :])
            dv = tl.dot(w.to(g.dtype), g, dv, input_precision="ieee")
            pull = w * (tl.dot(v, tl.trans(g), input_precision="ieee") - delta[None, :])
            dk = tl.dot(pull.to(q.dtype), q, dk, input_precision="ieee")
    at = ((split.to(tl.int64) * batches + batch) * num_more + extra) * kv_heads + kv_head
    store_rows(d_key, dk * (scale * 0.6931471805599453), at, is_there, head_dim, D, EVEN)
    store_rows(d_value, dv, at, is_there, value_dim, DV, EVEN_V)


@jit
def window_cut(p, length, K, S, CAUSAL: tl.constexpr, SHIFT: tl.constexpr):
    """[start, end) of the keys that the query at position p of one axis sees."""
    zero = 0 * p
    start, end = windows((zero, zero, p), (1, 1, length), (1, 1, K), (1, 1, S), (False, False, CAUSAL), SHIFT)
    return tl.maximum(start[2], 0), tl.minimum(end[2], length)


@jit
def token_coordinates(token, sides, offset):
    """Coordinates of queries in row-major order, the last axis counted from its first query."""
    width = sides[2] - offset
    return token // width // sides[1], token // width % sides[1], token % width


@kernel
def bias_gradients(
    query, key, value, bias, key_mask, grad, level, less, shares, work, sizes,
    grid, kernel_size, stride, dilation, offset,
    q_strides, k_strides, v_strides, g_strides,
    blocks, items, parts, per_part, chunks, heads, group_size, head_dim, value_dim, scale,
    CAUSAL: tl.constexpr, BORDER: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, EVEN: tl.constexpr,
    EVEN_V: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Shares [parts, heads, entries] of a table's gradient: BO entries, over `per_part` blocks of queries."""
    SHIFT: tl.constexpr = BORDER == 0
    chunk = tl.program_id(0) % chunks
    part = tl.program_id(0) // chunks % parts
    head = tl.program_id(0) // chunks // parts
    kv_head = head // group_size
    w1 = 2 * kernel_size[1] - 1
    w2 = 2 * kernel_size[2] - 1
    entries = (2 * kernel_size[0] - 1) * w1 * w2
    bias += head * entries
    lane = tl.arange(0, BO)
    sums = tl.zeros([BO], tl.float32)
    for item in range(part * per_part, tl.minimum(part * per_part + per_part, items)):
        batch, block, sides, first_q, first_k = locate(
            work, sizes, item % blocks, item // blocks, grid, offset, PACKED
        )
        token = block * BM + tl.arange(0, BM)
        rows = token < sides[0] * sides[1] * (sides[2] - offset)
        here = token_coordinates(token, sides, offset)
        at = (here[0], here[1], here[2] + offset)
        group = (at[0] % dilation[0], at[1] % dilation[1], at[2] % dilation[2])
        p = (at[0] // dilation[0], at[1] // dilation[1], at[2] // dilation[2])
        length = lengths(sides, group, dilation)
        start, end = windows(p, length, kernel_size, stride, CAUSAL, SHIFT)
        if BORDER != 2:
            start, end = cut(start, end, length)
        q_place = base(batch, first_q, head, q_strides, PACKED) + elements(
            here, per_axis(q_strides, sides, PACKED)
        )
        g_place = base(batch, first_q, head, g_strides, PACKED) + elements(
            here, per_axis(g_strides, sides, PACKED)
        )
        q = load_rows(query, q_place, rows, head_dim, D, EVEN, True).to(tl.float32)
        g = load_rows(grad, g_place, rows, value_dim, DV, EVEN_V, True).to(tl.float32)
        place = (first_q + token) * heads + head
        top = tl.load(level + place, mask=rows, other=float("inf"))
        delta = tl.load(less + place, mask=rows, other=0.0)
        k_base = base(batch, first_k, kv_head, k_strides, PACKED)
        v_base = base(batch, first_k, kv_head, v_strides, PACKED)
        for number in range(tl.minimum(BO, entries - chunk * BO)):
            entry = chunk * BO + number
            j = (
                p[0] + entry // w2 // w1 - (kernel_size[0] - 1),
                p[1] + entry // w2 % w1 - (kernel_size[1] - 1),
                p[2] + entry % w2 - (kernel_size[2] - 1),
            )
            seen = rows & (j[2] >= start[2]) & (j[2] < end[2])
            seen = seen & (j[1] >= start[1]) & (j[1] < end[1]) & (j[0] >= start[0]) & (j[0] < end[0])
            inside = seen & below(j, length, 3) & not_before(j, 3)
            c = tokens(j, group, dilation)
            is_open = inside
            if HAS_MASK:
                is_open = tl.load(key_mask + first_k + flat(c, sides), mask=inside, other=0) != 0
                seen = seen & (is_open | (~inside))
            k_place = k_base + elements(c, per_axis(k_strides, sides, PACKED))
            v_place = v_base + elements(c, per_axis(v_strides, sides, PACKED))
            k = load_rows(key, k_place, is_open, head_dim, D, EVEN, True).to(tl.float32)
            v = load_rows(value, v_place, is_open, value_dim, DV, EVEN_V, True).to(tl.float32)
            scores = tl.sum(q * k, 1) * scale + tl.load(bias + entry) * 1.4426950408889634
            w = tl.where(seen, tl.exp2(scores - top), 0.0)
            found = tl.sum(w * (tl.sum(g * v, 1) - delta), 0)
            sums += tl.where(lane == number, found, 0.0)
    entry = chunk * BO + lane
    at = (part.to(tl.int64) * heads + head) * entries + entry
    tl.store(shares + at, sums, mask=entry < entries)
