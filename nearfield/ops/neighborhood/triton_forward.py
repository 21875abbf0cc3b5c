"""The forward kernel of neighborhood attention: one query box of one head, softmax online, in base 2."""

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
    sees_extra,
    split_box,
    store_rows,
    tl,
    tokens,
    whole_box,
    windows,
)


@jit
def absorb(acc, top, total, scores, factor, v, GUARD: tl.constexpr):
    """The running output, maximum and sum with one more tile of scores, still to be multiplied by `factor`.

    So the product and the difference are one instruction. GUARD where rows may see nothing.
    """
    higher = tl.maximum(top, tl.max(scores, 1) * factor)
    level = higher
    if GUARD:
        level = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores * factor - level[:, None])
    shrink = tl.exp2(top - level)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total


@jit
def bias_of(bias, j, row, kernel_size, seen, CHECK: tl.constexpr):
    """[queries, keys]: entries of a head's table, in base 2; `row` is where each query's own row begins."""
    w1 = 2 * kernel_size[1] - 1
    w2 = 2 * kernel_size[2] - 1
    at = ((j[0] * w1 + j[1]) * w2 + j[2])[None, :] + row[:, None]
    if CHECK:
        return tl.load(bias + at, mask=seen, other=0.0) * 1.4426950408889634
    else:
        return tl.load(bias + at) * 1.4426950408889634


@jit
def bias_rows(p, kernel_size):
    """Where in a table the entries of each query begin, so that adding its key's place gives the entry."""
    w1 = 2 * kernel_size[1] - 1
    w2 = 2 * kernel_size[2] - 1
    centre = ((kernel_size[0] - 1) * w1 + kernel_size[1] - 1) * w2 + kernel_size[2] - 1
    return centre - ((p[0] * w1 + p[1]) * w2 + p[2])


@jit
def box_scores(
    q, key, bias, key_mask, at, lane, near, group, length, sides, dilation, strides, start, end, row,
    kernel_size, head_dim, scale, batch, kv_head,
    MASKED: tl.constexpr, OUTSIDE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    D: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr, TK: tl.constexpr, BY_BOX: tl.constexpr,
):  # fmt: skip
    """Scores of the key box at `at`, a factor above zero that they still lack, its keys, which of them may be
    read, and the coordinates of the first.

    `near` says how far each key of a box is from its first, in elements. BY_BOX: `key` is a descriptor.
    """
    j = (at[0] + lane[0], at[1] + lane[1], at[2] + lane[2])
    origin = tokens(at, group, dilation)
    is_open = j[2] >= 0
    if MASKED:
        inside = below(j, length, RANK)
        if OUTSIDE:
            inside = inside & not_before(j, RANK)
        is_open = inside
        if HAS_MASK:
            is_open = tl.load(key_mask + flat(tokens(j, group, dilation), sides), mask=inside, other=0) != 0
    if BY_BOX:
        k = load_box(key, batch, at, kv_head * D, TK, D)
    else:
        k = load_rows(key + elements(origin, strides), near, is_open, head_dim, D, EVEN, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    factor = scale
    if HAS_BIAS:
        scores *= scale
        factor = 1.0
    if MASKED:
        seen = in_windows(start, end, j, RANK)
        if HAS_MASK:
            if OUTSIDE:  # keys beyond the grid are never masked
                seen = seen & (is_open | (~inside))[None, :]
            else:
                seen = seen & is_open[None, :]
        if HAS_BIAS:
            scores += bias_of(bias, j, row, kernel_size, seen, True)
        scores = tl.where(seen, scores, float("-inf"))
    elif HAS_BIAS:
        scores += bias_of(bias, j, row, kernel_size, is_open, False)
    return scores, factor, k, is_open, origin


@kernel
def forward(
    query, key, value, more_key, more_value, places, bias, key_mask, sink_logits, out, lse, work, sizes,
    grid, kernel_size, stride, dilation, offset,
    q_strides, k_strides, v_strides, more_k_strides, more_v_strides,
    boxes, heads, group_size, num_more, head_dim, value_dim, scale,
    TQ: tl.constexpr, TK: tl.constexpr, CAUSAL: tl.constexpr, BORDER: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SINK: tl.constexpr, HAS_MORE: tl.constexpr, HAS_PLACES: tl.constexpr,
    PACKED: tl.constexpr, FAR: tl.constexpr, RANK: tl.constexpr, PARTIAL: tl.constexpr,
    WHOLE: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr, BY_BOX: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a query box. `scale` is in base 2, the log-sum-exp natural.

    BY_BOX: keys and values are given by descriptors, and the GPU fetches a box of them by itself.
    """
    SHIFT: tl.constexpr = BORDER == 0
    OUTSIDE: tl.constexpr = BORDER == 2 and HAS_BIAS  # keys beyond the grid have logits of their own
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
    here_start, here_end = cut(start, end, length)

    kv_head = head // group_size
    if not BY_BOX:
        key += base(batch, first_k, kv_head, k_strides, PACKED)
        value += base(batch, first_k, kv_head, v_strides, PACKED)
    key_mask += first_k
    query += base(batch, first_q, head, q_strides, PACKED)
    q_place = elements((c[0], c[1], c[2] - offset), per_axis(q_strides, sides, PACKED))
    q = load_rows(query, q_place, rows, head_dim, D, EVEN, True)
    row = bias_rows(clamped(p, length), kernel_size)
    if HAS_BIAS:
        bias += head * (2 * kernel_size[0] - 1) * (2 * kernel_size[1] - 1) * (2 * kernel_size[2] - 1)

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if HAS_SINK:  # a key of this logit and the value zero
        top = tl.zeros([BM], tl.float32) + tl.load(sink_logits + head) * 1.4426950408889634
        total += 1.0
    if BORDER == 2 and not HAS_BIAS:  # so many keys of the logit 0 and the value zero
        all_keys = (end[0] - start[0]).to(tl.float32) * (end[1] - start[1]) * (end[2] - start[2])
        real_keys = (here_end[0] - here_start[0]).to(tl.float32) * (here_end[1] - here_start[1])
        beyond = all_keys - real_keys * (here_end[2] - here_start[2])
        higher = tl.where(beyond > 0, tl.maximum(top, 0.0), top)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - level) + beyond * tl.exp2(-level)
        top = higher
    acc = tl.zeros([BM, DV], tl.float32)
    if not OUTSIDE:
        start = here_start
        end = here_end

    lane = lanes(TK)
    k_steps = per_axis(k_strides, sides, PACKED)
    v_steps = per_axis(v_strides, sides, PACKED)
    k_near = lane_elements(lane, dilation, k_steps, FAR)
    v_near = lane_elements(lane, dilation, v_steps, FAR)
    v0 = key_boxes(first[0], length[0], kernel_size[0], stride[0], TQ[0], TK[0], CAUSAL[0], SHIFT, OUTSIDE)
    v1 = key_boxes(first[1], length[1], kernel_size[1], stride[1], TQ[1], TK[1], CAUSAL[1], SHIFT, OUTSIDE)
    v2 = key_boxes(first[2], length[2], kernel_size[2], stride[2], TQ[2], TK[2], CAUSAL[2], SHIFT, OUTSIDE)
    if not WHOLE:
        v2 = (v2[0], v2[1], v2[2], v2[3] * 0)
    if PARTIAL:
        count = v0[1] * v1[1] * v2[1] - v0[3] * v1[3] * v2[3]
        for t in range(count):
            at = partial_box(t, v0, v1, v2, TK, RANK)
            scores, factor, k, is_open, origin = box_scores(
                q, key, bias, key_mask, at, lane, k_near, group, length, sides, dilation, k_steps, start,
                end, row, kernel_size, head_dim, scale, outer, kv_head,
                True, OUTSIDE, HAS_MASK, HAS_BIAS, D, EVEN, RANK, TK, BY_BOX,
            )  # fmt: skip
            if BY_BOX:
                v = load_box(value, outer, at, kv_head * DV, TK, DV)
            else:
                v = load_rows(value + elements(origin, v_steps), v_near, is_open, value_dim, DV, EVEN_V, True)
            acc, top, total = absorb(acc, top, total, scores, factor, v, True)
    if WHOLE:
        for t in range(v0[3] * v1[3] * v2[3]):
            at = whole_box(t, v0, v1, v2, TK, RANK)
            scores, factor, k, is_open, origin = box_scores(
                q, key, bias, key_mask, at, lane, k_near, group, length, sides, dilation, k_steps, start,
                end, row, kernel_size, head_dim, scale, outer, kv_head,
                False, False, False, HAS_BIAS, D, EVEN, RANK, TK, BY_BOX,
            )  # fmt: skip
            if BY_BOX:
                v = load_box(value, outer, at, kv_head * DV, TK, DV)
            else:
                v = load_rows(
                    value + elements(origin, v_steps), v_near, is_open, value_dim, DV, EVEN_V, False
                )
            acc, top, total = absorb(acc, top, total, scores, factor, v, False)
    if HAS_MORE:
        more_key += batch * more_k_strides[0] + kv_head.to(tl.int64) * more_k_strides[2]
        more_value += batch * more_v_strides[0] + kv_head.to(tl.int64) * more_v_strides[2]
        for low in range(0, num_more, BL):
            extra = low + tl.arange(0, BL)
            is_there = extra < num_more
            k = load_rows(more_key, extra.to(tl.int64) * more_k_strides[1], is_there, head_dim, D, EVEN, True)
            v = load_rows(
                more_value, extra.to(tl.int64) * more_v_strides[1], is_there, value_dim, DV, EVEN_V, True
            )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            seen = is_there[None, :]
            if HAS_PLACES:
                place = tl.load(places + batch * num_more + extra, mask=is_there, other=-2)
                seen = sees_extra(
                    place[None, :], c[2][:, None], start[2][:, None], end[2][:, None], group[2], dilation[2],
                    CAUSAL[2],
                )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
            acc, top, total = absorb(acc, top, total, scores, scale, v, True)

    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = first_q + flat(c, sides) - offset
    place = place * heads + head
    store_rows(out, result, place, rows, value_dim, DV, EVEN_V)
    log = tl.where(
        total == 0.0, float("-inf"), top * 0.6931471805599453 + tl.log(tl.where(total == 0.0, 1.0, total))
    )
    tl.store(lse + place, log, mask=rows)
