"""The seam: every attention call of a plain torch host by name, and nothing left behind."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfield.hosts.seam import Call, attention, sites


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Attention(nn.Module):
    """A ViT's attention as timm writes it."""

    def __init__(self, dim=16, num_heads=2, fused_attn=True):
        super().__init__()
        self.num_heads, self.fused_attn = num_heads, fused_attn
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


class Cross(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x, context=None):
        k, v = self.kv(x if context is None else context).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (self.q(x), k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


class Vit(nn.Module):
    """Patches, a class token and registers, blocks of attention."""

    def __init__(self, depth=2, registers=0, **options):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1 + registers, 16))
        self.blocks = nn.ModuleList(Attention(**options) for _ in range(depth))

    def forward(self, image):
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = x + block(x)
        return x


def answer(call: Call):
    """A handler that computes what the host would, through nothing but the call."""
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=call.mask,
        is_causal=call.site.is_causal and call.mask is None,
        scale=call.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)


def nothing(call: Call):
    return None


def state(model):
    """All that a `with` could leave on a model."""
    return [
        (
            name,
            sorted(vars(m)),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            getattr(m, "fused_attn", None),
        )
        for name, m in model.named_modules()
    ]


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return Vit().eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def test_sites_by_name_with_grid_and_prefix(vit, image):
    found = sites(vit, image)
    assert [s.name for s in found] == ["blocks.0", "blocks.1"]
    assert {(s.role, s.grid, s.num_prefix, s.is_causal, s.num_heads, s.num_kv_heads) for s in found} == {
        ("self", (4, 6), 1, False, 2, 2)
    }
    assert sites(Vit(registers=4), image)[0].num_prefix == 5


def test_grid_follows_the_image(vit):
    assert sites(vit, torch.randn(1, 3, 8, 32))[0].grid == (2, 8)
    assert sites(vit, torch.randn(1, 3, 24, 16))[0].grid == (6, 4)


def test_the_grid_that_fits_best_is_taken(image):
    class Two(Vit):
        def __init__(self):
            super().__init__()
            self.other = nn.Conv2d(3, 1, (5, 4), stride=(5, 4))

        def forward(self, image):
            self.other(image)  # 3 x 6 places: 25 tokens would be 7 and these
            x = super().forward(image)
            self.other(image)
            return self.blocks[0](x)

    grids = []
    model = Two()
    with attention(model, lambda call: grids.append((call.site.grid, call.site.num_prefix))):
        model(image)
    assert set(grids) == {((4, 6), 1)}


def test_text_is_a_line_and_other_tokens_have_no_grid(image):
    assert sites(Attention(), torch.randn(1, 7, 16))[0].grid == (7,)

    class Pooled(Vit):
        def forward(self, image):
            return self.blocks[0](super().forward(image)[:, :3])

    assert [s.grid for s in sites(Pooled(depth=1), image)] == [(4, 6)]  # named once, by its first call
    model = Vit(depth=1)
    calls = []
    with attention(model, lambda call: calls.append(call.site.grid)):
        model(image)
        model.blocks[0](torch.randn(1, 3, 16))
    assert calls == [(4, 6), None]


def test_identity_is_bit_equal_and_nothing_remains(vit, image):
    before, alone = state(vit), vit(image)
    with attention(vit, nothing):
        inside = vit(image)
    assert torch.equal(inside, alone)
    assert state(vit) == before
    assert torch.equal(vit(image), alone)


def test_an_answer_replaces_the_site(vit, image):
    with attention(vit, answer):
        assert torch.equal(vit(image), vit(image))
        same = vit(image)
    with attention(vit, lambda call: torch.zeros_like(call.query)):
        other = vit(image)
    torch.testing.assert_close(same, vit(image))
    assert not torch.allclose(other, same)


def test_the_layout_is_ours_and_a_view(vit, image):
    def look(call):
        assert call.query.shape == (2, 25, 2, 8)
        assert call.query.data_ptr() == call.query.transpose(1, 2).data_ptr()
        assert call.scale == 8**-0.5
        assert call.module is vit.get_submodule(call.site.name)

    with attention(vit, look):
        vit(image)


def test_a_wrong_shape_names_the_site(vit, image):
    with attention(vit, lambda call: call.query[:, :3]), pytest.raises(ValueError, match=r"blocks\.0"):
        vit(image)


def test_restored_after_exceptions(vit, image):
    before, alone = state(vit), vit(image)

    def fail(call):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), attention(vit, fail):
        vit(image)
    assert state(vit) == before
    assert torch.equal(vit(image), alone)
    assert torch.overrides._get_current_function_mode_stack() == []
    # An exception inside the host must not shift the names of later calls.
    names = []
    with attention(vit, lambda call: names.append(call.site.name)):
        with pytest.raises(RuntimeError):
            vit(torch.randn(2, 5, 16, 24))
        vit(image)
    assert names == ["blocks.0", "blocks.1"]


def test_nested_inner_first_then_outer(vit, image):
    asked = []

    def inner(call):
        asked.append(("inner", call.site.name))
        return answer(call) if call.site.name == "blocks.1" else None

    def outer(call):
        asked.append(("outer", call.site.name))

    with attention(vit, outer), attention(vit, inner):
        vit(image)
    assert asked == [("inner", "blocks.0"), ("outer", "blocks.0"), ("inner", "blocks.1")]


def test_other_threads_and_other_models_are_not_entered(vit, image):
    names, results = [], []
    alone = vit(image)
    other = Vit()

    def run():
        results.append(vit(image))

    with attention(vit, lambda call: names.append(call.site.name) or torch.zeros_like(call.query)):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        other(image)
        F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8))
    assert names == []
    assert torch.equal(results[0], alone)


def test_a_handler_may_compute_with_sdpa_and_modules(vit, image):
    count = []

    def handler(call):
        count.append(call.site.name)
        vit.blocks[0](torch.randn(1, 3, 16))
        return answer(call)

    with attention(vit, handler):
        vit(image)
    assert count == ["blocks.0", "blocks.1"]


def test_fused_attn_is_switched_on_inside_and_off_after(image):
    model = Vit(fused_attn=False).eval()
    before, alone = state(model), model(image)
    names = []
    with attention(model, lambda call: names.append(call.site.name)):
        torch.testing.assert_close(model(image), alone)
    assert names == ["blocks.0", "blocks.1"]
    assert state(model) == before
    assert torch.equal(model(image), alone)


def test_eager_attention_is_refused_by_name(image):
    model = Vit()
    del model.blocks[1].fused_attn
    model.blocks[1].__class__ = type("Eager", (Attention,), {"fused_attn": property(lambda self: 0)})
    with attention(model, nothing), pytest.raises(NotImplementedError, match=r"blocks\.1.*fused"):
        model(image)

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.linear = nn.Parameter(torch.randn(16, 4)), nn.Linear(16, 4)

        def forward(self, x):
            return (
                (x @ self.weight).softmax(-1) + self.linear(x).softmax(-1) + torch.softmax(x @ x.mT, 1).mean()
            )

    router = Router()
    with attention(router, nothing):
        router(torch.randn(2, 5, 16))  # softmax over weights or over another axis is no attention


def test_cross_attention_is_told_apart():
    model = nn.Sequential(Cross())
    x, y = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    assert sites(model, x)[0].role == "self"
    assert sites(model[0], x, y)[0].role == "cross"
    assert sites(model[0], x, context=torch.randn(1, 3, 16))[0] == sites(model[0], x, y)[0]


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_ranks_and_groups_of_sdpa(lead):
    class Plain(nn.Module):
        def forward(self, q, k, v, **options):
            return F.scaled_dot_product_attention(q, k, v, **options)

    g = torch.Generator().manual_seed(0)
    q = torch.randn(*lead, 4, 6, 8, generator=g)
    k, v = torch.randn(*lead, 2, 6, 8, generator=g), torch.randn(*lead, 2, 6, 5, generator=g)
    model = Plain()
    for options in (
        {"enable_gqa": True},
        {"enable_gqa": True, "is_causal": True},
        {"enable_gqa": True, "attn_mask": torch.randn(*lead, 1, 6, 6, generator=g), "scale": 0.3},
    ):
        if not lead:
            q, k, v = q[:2], k, v
            options = {**options, "enable_gqa": False}
        alone = model(q, k, v, **options)
        with attention(model, answer):
            torch.testing.assert_close(model(q, k, v, **options), alone)
        with attention(model, nothing):
            assert torch.equal(model(q, k, v, **options), alone)


def test_masks_of_sdpa_say_what_they_mean():
    class Plain(nn.Module):
        def forward(self, n, m, **options):
            x = torch.arange(2.0 * m * 8).sin().view(2, 1, m, 8)
            return F.scaled_dot_product_attention(x[:, :, :n], x, x, **options)

    calls = []
    model = Plain()

    def look(call):
        calls.append(
            (call.site.is_causal, call.site.role, None if call.mask is None else tuple(call.mask.shape))
        )
        return answer(call)

    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    padding = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    cases = [
        (5, 5, {"is_causal": True}, (True, "self", None)),
        (5, 5, {"attn_mask": causal}, (True, "self", None)),
        (5, 5, {"attn_mask": torch.zeros(5, 5).masked_fill(~causal, -torch.inf)}, (True, "self", None)),
        (5, 5, {"attn_mask": padding[:, None, None]}, (False, "self", (2, 1, 1, 5))),
        (5, 5, {"attn_mask": causal & padding[:, None, None]}, (False, "self", (2, 1, 5, 5))),
        (3, 5, {"is_causal": True}, (False, "cross", (3, 5))),  # SDPA aligns at the first key
    ]
    for n, m, options, wanted in cases:
        alone = model(n, m, **options)
        with attention(model, look):
            torch.testing.assert_close(model(n, m, **options), alone)
        assert calls.pop() == wanted


def test_gradients_and_checkpointed_recomputation_pass_through(vit, image):
    from torch.utils.checkpoint import checkpoint

    class Saving(nn.Module):
        def __init__(self, vit):
            super().__init__()
            self.vit = vit

        def forward(self, x):
            x = self.vit.patch_embed(x).flatten(2).transpose(1, 2)
            for block in self.vit.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model, names = Saving(vit), []

    def handler(call):
        names.append(call.site.name)
        return answer(call) * 0.5

    with attention(model, handler):
        model(image).sum().backward()
    once = ["vit.blocks.0", "vit.blocks.1"]
    assert names == once + once[::-1]
    grad = vit.patch_embed.weight.grad.clone()
    vit.zero_grad()
    with attention(model, lambda call: answer(call) * 0.5):
        x = vit.patch_embed(image).flatten(2).transpose(1, 2)
        vit.blocks[1](vit.blocks[0](x)).sum().backward()
    torch.testing.assert_close(vit.patch_embed.weight.grad, grad)


def test_a_compiled_host_inside_and_after(vit, image):
    alone = vit(image)
    compiled = torch.compile(vit, backend="aot_eager")
    plain = compiled(image)
    names = []
    with attention(compiled, lambda call: names.append(call.site.name)):
        assert torch.equal(compiled(image), alone)
    assert names == ["blocks.0", "blocks.1"]
    with attention(compiled, lambda call: torch.zeros_like(call.query)):
        edited = compiled(image)
    with attention(vit, lambda call: torch.zeros_like(call.query)):
        assert torch.equal(edited, vit(image))
    assert torch.equal(compiled(image), plain)
    whole = copy.deepcopy(vit)
    whole.compile(backend="aot_eager")
    plain = whole(image)
    with attention(whole, lambda call: torch.zeros_like(call.query)):
        assert torch.equal(whole(image), edited)
    assert torch.equal(whole(image), plain)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_hosts_are_refused():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2))

    with pytest.raises(NotImplementedError, match="'inner' is scripted"), attention(Outer(), nothing):
        pass


def test_transformers_models_inside_a_plain_one():
    transformers = pytest.importorskip("transformers")

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            config = transformers.LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
            )
            self.text = transformers.LlamaModel(config)
            self.head = Attention()

        def forward(self, ids):
            return self.head(self.text(ids).last_hidden_state)

    torch.manual_seed(0)
    model, ids = Wrapped().eval(), torch.arange(6)[None]
    alone = model(ids)
    found = sites(model, ids)
    assert [(s.name, s.is_causal, s.num_kv_heads) for s in found] == [
        ("text.layers.0.self_attn", True, 1),
        ("text.layers.1.self_attn", True, 1),
        ("head", False, 2),
    ]
    with attention(model, nothing):
        assert torch.equal(model(ids), alone)
    with attention(model, answer):
        torch.testing.assert_close(model(ids), alone)
    assert torch.equal(model(ids), alone)
    assert [s.name for s in sites(torch.compile(model.text, backend="eager"), ids)] == [
        "layers.0.self_attn",
        "layers.1.self_attn",
    ]


def test_a_handler_may_call_compiled_code(vit, image):
    compiled = torch.compile(lambda x: x.sin() * 2, backend="eager")

    def handler(call):
        return compiled(call.query)

    with attention(vit, handler):
        inside = vit(image)
    with attention(vit, lambda call: call.query.sin() * 2):
        assert torch.equal(vit(image), inside)
