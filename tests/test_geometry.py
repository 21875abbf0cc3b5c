"""The geometry against its definition written out in loops, and its laws."""

import time
from itertools import product
from math import ceil, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.ops.neighborhood.geometry import BORDERS, Neighborhood

many = settings(max_examples=300, deadline=None)
some = settings(max_examples=80, deadline=None)


@st.composite
def bounds(draw, largest=20, short=True, sinks=True):
    """A one-dimensional pattern on a grid, of every kind that can be bound."""
    n, d = draw(st.integers(1, largest)), draw(st.integers(1, 4))
    is_causal, border = draw(st.booleans()), draw(st.sampled_from(BORDERS))
    clips = is_causal or border != "shift"
    d = d if clips else min(d, n)
    k = draw(st.integers(1, largest + 4 if clips else n // d))
    num_sinks = draw(st.sampled_from([0, 0, 1, 4, largest])) if sinks else 0
    pattern = Neighborhood(k, draw(st.integers(1, k)), d, is_causal, border, num_sinks)
    return pattern.on(n, num_queries=draw(st.integers(0, n)) if short and is_causal else None)


@some
@given(bounds())
def test_a_pattern_binds_the_same_with_and_without_the_cache(bound):
    again = bound.pattern.bind(bound.grid, bound.num_queries)
    assert again == bound and again is not bound
    assert bound.pattern.on(bound.grid, num_queries=bound.num_queries) == bound


def sees(pattern, n, i, j):
    """The definition for one axis: does query `i` of `n` tokens see key `j`?"""
    k, s, d = pattern.kernel_size, pattern.stride, pattern.dilation
    if j < pattern.num_sinks and (j <= i or not pattern.is_causal):
        return True
    if i % d != j % d:
        return False
    group = list(range(i % d, n, d))
    p, q = group.index(i), group.index(j)
    run = [r for r in range(len(group)) if r // s == p // s]  # the queries that share a window
    if pattern.is_causal:
        return run[-1] - k + 1 <= q <= p
    start = run[min(s // 2, len(run) - 1)] - k // 2
    if pattern.border == "shift":
        while start + k > len(group):
            start -= 1
        while start < 0:
            start += 1
    return start <= q < start + k


@many
@given(bounds())
def test_windows_inverses_and_masks_follow_the_definition(bound):
    n, offset, mask = bound.num_keys, bound.offset, bound.mask_mod
    table = [[sees(bound.pattern, n, q + offset, j) for j in range(n)] for q in range(bound.num_queries)]
    for q, row in enumerate(table):
        assert bound.keys(q) == [j for j in range(n) if row[j]]
        assert [bool(mask(0, 0, q, j)) for j in range(n)] == row
    for j in range(n):
        assert bound.queries(j) == [q for q, row in enumerate(table) if row[j]]
    assert bound.num_pairs == sum(map(sum, table))
    assert not table or bound.kept == bound.num_pairs / (len(table) * n)


@some
@given(bounds(largest=9, short=False, sinks=False), bounds(largest=9, short=False, sinks=False))
def test_a_grid_of_two_axes_is_the_product_of_its_axes(a, b):
    sides = (a.num_keys, b.num_keys)
    both = {
        name: (getattr(a.pattern, name), getattr(b.pattern, name))
        for name in ("kernel_size", "stride", "dilation", "is_causal")
    }
    border = a.pattern.border if a.pattern.border != "shift" else "truncate"
    bound = Neighborhood(**both, border=border).on(sides)
    one = [Neighborhood(*(both[name][i] for name in both), border=border) for i in range(2)]
    total = 0
    for query, key in product(range(prod(sides)), repeat=2):
        places = [divmod(token, sides[1]) for token in (query, key)]
        visible = all(sees(one[x], sides[x], places[0][x], places[1][x]) for x in range(2))
        assert bool(bound.mask_mod(0, 0, query, key)) == visible
        total += visible
    assert bound.num_pairs == total == sum(len(bound.keys(q)) for q in range(prod(sides)))
    assert total == sum(len(bound.queries(j)) for j in range(prod(sides)))


@some
@given(bounds(sinks=False))
def test_padded_keys_fill_every_window_up(bound):
    for query in range(bound.num_queries):
        i, axis = query + bound.offset, bound.axes[0]
        seen = len(bound.keys(query)) + bound.num_padded(query)
        if bound.pattern.border == "pad" and not axis.is_causal:
            assert seen == axis.kernel_size
        elif bound.pattern.border == "pad":
            start, end = axis.interval(i // axis.dilation, i % axis.dilation)
            assert seen == end - start
        else:
            assert bound.num_padded(query) == 0


def runs(keys):
    """Lengths of the runs of consecutive numbers in a set."""
    starts = sorted(j for j in keys if j - 1 not in keys)
    return [
        next(length for length in range(1, len(keys) + 1) if start + length not in keys) for start in starts
    ]


@many
@given(bounds(), st.integers(1, 8), st.integers(1, 8))
def test_tiles_are_those_a_kernel_would_visit(bound, q_tile, kv_tile):
    axis, n, d = bound.axes[0], bound.num_keys, bound.pattern.dilation
    if d > 1 and bound.pattern.num_sinks:
        return  # sinks of other dilation groups: counted as a block of their own, see below
    static = dynamic = full = 0
    for group in range(min(d, n)):
        tokens = list(range(group, n, d))
        queries = [i for i in tokens if i >= bound.offset]
        for at in range(0, len(queries), q_tile):
            seen = [
                {tokens.index(j) for j in bound.keys(i - bound.offset)} for i in queries[at : at + q_tile]
            ]
            union = set().union(*seen)
            dynamic += sum(ceil(length / kv_tile) for length in runs(union))
            for low in range(0, len(tokens), kv_tile):
                tile = set(range(low, min(low + kv_tile, len(tokens))))
                static += bool(tile & union)
                full += all(tile <= keys for keys in seen)
    dense = ceil(bound.num_queries / q_tile) * ceil(n / kv_tile)
    assert bound.tiles(q_tile, kv_tile) == axis.tiles(
        q_tile, kv_tile, num_sinks=bound.pattern.num_sinks, first=bound.offset
    )
    assert bound.tiles(q_tile, kv_tile) == (static, dynamic, full, dense)
    if bound.pattern.border != "pad":
        assert bound.is_block_sparse(q_tile, kv_tile) == (full == static)


def test_dilated_sinks_cost_a_block_of_their_own():
    without, with_sinks = (
        Neighborhood(4, dilation=3, is_causal=True, num_sinks=n).on(48).tiles(4, 4) for n in (0, 5)
    )
    query_tiles = 3 * ceil(16 / 4)
    assert query_tiles <= with_sinks.static - without.static <= query_tiles * ceil(5 / 4)
    assert with_sinks.full == without.full


@some
@given(
    bounds(largest=12, short=False, sinks=False),
    bounds(largest=12, short=False, sinks=False),
    st.sampled_from([(1, 2), (2, 4), (3, 2)]),
)
def test_tiles_of_two_axes_multiply(a, b, tile):
    names = ("kernel_size", "stride", "dilation", "is_causal")
    both = {name: (getattr(a.pattern, name), getattr(b.pattern, name)) for name in names}
    bound = Neighborhood(**both, border="truncate").on((a.num_keys, b.num_keys))
    one = [axis.tiles(q, kv) for axis, q, kv in zip(bound.axes, tile, tile[::-1], strict=True)]
    assert bound.tiles(tile, tile[::-1]) == tuple(x * y for x, y in zip(*one, strict=True))


def natten_says_block_sparse(n, k, s, q_tile, kv_tile):
    """The arithmetic test of NATTEN's kernels for one axis without dilation."""
    left, start = k // 2, 0
    if k == n:
        return True
    if s % q_tile or k % kv_tile:
        return False
    if n % s:
        start = min(max(min((n - 1) // s * s + s // 2, n - 1) - left, 0), n - k)
    two_runs = n % kv_tile == 0 and ceil(n / s) == 2 and s + s // 2 >= n - k
    return start % kv_tile == 0 and ((left - s // 2) % kv_tile == 0 or two_runs)


def test_block_sparse_holds_wherever_natten_says_so():
    agreed = 0
    for n in range(1, 33):
        for k in range(1, n + 1):
            for s, q_tile, kv_tile in product(range(1, k + 1), (2, 4, 8), (2, 4, 8)):
                if natten_says_block_sparse(n, k, s, q_tile, kv_tile):
                    assert Neighborhood(k, s).on(n).is_block_sparse(q_tile, kv_tile), (
                        n,
                        k,
                        s,
                        q_tile,
                        kv_tile,
                    )
                    agreed += k < n
    assert agreed > 100


def test_padding_is_never_block_sparse_where_windows_reach_outside():
    assert Neighborhood(8, 8).on(32).is_block_sparse(8, 8)
    assert Neighborhood(8, 8, border="pad").on(32).is_block_sparse(8, 8)  # its own block exactly
    assert not Neighborhood(16, 8, border="pad").on(32).is_block_sparse(8, 4)


@some
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_dilation_is_so_many_interleaved_problems(n, d, k, is_causal):
    k = min(k, n)
    bound, plain = (
        Neighborhood(k, dilation=d, is_causal=is_causal).on(n * d),
        Neighborhood(k, is_causal=is_causal).on(n),
    )
    for query in range(n * d):
        assert bound.keys(query) == [j * d + query % d for j in plain.keys(query // d)]


@some
@given(st.integers(1, 6), st.integers(1, 6))
def test_a_stride_of_the_whole_kernel_is_windows_that_tile(windows, size):
    bound = Neighborhood(size, stride=size).on(windows * size)
    for query in range(bound.num_queries):
        first = query // size * size
        assert bound.keys(query) == list(range(first, first + size))


def test_a_kernel_of_the_whole_side_sees_everything():
    assert Neighborhood((5, 7)).on((5, 7)).kept == 1
    assert Neighborhood(100, is_causal=True).on(64).num_pairs == 64 * 65 // 2


def test_border_keys_are_seen_more_often():
    counts = [len(Neighborhood(7).on(30).queries(j)) for j in range(30)]
    assert counts[15] == 7
    assert max(counts) == counts[6] == 7 + 7 // 2  # the last key that the shifted windows hold


def test_the_mask_takes_tensors_too():
    torch = pytest.importorskip("torch")
    for bound in (
        Neighborhood((3, 4), (2, 1), (1, 2), (True, False), "truncate").on((5, 9)),
        Neighborhood(6, 3, num_sinks=3, is_causal=True).on(20, num_queries=7),
        Neighborhood(5, 2, 3).on(17),
    ):
        queries, keys = torch.arange(bound.num_queries)[:, None], torch.arange(bound.num_keys)[None]
        table = bound.mask_mod(0, 0, queries, keys)
        expected = [
            [bool(bound.mask_mod(0, 0, q, j)) for j in range(bound.num_keys)]
            for q in range(bound.num_queries)
        ]
        assert table.tolist() == expected


def test_counting_is_quick_on_a_million_tokens():
    start = time.process_time()
    long = Neighborhood(4096, 16, 3, True, num_sinks=4).on(1 << 20)
    cube = Neighborhood((31, 15, 7), (3, 5, 1), border="truncate").on((100, 100, 100))
    assert 0 < long.kept < 1
    assert 0 < cube.kept < 1
    assert long.tiles(64, 64).static > 0
    assert cube.tiles((4, 4, 4), (4, 4, 4)).static > 0
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("settings", "grid", "sentence"),
    [
        ({"kernel_size": 0}, 4, "at least 1"),
        ({"kernel_size": True}, 4, "whole numbers"),
        ({"kernel_size": 3.0}, 4, "whole numbers"),
        ({"kernel_size": 3, "stride": 4}, 9, "exceeds kernel_size"),
        ({"kernel_size": (3, 5), "stride": (2, 2, 2)}, (9, 9), "number of dimensions"),
        ({"kernel_size": ()}, 9, "number of dimensions"),
        ({"kernel_size": 3, "is_causal": "yes"}, 9, "true or false"),
        ({"kernel_size": 3, "border": "wrap"}, 9, "Choose one of shift, truncate, pad"),
        ({"kernel_size": 3, "num_sinks": -1}, 9, "at least 0"),
        ({"kernel_size": 3, "num_sinks": 1}, (9, 9), "one dimension"),
        ({"kernel_size": 5, "dilation": 2}, 9, "kernel_size of at most 4"),
        ({"kernel_size": 2, "dilation": 10}, 9, "border='truncate'"),
        ({"kernel_size": (3, 3)}, 9, "1 dimensions"),
        ({"kernel_size": 3}, (2, 2, 2, 2), "one to three sides"),
        ({"kernel_size": 1}, (4, 0), "at least 1 token"),
    ],
)
def test_what_cannot_be_bound_is_refused_with_a_way_out(settings, grid, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        Neighborhood(**settings).on(grid)


def test_short_queries_are_for_one_causal_axis():
    with pytest.raises(ValueError, match="one causal dimension"):
        Neighborhood(3).on(9, num_queries=2)
    with pytest.raises(ValueError, match="q_tile=0"):
        Neighborhood(3).on(9).tiles(0, 4)
