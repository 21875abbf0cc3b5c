"""What patterns would cost a model: predictions against explicit maps, and hosts left as they were."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from nearfield.convert import convert  # noqa: E402
from nearfield.hosts import seam  # noqa: E402
from nearfield.measure import sensitivity as subject  # noqa: E402
from nearfield.measure.sensitivity import sensitivity  # noqa: E402
from nearfield.ops.neighborhood import Neighborhood  # noqa: E402


def llama(**more):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,  # maps that are far from uniform
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **more})).eval()


def registers():
    """10 x 10 patches behind a class token and three registers."""
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=40,
        patch_size=4,
        num_register_tokens=3,
        initializer_range=0.3,
    )
    return Dinov2WithRegistersModel(config).eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    return BertModel(config).eval()


def ids(tokens, seed=1):
    return torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(seed))


def text_loss(tokens, first=0, seed=1):
    given = ids(tokens, seed)

    def objective(model):
        logits = model(input_ids=given, use_cache=False).logits[0, first:-1]
        return F.cross_entropy(logits, given[0, first + 1 :], reduction="sum")

    return objective


def projected(**inputs):
    """A loss of an encoder: its features in one fixed random direction."""

    def objective(model):
        features = model(**inputs).last_hidden_state
        return (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(4))).sum()

    return objective


def pixels():
    return torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(2))


def causal(*sizes, num_sinks=0):
    return lambda site: [Neighborhood(size, is_causal=True, num_sinks=num_sinks) for size in sizes]


class Explicit:
    """Full attention in float64 with every map kept: the site's output, its gradient, its scores."""

    def __init__(self):
        self.calls, self.maps, self.out = {}, {}, {}

    def __call__(self, call):
        share = call.query.shape[2] // call.key.shape[2]
        k, v = (x.repeat_interleave(share, 2) for x in (call.key, call.value))
        scores = torch.einsum("bnhd,bmhd->bhnm", call.query, k) * call.scale
        if call.site.is_causal:
            hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
            scores = scores.masked_fill(hidden, -math.inf)
        out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
        out.requires_grad_()
        out.retain_grad()
        self.calls[call.site.name], self.maps[call.site.name] = (call, v), scores
        self.out[call.site.name] = out
        return out


def explicit(model, objective):
    """Run and go back with explicit maps; the model is left in float64."""
    watch = Explicit()
    model.double()
    with seam.attention(model, watch):
        objective(model).backward()
    return watch


@cache
def visible(pattern, site, tokens):
    """[N, N] from the geometry's own lists of keys, query by query."""
    prefix, grid = site.num_prefix, site.grid or (tokens,)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    bound = pattern.on(grid)
    for query in range(tokens - prefix):
        seen[prefix + query, [prefix + key for key in bound.keys(query)]] = True
    seen[:prefix] = seen[:, :prefix] = True
    return seen & torch.ones(tokens, tokens).tril().bool() if site.is_causal else seen


def brute(watch, name, pattern, rows):
    """½ Σ over rows of (g · Δ)², Δ of all heads of a group together, by the definition."""
    (call, v), scores = watch.calls[name], watch.maps[name]
    tokens = scores.shape[-1]
    hidden = ~visible(pattern, call.site, tokens)
    local = scores.masked_fill(hidden, -math.inf).softmax(-1)
    moved = torch.einsum("bhnm,bmhd->bnhd", local, v) - watch.out[name]
    product = (watch.out[name].grad * moved).sum(-1)  # [B, N, H]
    groups = product.unflatten(2, (call.site.num_kv_heads, -1)).sum(-1)
    return groups[:, list(rows)].square().sum((0, 1)) / 2


def check(found, watch, rows):
    for site in found:
        for at, pattern in enumerate(site.candidates):
            wanted = brute(watch, site.site.name, pattern, rows)
            torch.testing.assert_close(site.damage[:, at].double(), wanted.detach(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("num_sinks", [0, 3])
def test_damage_is_half_the_squared_gradient_times_the_error(num_sinks):
    objective, candidates = text_loss(60, 20), causal(2, 5, 16, 60, num_sinks=num_sinks)
    found = sensitivity(llama(), objective, candidates, rows=range(20, 59))
    assert [site.site.name for site in found] == [f"model.layers.{i}.self_attn" for i in range(4)]
    assert found[0].head_dim == 8
    check(found, explicit(llama(), objective), range(20, 59))
    assert all((site.damage[:, 0] > site.damage[:, 2]).all() for site in found)


def test_candidates_in_any_order_give_the_same_as_alone():
    """Rings are added where the next window holds the last; where it does not, it starts anew."""

    def candidates(site):
        return [
            Neighborhood(16, is_causal=True),
            Neighborhood(4, is_causal=True, num_sinks=2),
            Neighborhood(8, is_causal=True, dilation=3),
            Neighborhood(8, is_causal=True, stride=4),
            Neighborhood(32, is_causal=True),
            Neighborhood(4, is_causal=True, num_sinks=2),
        ]

    objective = text_loss(60)
    found = sensitivity(llama(), objective, candidates, rows=range(59))
    check(found, explicit(llama(), objective), range(59))
    for site in found:
        torch.testing.assert_close(site.damage[:, 1], site.damage[:, 5])


def test_a_window_far_from_its_sinks_is_weighed_with_them():
    """The ring then has two runs of columns with a wide gap between them."""
    tokens = 200
    objective = text_loss(tokens, 150)
    candidates = causal(8, 16, num_sinks=4)
    model = llama(num_hidden_layers=1)
    found = sensitivity(model, objective, candidates, rows=range(150, tokens - 1))
    check(found, explicit(llama(num_hidden_layers=1), objective), range(150, tokens - 1))


def test_a_candidate_that_shows_everything_costs_nothing():
    found = sensitivity(llama(), text_loss(50), causal(50, 4096), rows=range(49))
    some = sensitivity(llama(), text_loss(50), causal(4), rows=range(49))
    for site, other in zip(found, some, strict=True):
        assert (site.damage < 1e-9 * other.damage).all()
        assert (site.recall == 0).all()


def test_on_grids_prefix_tokens_keep_full_attention():
    objective = projected(pixel_values=pixels())

    def candidates(site):
        assert (site.grid, site.num_prefix) == ((10, 10), 4)
        return [Neighborhood(3), Neighborhood((5, 7)), Neighborhood(3, dilation=3), Neighborhood(10)]

    found = sensitivity(registers(), objective, candidates, rows=range(104))
    check(found, explicit(registers(), objective), range(104))
    assert all((site.damage[:, 3] < 1e-9 * site.damage[:, 0]).all() for site in found)


def test_text_that_looks_both_ways():
    objective = projected(input_ids=ids(40))
    found = sensitivity(
        bert(), objective, lambda site: [Neighborhood(9, border="truncate"), Neighborhood(9)], rows=range(40)
    )
    check(found, explicit(bert(), objective), range(40))


def test_sampled_rows_are_scaled_to_all_of_them():
    """Every block of 64 is as likely as any other, so the mean over draws is the damage on all rows."""
    tokens, objective = 600, text_loss(600)
    model = llama(num_hidden_layers=1)
    whole = sensitivity(model, objective, causal(16), rows=range(599))[0].damage
    draw = torch.Generator().manual_seed(0)
    some = [
        sensitivity(model, objective, causal(16), rows=range(tokens - 1), num_blocks=4, generator=draw)[
            0
        ].damage
        for _ in range(12)
    ]
    assert not torch.equal(some[0], some[1])
    torch.testing.assert_close(torch.stack(some).mean(0), whole, rtol=0.15, atol=0)


def test_the_sample_stays_within_the_rows():
    for length in (64, 100, 1024, 1025, 5000):
        starts, share = subject._sample(range(7, 7 + length), 16, torch.Generator().manual_seed(length))
        spans = [range(s, min(s + subject.BLOCK, 7 + length)) for s in starts]
        rows = [row for span in spans for row in span]
        assert min(rows) >= 7
        assert max(rows) < 7 + length
        assert len(set(rows)) == len(rows)
        assert len(rows) * share == pytest.approx(length)


def test_the_true_change_of_loss_agrees_where_the_change_is_small():
    """About its own minimum, a squared distance of features is the second-order term alone: the model is
    converted for real and the distance compared with what random probes of the gradient predict. One layer
    of one group: no row, and no group, moves what another one moves."""
    tokens, probes, given = 64, 8, ids(64)
    model = llama(num_hidden_layers=1, num_key_value_heads=1).double()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(0.02)  # small changes

    def features(model):
        return model.model(input_ids=given, use_cache=False).last_hidden_state[0]

    with torch.no_grad():
        before = features(model)
        report = convert(model, Neighborhood(8, is_causal=True))
        true = float(0.5 * (features(model) - before).square().sum())
        report.restore()
    # E over random v of ½ (v · J Δ)² is ½ |J Δ|², the squared distance to `before`
    draw, total = torch.Generator().manual_seed(1), 0.0
    for _ in range(probes):
        v = torch.randn(before.shape, generator=draw, dtype=torch.float64)
        found = sensitivity(model, lambda m, v=v: (features(m) * v).sum(), causal(8), rows=range(tokens))
        total += float(found[0].damage.sum()) / probes
    assert total == pytest.approx(true, rel=0.2)


def test_recall_counts_the_rows_that_answer_and_mass_is_the_share_on_the_needle():
    tokens, needle, answers = 80, [11, 12, 13], [70, 71, 72, 73]
    objective = text_loss(tokens, 40)
    found = sensitivity(
        llama(), objective, causal(8, 64), rows=range(40, 70), answer_rows=answers, needle=needle
    )
    watch = explicit(llama(), objective)
    check(found, watch, range(40, 70))
    for site in found:
        share = watch.maps[site.site.name].softmax(-1)
        mass = share[0][:, answers][..., needle].sum(-1).amax(-1).unflatten(0, (2, 2)).amax(-1)
        torch.testing.assert_close(site.needle_mass.double(), mass.detach(), rtol=1e-4, atol=1e-7)
        for at, pattern in enumerate(site.candidates):
            wanted = brute(watch, site.site.name, pattern, answers).detach()
            torch.testing.assert_close(site.recall[:, at].double(), wanted, rtol=1e-4, atol=1e-9)


def test_distance_is_the_mean_over_each_heads_map():
    objective = text_loss(64)
    found = sensitivity(llama(), objective, causal(8), rows=range(64))
    watch = explicit(llama(), objective)
    index = torch.arange(64.0)
    far = (index[:, None] - index).abs()
    for site in found:
        share = watch.maps[site.site.name].softmax(-1)
        wanted = (share * far).sum(-1).mean((0, 2)).detach()
        torch.testing.assert_close(site.distance.double(), wanted.double(), rtol=1e-4, atol=1e-6)


def test_distance_on_grids_is_euclidean_and_leaves_prefix_tokens_out():
    objective = projected(pixel_values=pixels())
    found = sensitivity(registers(), objective, lambda site: [Neighborhood(3)], rows=range(40, 104))
    watch = explicit(registers(), objective)
    place = torch.stack(torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij"), -1).flatten(
        0, 1
    )
    far = torch.cdist(place, place).double()[36:]
    for site in found:
        share = watch.maps[site.site.name].softmax(-1)[0, :, 40:, 4:]
        wanted = ((share * far).sum((1, 2)) / share.sum((1, 2))).detach()
        torch.testing.assert_close(site.distance.double(), wanted, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most numbers of one tensor made inside, backward passes included."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > self.most:
                self.most = tensor.untyped_storage().nbytes()
        return out


def test_nothing_the_size_of_a_map_is_made():
    """A pair of heads on 64 rows is the largest: linear in the tokens."""
    most = {}
    for tokens in (512, 1024):
        model = llama(num_hidden_layers=2, vocab_size=64)
        with Largest() as made:
            sensitivity(
                model, text_loss(tokens, tokens // 2), causal(64), rows=range(tokens // 2, tokens - 1)
            )
        most[tokens] = made.most
    heads, width = 4, 4  # bytes of a float32
    assert most[1024] <= heads * subject.BLOCK * 1024 * width < 1024 * 1024 * width
    assert most[1024] <= 2.01 * most[512]


def test_every_layer_is_run_again_in_the_backward():
    """Checkpointed: what a layer holds inside is made again, last layer first."""
    model, runs = llama(), []
    for at, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, given, at=at: runs.append(at))
    sensitivity(model, text_loss(40), causal(8), rows=range(39))
    assert runs[:4] == [0, 1, 2, 3]
    assert runs[4:] == [3, 2, 1, 0]


# The host is left as it was.


def state(model):
    return (
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [sorted(vars(module)) for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        model.training,
    )


def test_the_host_is_left_as_it_was_also_after_an_exception():
    model = llama()
    sensitivity(model, text_loss(40), causal(8), rows=range(39))  # what is registered once is there now
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.model.norm.weight.requires_grad_(False)
    before, logits = state(model), model(input_ids=ids(40)).logits
    sensitivity(model, text_loss(40), causal(8), rows=range(39))
    assert state(model) == before
    assert not model.model.norm.weight.requires_grad

    def broken(model):
        text_loss(40)(model)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sensitivity(model, broken, causal(8), rows=range(39))
    assert state(model) == before

    def candidates(site):
        raise RuntimeError("in the backward")

    with pytest.raises(RuntimeError, match="in the backward"):
        sensitivity(model, text_loss(40), candidates, rows=range(39))
    assert state(model) == before
    assert torch.equal(model(input_ids=ids(40)).logits, logits)


def test_progress_is_told_site_by_site():
    told = []
    sensitivity(llama(), text_loss(40), causal(8), rows=range(39), progress=lambda *a: told.append(a))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_gradient_that_is_not_finite_is_refused_by_its_site():
    model = llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"Site model\.layers\.\d\.self_attn: the gradient .* not finite"):
        sensitivity(model, text_loss(40), causal(8), rows=range(39))


def test_padding_is_refused():
    padded = torch.ones(1, 40, dtype=torch.long)
    padded[0, :5] = 0

    def objective(model):
        return model(input_ids=ids(40), attention_mask=padded, use_cache=False).logits.sum()

    with pytest.raises(ValueError, match="one unpadded sequence of self-attention"):
        sensitivity(llama(), objective, causal(8), rows=range(39))


# Other hosts.


def plain_loss(x):
    def objective(model):
        out = model(x)
        return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(4))).sum()

    return objective


def test_layers_of_plain_torch():
    def build():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    model = build()
    before = [sorted(vars(module)) for module in model.modules()]
    objective = plain_loss(torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(1)))
    found = sensitivity(model, objective, lambda site: [Neighborhood(9)], rows=range(40))
    assert [site.site.name for site in found] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert [sorted(vars(module)) for module in model.modules()] == before
    double = plain_loss(torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(1)).double())
    check(found, explicit(build(), double), range(40))


class Block(nn.Module):
    """Attention as a ViT's block has it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_outside_any_list_are_measured_too(frozen):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(Block(32, 4), Block(32, 4)).requires_grad_(not frozen)

    x = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(1))
    found = sensitivity(build(), plain_loss(x), lambda site: [Neighborhood(5)], rows=range(30))
    assert [site.site.name for site in found] == ["0", "1"]
    check(found, explicit(build(), plain_loss(x.double())), range(30))
