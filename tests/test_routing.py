"""Laws of routing attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.dense import dense_attention
from nearfield.ops.routing import (
    Centroids,
    Routing,
    assign,
    commitment_loss,
    ema_update,
    kmeans_init,
    routing_attention,
    routing_attention_decode,
    routing_cache,
    tiled,
    unrouted_fraction,
)
from nearfield.ops.routing.members import largest, positions
from nearfield.ops.routing.slots import add_up, slots, take
from nearfield.testing import assert_close, poisoned_empty, qkv

NATIVE = library.unavailable() is None
ROUTINGS = [
    Routing(4),
    Routing(4, sees_self=False),
    Routing(4, "balanced", is_causal=False),
    Routing(4, "balanced", is_causal=False, sees_self=False),
    Routing(4, "parity"),
    Routing(4, "parity", is_causal=False),
    Routing(4, "parity", sees_self=False),
]


def means(heads: int, clusters: int, dim: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(heads, clusters, dim, generator=draw, dtype=torch.float64)


def backends(routing: Routing) -> list[str]:
    fit = NATIVE and routing.selection == "causal" and routing.sees_self
    return ["tiled", "native"] if fit else ["tiled"]


def loops(
    query: Tensor, key: Tensor, value: Tensor, centroids: Tensor, routing: Routing, mask: Tensor | None
) -> Tensor:
    """The definition, one query and one cluster at a time, with lists of Python."""
    batch, tokens, heads, dim = query.shape
    group = heads // key.shape[2]
    out = query.new_zeros(batch, tokens, heads, value.shape[-1])
    for b in range(batch):
        real = [t for t in range(tokens) if mask is None or mask[b, t]]
        for h in range(heads):
            k, v = key[b, :, h // group], value[b, :, h // group]
            near_q = [
                [float(F.normalize(query[b, t, h], dim=0) @ c) for t in range(tokens)] for c in centroids[h]
            ]
            near_k = [[float(F.normalize(k[t], dim=0) @ c) for t in range(tokens)] for c in centroids[h]]
            sums = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(near_q, near_k, strict=True)]
            homes = [max(range(len(sums)), key=[row[t] for row in sums].__getitem__) for t in range(tokens)]
            results: dict[int, list[Tensor]] = {t: [] for t in real}
            for c in range(len(centroids[h])):
                if routing.selection == "causal":
                    asks = sees = [t for t in real if homes[t] == c]
                else:
                    asks, sees = (
                        sorted(real, key=lambda t: (-near[c][t], t))[: routing.window_size]
                        for near in (near_q, near_k)
                    )
                for i in asks:
                    seen = sorted(j for j in sees if j <= i or not routing.is_causal)
                    if routing.selection == "causal":
                        seen = seen[-routing.window_size :]
                    if not routing.sees_self and seen != [i]:
                        seen = [j for j in seen if j != i]
                    if seen:
                        weights = (k[seen] @ query[b, i, h] * dim**-0.5).softmax(0)
                        results[i].append(weights @ v[seen])
            extra = 1e-2 if routing.selection == "parity" else 0
            for i, parts in results.items():
                if parts:
                    out[b, i, h] = sum(parts) / (len(parts) + extra)
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_every_backend_is_the_definition(routing: Routing, masked: bool) -> None:
    q, k, v = qkv(2, 13, 4, 6, num_kv_heads=2, value_dim=5, dtype=torch.float64)
    mask = torch.rand(2, 13, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    centroids = means(4, 3, 6)
    expected = loops(q, k, v, centroids, routing, mask)
    if mask is not None:  # whatever a masked token holds
        for x in (q, k, v):
            x[~mask] = torch.nan
    for backend in ("reference", "tiled", "auto"):
        found = routing_attention(q, k, v, centroids, routing, key_mask=mask, backend=backend)
        assert_close(found, expected)


@pytest.mark.parametrize("routing", [ROUTINGS[1], ROUTINGS[4]], ids=str)
def test_the_reference_has_all_derivatives(routing: Routing) -> None:
    tensors = qkv(1, 5, 2, 2, num_kv_heads=1, dtype=torch.float64, requires_grad=True)

    def call(*inputs: Tensor) -> Tensor:
        return routing_attention(*inputs, means(2, 2, 2), routing, backend="reference")

    assert torch.autograd.gradcheck(call, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2, 8), (2, 63, 4, 12)])
def test_fast_equals_reference_in_output_and_gradients(shape: tuple[int, ...], routing: Routing) -> None:
    centroids = means(shape[2], 5, shape[3])
    draws = qkv(*shape, num_kv_heads=2, value_dim=7)
    mask = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) < 0.8
    for key_mask in (None, mask):
        options = {"key_mask": key_mask, "scale": 0.3}
        for backend in backends(routing):
            results = []
            for name in (backend, "reference"):
                tensors = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in draws]
                with poisoned_empty():
                    out = routing_attention(*tensors, centroids, routing, backend=name, **options)
                pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
                results.append([out, *torch.autograd.grad((out * pull).sum(), tensors)])
            for number, (a, e) in enumerate(zip(*results, strict=True)):
                assert_close(a, e, gradient=number > 0)


def test_low_precision_is_near_the_reference_of_the_same_tensors() -> None:
    tensors = qkv(1, 33, 2, 8, dtype=torch.bfloat16)
    for routing in (Routing(8), Routing(8, "balanced", is_causal=False)):
        expected = routing_attention(
            *(x.double() for x in tensors), means(2, 3, 8), routing, backend="reference"
        )
        for backend in backends(routing):
            assert_close(routing_attention(*tensors, means(2, 3, 8), routing, backend=backend), expected)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    clusters=st.integers(1, 6),
    window=st.integers(1, 45),
    number=st.integers(0, len(ROUTINGS) - 1),
    seed=st.integers(0, 100),
)
def test_any_shape_gives_the_reference(
    tokens: int, clusters: int, window: int, number: int, seed: int
) -> None:
    pattern = ROUTINGS[number]
    routing = Routing(window, pattern.selection, pattern.is_causal, pattern.sees_self)
    q, k, v = qkv(1, tokens, 2, 4, dtype=torch.float64, seed=seed)
    centroids = means(2, clusters, 4, seed)
    expected = routing_attention(q, k, v, centroids, routing, backend="reference")
    assert_close(routing_attention(q, k, v, centroids, routing, backend="tiled"), expected)
    ones = routing_attention(q, k, torch.ones_like(v), centroids, routing, backend="tiled")
    if routing.selection != "parity":  # the weights of a query sum to one, or it is in no cluster
        assert ((ones - 1).abs().amin(-1) < 1e-12).logical_or((ones == 0).all(-1)).all()


def test_one_cluster_that_holds_all_is_dense_attention() -> None:
    q, k, v = qkv(2, 9, 2, 4)
    for routing in (Routing(9), Routing(20, "balanced", is_causal=False)):
        for backend in ("reference", *backends(routing)):
            out = routing_attention(q, k, v, means(2, 1, 4), routing, backend=backend)
            assert_close(out, dense_attention(q, k, v, is_causal=routing.is_causal))


def test_queries_may_meet_other_keys() -> None:
    q, (_, k, v) = qkv(2, 7, 2, 4)[0], qkv(2, 19, 2, 4)
    routing = Routing(5, "balanced", is_causal=False)
    outs = [routing_attention(q, k, v, means(2, 3, 4), routing, backend=b) for b in ("tiled", "reference")]
    assert outs[0].shape == q.shape
    assert_close(*outs)


@pytest.mark.parametrize("backend", ["reference", *backends(Routing(4))])
def test_causal_routing_ignores_a_poisoned_future(backend: str) -> None:
    q, k, v = qkv(2, 40, 2, 8)
    clean = routing_attention(q, k, v, means(2, 3, 8), Routing(4), backend=backend)
    for first in (1, 17, 39):
        tensors = [x.clone() for x in (q, k, v)]
        for x in tensors:
            x[:, first:] = 1e30
        out = routing_attention(*tensors, means(2, 3, 8), Routing(4), backend=backend)
        assert_close(out[:, :first], clean[:, :first])
        assert not torch.allclose(out[:, first:], clean[:, first:])


def test_the_published_selection_leaks_the_future() -> None:
    """Later tokens nearer to the centroids push earlier ones out, though no query sees a later key."""
    q, k, v = qkv(1, 24, 1, 4)
    centroids = means(1, 2, 4)
    routing = Routing(6, "parity")
    clean = routing_attention(q, k, v, centroids, routing)
    q, k = q.clone(), k.clone()
    q[:, 12:] = k[:, 12:] = centroids[0, 0].float()
    assert not torch.allclose(routing_attention(q, k, v, centroids, routing)[:, :12], clean[:, :12])


@pytest.mark.parametrize("routing", [Routing(4), Routing(4, sees_self=False), Routing(100)], ids=str)
@pytest.mark.parametrize("prompt", [0, 11])
def test_decoding_step_by_step_is_the_whole(routing: Routing, prompt: int) -> None:
    q, k, v = qkv(2, 22, 4, 8, num_kv_heads=2, value_dim=5)
    centroids = means(4, 3, 8)
    whole = routing_attention(q, k, v, centroids, routing)
    cache = routing_cache(*(x[:, :prompt] for x in (q, k, v)), centroids, routing)
    assert cache.key.shape == (2, 4, 3, routing.window_size, 8)
    for t in range(prompt, 21):
        new = [x[:, t : t + 1] for x in (q, k, v)]
        out, cache = routing_attention_decode(*new, centroids, routing, cache)
        assert_close(out, whole[:, t : t + 1])
    assert (cache.counts.sum(-1) == 21).all()


def test_a_masked_prompt_leaves_the_cache_of_its_real_tokens() -> None:
    q, k, v = qkv(2, 20, 2, 8)
    mask = (torch.arange(20) >= 6).expand(2, 20)
    padded = routing_cache(q, k, v, means(2, 3, 8), Routing(4), key_mask=mask)
    alone = routing_cache(*(x[:, 6:] for x in (q, k, v)), means(2, 3, 8), Routing(4))
    for a, b in zip(padded, alone, strict=True):
        assert torch.equal(a, b)


def test_padding_changes_nothing_for_the_rest() -> None:
    q, k, v = qkv(2, 14, 2, 4)
    longer = [F.pad(x, (0, 0, 0, 0, 0, 5), value=9.0) for x in (q, k, v)]
    mask = (torch.arange(19) < 14).expand(2, 19)
    for routing in ROUTINGS:
        out = routing_attention(*longer, means(2, 3, 4), routing, key_mask=mask)
        assert_close(out[:, :14], routing_attention(q, k, v, means(2, 3, 4), routing))
        assert not out[:, 14:].any()


def dense_emulator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    window: int,
    scale: float,
    divisor: float,
    self_logit: float,
) -> Tensor:
    """Causal published routing with shared queries and keys, `[B, H, N, D]`: top-k, gather, scatter."""
    scores = torch.einsum("bhnd,hcd->bhcn", F.normalize(k, dim=-1), centroids)
    index = scores.topk(window).indices.sort().values  # [B, H, C, W]
    total, count = torch.zeros_like(v), torch.zeros_like(v)
    for c in range(index.shape[2]):
        at = index[:, :, c, :, None].expand(-1, -1, -1, q.shape[-1])
        qs, ks, vs = (x.gather(2, at) for x in (q, k, v))
        logits = qs @ ks.transpose(-1, -2) * scale
        logits = logits + torch.eye(window) * self_logit
        logits = logits.masked_fill(torch.ones(window, window).triu(1).bool(), -1e9)
        total.scatter_add_(2, at, logits.softmax(-1) @ vs)
        count.scatter_add_(2, at, torch.ones_like(vs))
    return total / (count + divisor)


def test_parity_with_the_published_decoder() -> None:
    """Normalised queries are the keys, logits are not scaled, a single membership shrinks by one per cent."""
    x, _, v = qkv(2, 24, 3, 8, dtype=torch.float64)
    x = F.layer_norm(x, (8,))
    centroids = means(3, 4, 8)
    expected = dense_emulator(*(y.transpose(1, 2) for y in (x, x, v)), centroids, 6, 1.0, 1e-2, 0.0)
    for backend in ("tiled", "reference"):
        found = routing_attention(x, x, v, centroids, Routing(6, "parity"), scale=1.0, backend=backend)
        assert_close(found, expected.transpose(1, 2), within=1e-10)


def test_parity_with_shared_keys_that_see_themselves_last() -> None:
    x, _, v = qkv(2, 24, 3, 8, dtype=torch.float64)
    k = F.normalize(x, dim=-1)
    expected = dense_emulator(*(y.transpose(1, 2) for y in (x, k, v)), means(3, 4, 8), 6, 8**-0.5, 1e-2, -5e4)
    found = routing_attention(x, k, v, means(3, 4, 8), Routing(6, "parity", sees_self=False))
    assert_close(found, expected.transpose(1, 2), within=1e-10)


def test_equal_scores_are_settled_by_position() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]])
    assert positions(largest(scores, 3), 3).tolist() == [[0, 1, 3], [0, 1, 2]]
    assert not largest(scores, 0).any() and largest(scores, 9).all()
    assert positions(largest(torch.full((1, 4), -torch.inf), 2), 2).tolist() == [[4, 4]]


def test_slots_and_tokens_are_each_others_transpose() -> None:
    token = torch.tensor([[[2, 0, 2, 5, 4, 2, 0]]])  # of five tokens; 5 is an empty slot
    at = slots(token, 5, 3)
    dense = (token[0, 0][:, None] == torch.arange(5)).double()  # [S, N]
    y = torch.randn(1, 1, 7, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 1, 5, 3, dtype=torch.float64, requires_grad=True)
    assert_close(add_up(y, at)[0, 0], dense.T @ y[0, 0])
    assert_close(take(x, at)[0, 0][token[0, 0] < 5], (dense @ x[0, 0])[token[0, 0] < 5])
    keep = (token < 5)[..., None]
    for call, z in ((lambda y: add_up(y, at), y), (lambda x: take(x, at) * keep, x)):
        assert torch.autograd.gradcheck(call, (z,))
        assert torch.autograd.gradgradcheck(call, (z,))


def test_the_comparison_notices_a_backend_off_by_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(1, 20, 1, 4)
    routing = Routing(5, "balanced", is_causal=False)
    expected = routing_attention(q, k, v, means(1, 3, 4), routing, backend="reference")

    def wrong(chosen: Tensor, count: int) -> Tensor:
        found = positions(chosen, count)
        return torch.cat([(found[..., :1] + 1) % 20, found[..., 1:]], -1)

    monkeypatch.setattr(tiled, "positions", wrong)
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(routing_attention(q, k, v, means(1, 3, 4), routing, backend="tiled"), expected)


def test_tokens_in_no_cluster_are_counted() -> None:
    q, k, v = qkv(2, 24, 2, 4)
    mask = (torch.arange(24) < 20).expand(2, 24)
    for routing, low in ((Routing(4), 0.0), (Routing(4, "balanced", is_causal=False), 1e-9)):
        found = unrouted_fraction(q, k, means(2, 3, 4), routing, key_mask=mask)
        out = routing_attention(q, k, v, means(2, 3, 4), routing, key_mask=mask)
        assert_close(found, (out[:, :20] == 0).all(-1).float().mean(1))
        assert (found >= low).all() and found.shape == (2, 2)


def test_centroids_from_data_find_the_directions() -> None:
    """Tokens around three axes end in three clusters, one of each, the same for the same generator."""
    draw = torch.Generator().manual_seed(0)
    kind = torch.randint(3, (4, 50), generator=draw)
    x = (torch.eye(3)[kind] * 5 + 0.2 * torch.randn(4, 50, 3, generator=draw))[:, :, None].expand(
        -1, -1, 2, -1
    )
    for seed in range(3):
        states = [kmeans_init(x, 3, generator=torch.Generator().manual_seed(seed)) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
        assert (states[0].means.norm(dim=-1) - 1).abs().max() < 1e-6
        assert (states[0].counts.sum(-1) == 200).all()
    groups = assign(x, torch.eye(3).expand(2, 3, 3))
    assert torch.equal(groups[..., 0], kind) and torch.equal(groups[..., 1], kind)


def test_an_update_moves_centroids_slowly_and_leaves_empty_ones() -> None:
    start = torch.eye(4)[None, :3]  # nothing will be near the third
    state = Centroids(start, torch.ones(1, 3), start)
    x = F.normalize(torch.tensor([[3.0, 0, 0, 1.0], [3.0, 0, 0, -0.5], [0, 2.0, 0, 0.5]]), dim=-1)[
        None, :, None
    ]
    new = ema_update(state, x, decay=0.99)
    assert torch.equal(new.means[:, 2], start[:, 2]) and torch.equal(new.counts[:, 2], state.counts[:, 2])
    first = F.normalize(0.99 * start[0, 0] + 0.01 * x[0, :2, 0].sum(0), dim=-1)
    assert_close(new.means[0, 0], first)
    assert (new.means * start).sum(-1).min() > 0.999  # one small batch does not throw them off
    raw = ema_update(state, x, decay=0.99, normalise=False)
    assert_close(raw.means, raw.sums / raw.counts[..., None])


def test_an_update_counts_no_masked_token_and_adds_up_over_processes() -> None:
    x = qkv(4, 10, 2, 4)[1]
    state = kmeans_init(x, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 10, generator=torch.Generator().manual_seed(0)) < 0.6
    whole = ema_update(state, x, decay=0.5, mask=mask)
    poisoned = ema_update(state, x.masked_fill(~mask[..., None, None], torch.nan), decay=0.5, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(whole, poisoned, strict=True))

    sent: list[Tensor] = []
    ema_update(state, x[2:], decay=0.5, mask=mask[2:], reduce=lambda y: sent.append(y) or y)
    both = ema_update(state, x[:2], decay=0.5, mask=mask[:2], reduce=lambda y: y + sent.pop(0))
    for a, b in zip(both, whole, strict=True):
        assert_close(a, b)


def test_commitment_pulls_tokens_and_not_centroids() -> None:
    x = qkv(2, 6, 2, 4, dtype=torch.float64)[0].requires_grad_()
    centroids = F.normalize(means(2, 3, 4), dim=-1).requires_grad_()
    loss = commitment_loss(x, centroids)
    grads = torch.autograd.grad(loss, (x, centroids), allow_unused=True)
    assert grads[0].any() and grads[1] is None
    assert torch.autograd.gradcheck(lambda x: commitment_loss(x, centroids), (x,))
    at = centroids.detach()[:, 0].expand(2, 6, 2, 4)
    assert float(commitment_loss(at * 3, centroids)) < 1e-20
    mask = (torch.arange(6) < 4).expand(2, 6)
    assert_close(commitment_loss(x, centroids, mask=mask), commitment_loss(x[:, :4], centroids))


def test_autocast_computes_in_the_lower_precision() -> None:
    tensors, halves = qkv(1, 20, 2, 8), [x.bfloat16() for x in qkv(1, 20, 2, 8)]
    for routing in (Routing(4), Routing(4, "balanced", is_causal=False)):
        with torch.autocast("cpu", torch.bfloat16):
            out = routing_attention(*tensors, means(2, 3, 8), routing)
        assert torch.equal(out, routing_attention(*halves, means(2, 3, 8), routing))
    x, state = tensors[0], kmeans_init(tensors[0], 3, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = ema_update(state, x)
        cache = routing_cache(*tensors, means(2, 3, 8), Routing(4))
        out = routing_attention_decode(*(y[:, :1] for y in tensors), means(2, 3, 8), Routing(4), cache).output
    assert out.dtype == cache.key.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(inside, ema_update(state, x), strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's fused attention under vmap
@pytest.mark.parametrize("routing", [Routing(4), ROUTINGS[2], Routing(4, "parity")], ids=str)
def test_vmap_is_a_batch(routing: Routing) -> None:
    tensors = qkv(3, 2, 12, 2, 4)
    centroids = means(2, 3, 4)
    found = torch.vmap(lambda q, k, v: routing_attention(q, k, v, centroids, routing))(*tensors)
    parts = [routing_attention(*x, centroids, routing) for x in zip(*tensors, strict=True)]
    assert_close(found, torch.stack(parts))


@pytest.mark.compile
@pytest.mark.parametrize("routing", [Routing(4), Routing(4, "parity")], ids=str)
def test_it_compiles_whole_with_moving_sizes(routing: Routing) -> None:
    torch._dynamo.reset()
    centroids = means(2, 3, 4)
    compiled = torch.compile(routing_attention, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (11, 26):
        results = []
        for call in (compiled, routing_attention):
            tensors = [x.requires_grad_() for x in qkv(1, tokens, 2, 4)]
            out = call(*tensors, centroids, routing)
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        for number, (a, e) in enumerate(zip(*results, strict=True)):
            assert_close(a, e, gradient=number > 0)


def test_work_grows_with_clusters_and_window_not_with_all_pairs() -> None:
    """The same products per token whatever their number: N * window, blocks of twice that at most."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for tokens in (256, 1024):
        with FlopCounterMode(display=False) as counter:
            routing_attention(*qkv(1, tokens, 1, 8), means(1, 4, 8), Routing(32), backend="tiled")
        counts.append(counter.get_total_flops())
    assert math.isclose(counts[1] / counts[0], 4, rel_tol=0.05)


def test_wrong_arguments_are_refused_with_a_way_out() -> None:
    q, k, v = qkv(1, 8, 2, 4)
    centroids = means(2, 3, 4)
    for options, says in (
        ({"window_size": 0}, "at least 1"),
        ({"window_size": 4, "selection": "casual"}, "'causal'"),
        ({"window_size": 4, "is_causal": False}, "balanced"),
        ({"window_size": 4, "selection": "balanced"}, "leak the future"),
    ):
        with pytest.raises(ValueError, match=says):
            Routing(**options)
    with pytest.raises(TypeError, match=r"Routing\(256\)"):
        routing_attention(q, k, v, centroids, 4)
    with pytest.raises(ValueError, match="centroids has shape"):
        routing_attention(q, k, v, centroids[:1], Routing(4))
    with pytest.raises(ValueError, match="routing_attention_decode"):
        routing_attention(q[:, :1], k, v, centroids, Routing(4))
    with pytest.raises(TypeError, match="key_mask has dtype"):
        routing_attention(q, k, v, centroids, Routing(4), key_mask=torch.ones(1, 8))
    with pytest.raises(ValueError, match="whole text"):
        routing_cache(q, k, v, centroids, Routing(4, "parity"))
    with pytest.raises(BackendUnavailable, match="no such backend"):
        routing_attention(q, k, v, centroids, Routing(4), backend="triton")
    with pytest.raises(BackendUnavailable, match="selection='causal'"):
        routing_attention(q, k, v, centroids, Routing(4, "parity"), backend="native")
    with pytest.raises(ValueError, match="num_clusters=9"):
        kmeans_init(k, 9)
    with pytest.raises(ValueError, match="decay"):
        ema_update(Centroids(centroids, torch.ones(2, 3), centroids), k, decay=1.0)
