"""Torch's own attention modules: seen inside a `with`, made local for good, given back exactly."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfield.hosts.local import attend, key_mask_of
from nearfield.hosts.seam import Site, attention, sites
from nearfield.hosts.torch_nn import install
from nearfield.ops.neighborhood import Neighborhood
from nearfield.plan.pattern import GroupPlan, SitePlan
from tests.test_seam import Vit, answer, nothing, one_thread, state  # noqa: F401

N, DIM, HEADS = 6, 16, 4

pytestmark = pytest.mark.filterwarnings(  # torch's own, of the masks and the packing that hosts really use
    "ignore:Support for mismatched", "ignore:The PyTorch API of nested tensors"
)


def plan(name, *groups):
    return {name: SitePlan(name, tuple(GroupPlan(heads, pattern) for heads, pattern in groups))}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal(n=N):
    return nn.Transformer.generate_square_subsequent_mask(n)


PADDING = torch.arange(N) >= torch.tensor([[N], [4], [3]])  # True: padded

MHA_CASES = [
    {},
    {"key_padding_mask": PADDING},
    {"attn_mask": causal(), "is_causal": True},
    {"attn_mask": causal()},
    {"attn_mask": causal(), "is_causal": True, "key_padding_mask": PADDING},
    {"attn_mask": draw(N, N) > 1.0},
    {"attn_mask": draw(3 * HEADS, N, N)},
    {"attn_mask": draw(N, N) > 1.0, "key_padding_mask": draw(3, N) > 2.0},
    {"attn_mask": draw(N, N), "key_padding_mask": PADDING},
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "options", [{"batch_first": True}, {}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}]
)
def test_multihead_attention_equals_its_twin(options, grad):
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(DIM, HEADS, **options).eval()
    x = draw(3, N, DIM) if mha.batch_first else draw(N, 3, DIM)
    with torch.set_grad_enabled(grad):
        for case in MHA_CASES:
            for need_weights in (True, False):
                alone, weights = mha(x, x, x, need_weights=need_weights, **case)
                with attention(mha, nothing):
                    out, inside = mha(x, x, x, need_weights=need_weights, **case)
                assert torch.equal(out, alone)
                assert (inside is None) == (weights is None)
                assert weights is None or torch.equal(inside, weights)
                with attention(mha, answer):
                    out, inside = mha(x, x, x, need_weights=need_weights, **case)
                torch.testing.assert_close(out, alone, msg=f"{options} {case.keys()}")
                assert inside is None
    assert "forward" not in vars(mha)


def test_multihead_attention_of_other_shapes():
    torch.manual_seed(0)
    cross = nn.MultiheadAttention(DIM, HEADS, kdim=5, vdim=7, batch_first=True).eval()
    q, k, v = draw(2, N, DIM), draw(2, 3, 5), draw(2, 3, 7)
    found = []
    with attention(cross, lambda call: found.append(call.site) or answer(call)):
        inside = cross(q, k, v)[0]
    torch.testing.assert_close(inside, cross(q, k, v)[0])
    assert (found[0].role, found[0].grid) == ("cross", None)
    one = nn.MultiheadAttention(DIM, HEADS, batch_first=True).eval()
    x = draw(N, DIM)
    with attention(one, answer):
        inside = one(x, x, x, key_padding_mask=PADDING[1], attn_mask=draw(HEADS, N, N))[0]
    torch.testing.assert_close(
        inside, one(x, x, x, key_padding_mask=PADDING[1], attn_mask=draw(HEADS, N, N))[0]
    )


def test_direct_calls_of_the_functional_form():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(DIM, HEADS).eval()

        def forward(self, x):
            m = self.inner
            return F.multi_head_attention_forward(
                x, x, x, DIM, HEADS, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.1,
                m.out_proj.weight, m.out_proj.bias, training=False, need_weights=False,
            )[0]  # fmt: skip

    pool, x = Pool(), draw(N, 2, DIM)
    assert [s.name for s in sites(pool, x)] == [""]
    with attention(pool, answer):
        inside = pool(x)
    torch.testing.assert_close(inside, pool(x))
    with attention(pool, nothing):
        assert torch.equal(pool(x), pool(x))


def encoder(norm_first=False, num_layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, 32, dropout=0.0, batch_first=True, norm_first=norm_first, **options
    )
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=not norm_first).eval()


ENCODER_CASES = [
    {},
    {"src_key_padding_mask": PADDING},
    {"mask": causal(), "is_causal": True},
    {"mask": causal(), "src_key_padding_mask": PADDING.float().masked_fill(PADDING, -torch.inf)},
]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])  # without gradients torch takes its fused path
@pytest.mark.parametrize("case", ENCODER_CASES, ids=lambda case: "+".join(case) or "plain")
def test_encoder_fast_path_is_seen_and_bit_equal(norm_first, grad, case):
    model, x = encoder(norm_first), draw(3, N, DIM)
    before = state(model)
    with torch.set_grad_enabled(grad):
        alone = model(x, **case)
        names = []
        with attention(model, lambda call: names.append(call.site.name)):
            assert torch.equal(model(x, **case), alone)
        assert names == ["layers.0.self_attn", "layers.1.self_attn"]
        assert state(model) == before
        with attention(model, answer):
            torch.testing.assert_close(model(x, **case), alone)
        with attention(model, nothing), attention(model, nothing):
            assert torch.equal(model(x, **case), alone)
        with attention(model, answer), attention(model, nothing):
            torch.testing.assert_close(model(x, **case), alone)


def test_decoder_and_whole_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(DIM, HEADS, 1, 2, 32, batch_first=True).eval()
    src, tgt = draw(2, 5, DIM), draw(2, N, DIM, seed=1)
    found = sites(model, src, tgt, tgt_mask=causal(), tgt_is_causal=True)
    assert [(s.name, s.role, s.is_causal) for s in found] == [
        ("encoder.layers.0.self_attn", "self", False),
        ("decoder.layers.0.self_attn", "self", True),
        ("decoder.layers.0.multihead_attn", "cross", False),
        ("decoder.layers.1.self_attn", "self", True),
        ("decoder.layers.1.multihead_attn", "cross", False),
    ]
    with torch.no_grad():
        alone = model(src, tgt, tgt_mask=causal(), tgt_is_causal=True)
        with attention(model, nothing):
            assert torch.equal(model(src, tgt, tgt_mask=causal(), tgt_is_causal=True), alone)


def local_by_hand(query, key, value, pattern, grid, prefix=0, key_mask=None):
    """Dense attention under the mask that says what a local site with prefix tokens sees."""
    size = torch.tensor(grid).prod().item()
    n = prefix + size
    seen = torch.ones(n, n, dtype=torch.bool)
    bound = pattern.on(grid)
    for i in range(size):
        row = torch.zeros(size, dtype=torch.bool)
        row[bound.keys(i)] = True
        seen[prefix + i, prefix:] = row
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    share = query.shape[2] // key.shape[2]
    q, k, v = query, key.repeat_interleave(share, 2), value.repeat_interleave(share, 2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


FULL = Neighborhood(5, border="truncate"), None


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_attend_with_prefix_tokens_and_groups(prefix):
    grid, kv, share = (4, 5), 4, 2
    n = prefix + 20
    q, k, v = draw(2, n, kv * share, 8), draw(2, n, kv, 8, seed=1), draw(2, n, kv, 6, seed=2)
    site = Site("a", "self", grid, prefix, False, kv * share, kv)
    near, far = Neighborhood(3), Neighborhood((1, 2), stride=(1, 2), dilation=2, border="truncate")
    groups = plan("a", ((0, 3), near), ((1,), None), ((2,), far))["a"]
    out = attend(q, k, v, site, groups)
    for head, pattern in enumerate((near, Neighborhood(9, border="truncate"), far, near)):
        heads = slice(head * share, head * share + share)
        one = slice(head, head + 1)
        wanted = local_by_hand(q[:, :, heads], k[:, :, one], v[:, :, one], pattern, grid, prefix)
        torch.testing.assert_close(out[:, :, heads], wanted)


def test_attend_one_pattern_copies_nothing_and_full_is_dense():
    q, k, v = draw(1, 20, 4, 8), draw(1, 20, 2, 8, seed=1), draw(1, 20, 2, 8, seed=2)
    site = Site("a", "self", (20,), 0, True, 4, 2)
    full = attend(q, k, v, site, SitePlan.uniform("a", 2, None))
    dense = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(full, dense.transpose(1, 2))
    pattern = Neighborhood(4, is_causal=True, num_sinks=2)
    local = attend(q, k, v, site, SitePlan.uniform("a", 2, pattern))
    torch.testing.assert_close(local, local_by_hand(q, k, v, pattern, (20,)))
    late = attend(q[:, -3:], k, v, site, plan("a", ((0,), pattern), ((1,), None))["a"])
    torch.testing.assert_close(late[:, :, :2], local[:, -3:, :2])
    torch.testing.assert_close(late[:, :, 2:], full[:, -3:, 2:])


def test_attend_with_padding_in_full_and_local_groups():
    q, k, v = draw(2, 8, 2, 4), draw(2, 8, 2, 4, seed=1), draw(2, 8, 2, 4, seed=2)
    left = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8], dtype=torch.bool)
    for is_causal, mask in ((True, left), (False, left.flip(1))):
        pattern = Neighborhood(3, is_causal=is_causal, border="truncate")
        site = Site("a", "self", (8,), 0, is_causal, 2, 2)
        out = attend(q, k, v, site, plan("a", ((0,), pattern), ((1,), None))["a"], key_mask=mask)
        wide = Neighborhood(15, is_causal=is_causal, border="truncate")
        for head, own in ((0, pattern), (1, wide)):
            one = slice(head, head + 1)
            wanted = local_by_hand(q[:, :, one], k[:, :, one], v[:, :, one], own, (8,), key_mask=mask)
            torch.testing.assert_close(out[:, :, one], wanted)


@pytest.mark.parametrize(
    ("change", "pattern", "say"),
    [
        ({"role": "cross", "grid": None}, Neighborhood(3), "cross attention"),
        ({"grid": None}, Neighborhood(3), "no grid"),
        ({"grid": (5,)}, Neighborhood(3), "Give the grid"),
        ({}, Neighborhood(3, is_causal=True), "not causal"),
        ({"is_causal": True}, Neighborhood(3), "causal"),
        ({"num_prefix": 1}, Neighborhood(3), "Give the grid"),
    ],
)
def test_attend_refuses_in_words(change, pattern, say):
    q = draw(1, 8, 2, 4)
    site = Site(**{**vars(Site("where", "self", (8,), 0, False, 2, 2)), **change})
    with pytest.raises(ValueError, match=say):
        attend(q, q, q, site, SitePlan.uniform("where", 2, pattern))
    with pytest.raises(ValueError, match="3 key/value heads"):
        attend(q, q, q, site, SitePlan.uniform("where", 3, pattern))


def test_key_mask_of_takes_padding_and_nothing_more():
    padding = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    lower = torch.ones(4, 4, dtype=torch.bool).tril()
    assert key_mask_of(None, 2, 4, True) is None
    for mask in (padding[:, None, None], padding[:, None, None].expand(2, 3, 4, 4)):
        assert torch.equal(key_mask_of(mask, 2, 4, False), padding)
    late = padding.flip(0)[:1]  # padded on the left
    both = lower & late[:, None, None]
    assert torch.equal(key_mask_of(both, 1, 4, True), late)
    floats = torch.zeros(both.shape).masked_fill(~both, torch.finfo(torch.float32).min)
    assert torch.equal(key_mask_of(floats, 1, 4, True), late)
    assert key_mask_of(torch.ones(1, 1, 1, 4, dtype=torch.bool), 3, 4, False).shape == (3, 4)
    for wrong, is_causal in ((lower, False), (torch.ones(4, 4, dtype=torch.bool), True), (draw(4, 4), False)):
        with pytest.raises(ValueError, match="Leave such a site full"):
            key_mask_of(wrong, 1, 4, is_causal)


RIGHT, LEFT, NONE = [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0] * 5


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("idle", ["as the others", "nothing", "everything"])
def test_key_mask_of_accepts_padding_on_either_side_and_rows_without_keys(is_causal, idle):
    """Whatever rows of padding see, if it is all or nothing: hosts fill them in either way."""
    padding = torch.tensor([RIGHT, LEFT, NONE, [1] * 5], dtype=torch.bool)
    if idle == "everything":  # a last row that sees all says that no key is padding
        padding[0], padding[2] = True, padding[1]
    mask = padding[:, None, None].expand(4, 1, 5, 5)
    mask = mask.tril() if is_causal else mask.clone()
    if idle != "as the others":
        mask[~padding[:, None]] = idle == "everything"
    assert torch.equal(key_mask_of(mask, 4, 5, is_causal), padding)
    assert torch.equal(key_mask_of(mask.expand(4, 2, 5, 5), 4, 5, is_causal), padding)
    floats = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert torch.equal(key_mask_of(floats, 4, 5, is_causal), padding)
    if is_causal:  # fewer queries, aligned at the end
        assert torch.equal(key_mask_of(mask[:2, :, -3:], 2, 5, True), padding[:2])


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("lengths", [(3, 3), (4, 2), (1, 5), (2, 2, 2)])
def test_key_mask_of_refuses_packed_documents(is_causal, lengths):
    packed = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    packed = packed.tril() if is_causal else packed
    plain = torch.ones(6, 6, dtype=torch.bool)
    cut = packed.clone()
    cut[-1] = False  # a last row of padding
    last = torch.block_diag(torch.ones(5, 5).tril() if is_causal else torch.ones(5, 5), torch.ones(1, 1))
    for mask in (
        packed,
        cut,
        last.bool(),
        torch.stack([plain.tril() if is_causal else plain, packed])[:, None],
    ):
        for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
            with pytest.raises(ValueError, match="Leave such a site full"):
                key_mask_of(form, 2, 6, is_causal)


def test_key_mask_of_refuses_what_one_query_or_head_adds():
    lower = torch.ones(2, 3, 6, 6, dtype=torch.bool).tril()
    assert key_mask_of(lower, 2, 6, True).all()
    wrong = [lower.clone() for _ in range(4)]
    wrong[0][1, 2, 3, 1] = False  # one key hidden from one query of one head
    wrong[1][1, 2, 1, 3] = True  # the future shown
    wrong[2][:, :, :2] = False  # queries without keys that are no padding
    wrong[3] = torch.ones(2, 3, 1, 6, dtype=torch.bool).expand(2, 3, 6, 6)  # not causal, by strides
    for mask in wrong:
        with pytest.raises(ValueError, match="more than padding"):
            key_mask_of(mask, 2, 6, True)


def test_install_multihead_attention():
    torch.manual_seed(0)
    mha = nn.Sequential(nn.MultiheadAttention(DIM, HEADS, batch_first=True)).eval()

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = mha[0]

        def forward(self, x, **options):
            return self.attn(x, x, x, **options)[0]

    host, x = Host().eval(), draw(3, N, DIM)
    alone, before = host(x), state(host)
    pattern = Neighborhood(3, border="truncate")
    restore = install(host, plan("attn", ((0, 2), pattern), ((1, 3), None)))
    changed = host(x)
    assert not torch.allclose(changed, alone)
    whole = Neighborhood(2 * N - 1, border="truncate")

    def by_hand(call, key_mask=None):
        out = []
        for head in range(HEADS):
            one = slice(head, head + 1)
            parts = (y[:, :, one] for y in (call.query, call.key, call.value))
            out.append(local_by_hand(*parts, whole if head % 2 else pattern, (N,), key_mask=key_mask))
        return torch.cat(out, 2)

    with attention(host, by_hand):
        torch.testing.assert_close(host(x), changed)
    padded = host(x, key_padding_mask=PADDING)
    with attention(host, lambda call: by_hand(call, ~PADDING)):
        torch.testing.assert_close(host(x, key_padding_mask=PADDING), padded)
    with attention(host, nothing):
        assert torch.equal(host(x), changed)
    with pytest.raises(ValueError, match="Leave such a site full"):
        host(x, attn_mask=draw(N, N))
    clone = copy.deepcopy(host)
    with torch.no_grad():
        clone.attn.in_proj_weight.zero_()
    assert torch.equal(host(x), changed)
    assert not torch.allclose(clone(x), changed)
    restore()
    restore()
    assert state(host) == before
    assert torch.equal(host(x), alone)


@pytest.mark.parametrize("grad", [False, True])
def test_install_encoder_layers_with_padding_and_causality(grad):
    model, x = encoder(), draw(3, N, DIM)
    before, weights = state(model), copy.deepcopy(model.state_dict())
    with torch.set_grad_enabled(grad):
        alone = model(x, src_key_padding_mask=PADDING)
        wide, near = Neighborhood(11, border="truncate"), Neighborhood(3, border="truncate")
        restore = install(model, plan("layers.0.self_attn", (tuple(range(HEADS)), wide)))
        torch.testing.assert_close(model(x, src_key_padding_mask=PADDING), alone)
        restore()
        plans = plan("layers.0.self_attn", ((0, 1), near), ((2, 3), None))
        restore = install(model, plans)
        local = model(x, src_key_padding_mask=PADDING)
        assert not torch.allclose(local, alone)
        poisoned = x.masked_fill(PADDING[..., None], 1e3)
        torch.testing.assert_close(model(poisoned, src_key_padding_mask=PADDING)[~PADDING], local[~PADDING])
        with pytest.raises(ValueError, match="causal"):
            model(x, mask=causal(), is_causal=True)
        restore()
        restore = install(
            model, plan("layers.1.self_attn", (tuple(range(HEADS)), Neighborhood(N, is_causal=True)))
        )
        torch.testing.assert_close(
            model(x, mask=causal(), is_causal=True), _plain(x, mask=causal(), is_causal=True)
        )
        restore()
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def _plain(x, **case):
    return encoder()(x, **case)


@pytest.mark.parametrize(("registers", "fused"), [(0, True), (4, True), (0, False)])
def test_install_vit_attention(registers, fused):
    torch.manual_seed(0)
    model = Vit(registers=registers, fused_attn=fused).eval()
    image = draw(2, 3, 16, 24)
    alone, before = model(image), state(model)
    pattern = Neighborhood(3)
    restore = install(
        model, {**plan("blocks.0", ((0,), pattern), ((1,), None)), **plan("blocks.1", ((0, 1), None))}
    )
    local = model(image)

    def by_hand(call):
        if call.site.name == "blocks.1":
            return None
        site = call.site
        parts = []
        for head, own in enumerate((pattern, Neighborhood(11, border="truncate"))):
            one = slice(head, head + 1)
            tensors = (y[:, :, one] for y in (call.query, call.key, call.value))
            parts.append(local_by_hand(*tensors, own, site.grid, site.num_prefix))
        return torch.cat(parts, 2)

    with attention(model, by_hand):
        torch.testing.assert_close(model(image), local)
    with attention(model, nothing):
        torch.testing.assert_close(model(image), local, rtol=0, atol=0 if fused else 1e-6)
    assert not torch.allclose(local, alone)
    assert model(draw(1, 3, 24, 24)).shape[1] == 1 + registers + 36  # another grid, the same plan
    restore()
    assert state(model) == before
    assert torch.equal(model(image), alone)


def test_installed_hosts_copy_pickle_and_train():
    torch.manual_seed(0)
    model, image = Vit(), draw(1, 3, 16, 16)
    install(model, plan("blocks.0", ((0, 1), Neighborhood(3))))
    local = model(image)
    assert torch.equal(copy.deepcopy(model)(image), local)
    assert torch.equal(pickle.loads(pickle.dumps(model))(image), local)
    local.sum().backward()
    assert model.blocks[0].qkv.weight.grad.isfinite().all()


@pytest.mark.compile
def test_installed_hosts_compile():
    torch.manual_seed(0)
    model, image = Vit(), draw(1, 3, 16, 16)
    install(model, plan("blocks.0", ((0, 1), Neighborhood(3))))
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(image), model(image))


def test_install_refuses_in_words():
    model = encoder()
    wide = (tuple(range(HEADS)), Neighborhood(3))
    before = state(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn"):
        install(model, plan("layers.0.self_atn", wide))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn"):
        install(model, plan("layers.0", wide))
    assert state(model) == before
    restore = install(model, plan("layers.0.self_attn", wide))
    with pytest.raises(RuntimeError, match="local already"):
        install(model, plan("layers.0.self_attn", wide))
    with attention(model, nothing), pytest.raises(RuntimeError, match="Undo the later change"):
        restore()
    training = nn.TransformerEncoderLayer(DIM, HEADS, 32, dropout=0.1, batch_first=True)
    install(training, plan("self_attn", wide))
    with pytest.raises(NotImplementedError, match=r"call \.eval\(\)"):
        training(draw(1, N, DIM))
    assert training.eval()(draw(1, N, DIM)).isfinite().all()


def test_watchers_that_leave_in_any_order_leave_no_stance_behind():
    from torch._dynamo import eval_frame

    from nearfield.hosts.torch_nn import eagerly

    before, (first, second) = eval_frame._stance.stance, (eagerly(), eagerly())
    first.__enter__()
    second.__enter__()
    assert eval_frame._stance.stance == "force_eager"
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert eval_frame._stance.stance == before == "default"
