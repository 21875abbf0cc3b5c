"""Locality statistics against their definitions on explicit maps, the laws they obey, and real tiny hosts."""

from __future__ import annotations

import io
import json
import math
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nearfield.measure.command import run
from nearfield.measure.locality import measure
from nearfield.measure.statistics import attention_statistics, choose_rows, label, window_pattern
from nearfield.ops.neighborhood.geometry import Neighborhood


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are so small that waiting for a second thread is most of the time."""
    torch.set_num_threads(1)


def tensors(n, m, heads=4, kv_heads=2, dim=8, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, n, heads, dim, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, m, kv_heads, dim, generator=generator, dtype=torch.float64)
    return query.mul(2).to(dtype), key.to(dtype)


def explicit_map(query, key, mask, is_causal):
    """The whole softmax map [B, H, N, M], key/value heads repeated."""
    n, m = query.shape[1], key.shape[1]
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if is_causal:
        scores = scores.masked_fill(torch.ones(n, m).tril(m - n).logical_not().bool(), -math.inf)
    return scores.softmax(-1)


def by_definition(attention, grid, num_prefix, windows, is_causal, num_sinks, rows):
    """The statistics of one head's map [N, M] by loops over pairs; `rows` are query numbers."""
    n, m = attention.shape
    places = list(product(*map(range, grid)))
    bounds = [window_pattern(w, grid, is_causal).on(grid) for w in windows]
    out = {"distance": 0.0, "entropy": 0.0, "sink_mass": 0.0, "inside": [0.0] * len(windows)}
    shares = []
    for i in rows:
        row = attention[i].tolist()
        at = i + m - n - num_prefix
        on_grid = row[num_prefix:]
        on_grid = [a / sum(on_grid) for a in on_grid]
        shares.append(on_grid)
        out["distance"] += sum(a * math.dist(places[at], places[j]) for j, a in enumerate(on_grid))
        out["entropy"] -= sum(a * math.log(a) for a in row if a)
        out["sink_mass"] += sum(row[: num_prefix or num_sinks])
        for c, bound in enumerate(bounds):
            out["inside"][c] += sum(on_grid[j] for j in bound.keys(at))
    count = len(rows)
    out = {k: [v / count for v in x] if isinstance(x, list) else x / count for k, x in out.items()}
    mean = [sum(column) / count for column in zip(*shares, strict=True)]
    shared = sum(a * math.log(a / p) for row in shares for a, p in zip(row, mean, strict=True) if a) / count
    of_keys = -sum(p * math.log(p) for p in mean if p)
    out["nmi"] = shared / math.sqrt(math.log(count) * of_keys)
    return out


CASES = {  # grid, prefix, causal, queries (0: as many as keys), windows
    "text": ((13,), 0, True, 0, (1, 4, 13, 40)),
    "text, fewer queries": ((13,), 0, True, 5, (3, 6)),
    "encoder": ((12,), 0, False, 0, (1, 4, 5)),
    "encoder with class token": ((11,), 1, False, 0, (3,)),
    "picture": ((4, 5), 0, False, 0, (3, (2, 5))),
    "picture with class and registers": ((3, 5), 3, False, 0, (3, 9)),
    "video": ((2, 3, 4), 0, False, 0, (2,)),
}


@pytest.mark.parametrize("rows", ["all", "last_half", 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, rows):
    grid, num_prefix, is_causal, num_queries, windows = CASES[case]
    m = math.prod(grid) + num_prefix
    n = num_queries or m
    query, key = tensors(n, m)
    found = attention_statistics(
        query,
        key,
        grid=grid,
        num_prefix=num_prefix,
        is_causal=is_causal,
        windows=windows,
        num_sinks=2,
        rows=rows,
        generator=torch.Generator().manual_seed(3),
        workspace=6000,
    )
    maps = explicit_map(query, key, None, is_causal)
    chosen = choose_rows(n - num_prefix, rows, torch.Generator().manual_seed(3)) + num_prefix
    for b, h in product(range(2), range(4)):
        want = by_definition(maps[b, h], grid, num_prefix, windows, is_causal, 2, chosen.tolist())
        for name in ("distance", "entropy", "sink_mass"):
            assert getattr(found, name)[b, h].item() == pytest.approx(want[name], rel=1e-9), name
        for window, mass in zip(windows, want["inside"], strict=True):
            assert found.inside[label(window)][b, h].item() == pytest.approx(mass, rel=1e-9)
        if is_causal:
            assert found.nmi is None
        else:
            assert found.nmi[b, h].item() == pytest.approx(want["nmi"], rel=1e-7)
    assert (found.num_rows == len(chosen)).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bool", "float", "keys"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_changes_nothing(side, kind, is_causal):
    """A padded sequence measures as it does alone."""
    query, key = tensors(12, 12)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, slice(0, 5) if side == "left" else slice(7, 12)] = False
    mask = real[:, None, None, :].expand(2, 1, 12 if kind != "keys" else 1, 12)
    if is_causal and kind != "keys":
        mask = mask & torch.ones(12, 12, dtype=torch.bool).tril()
    if kind == "float":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    options = {"windows": (2, 5), "is_causal": is_causal}
    padded = attention_statistics(query, key, grid=(12,), mask=mask, **options, workspace=4000)
    alone = attention_statistics(query[1:, real[1]], key[1:, real[1]], grid=(7,), **options)
    for name in ("distance", "entropy", "sink_mass", "nmi", "num_rows"):
        if getattr(alone, name) is not None:
            torch.testing.assert_close(getattr(padded, name)[1:], getattr(alone, name), msg=name)
    for window in ("2", "5"):
        torch.testing.assert_close(padded.inside[window][1:], alone.inside[window])
    assert padded.num_rows.tolist() == [[12] * 4, [7] * 4]


def test_rows_that_see_nothing_are_left_out():
    query, key = tensors(6, 6, batch=1)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2, :] = False
    found = attention_statistics(query, key, grid=(6,), mask=mask)
    assert (found.num_rows == 5).all()
    assert found.entropy.isfinite().all()
    empty = attention_statistics(query, key, grid=(6,), mask=torch.zeros(1, 1, 6, 6, dtype=torch.bool))
    assert (empty.num_rows == 0).all()
    assert empty.distance.isnan().all()


def test_cross_attention_has_no_distance():
    query, key = tensors(5, 9)
    found = attention_statistics(query, key, windows=(3,))
    maps = explicit_map(query, key, None, False)
    assert found.distance is None
    assert found.inside == {}
    torch.testing.assert_close(found.entropy, -(maps * maps.log()).sum(-1).mean(-1))
    torch.testing.assert_close(found.sink_mass, maps[..., :4].sum(-1).mean(-1))


def test_uniform_attention_has_its_closed_form():
    """All scores equal: mean distance (n² - 1) / 3n, entropy log n, nmi 0; causal: (n - 1) / 4."""
    n = 50
    query, key = torch.zeros(1, n, 2, 4), torch.randn(1, n, 1, 4, generator=torch.Generator().manual_seed(0))
    found = attention_statistics(query, key, grid=(n,), windows=(2 * n,), num_sinks=5)
    torch.testing.assert_close(found.distance, torch.full((1, 2), (n * n - 1) / (3 * n), dtype=torch.float64))
    torch.testing.assert_close(found.entropy, torch.full((1, 2), math.log(n), dtype=torch.float64))
    torch.testing.assert_close(found.sink_mass, torch.full((1, 2), 5 / n, dtype=torch.float64))
    torch.testing.assert_close(found.inside[str(2 * n)], torch.ones(1, 2, dtype=torch.float64))
    assert found.nmi.abs().max() < 1e-6
    causal = attention_statistics(query, key, grid=(n,), is_causal=True, windows=(n,))
    torch.testing.assert_close(causal.distance, torch.full((1, 2), (n - 1) / 4, dtype=torch.float64))
    torch.testing.assert_close(causal.inside[str(n)], torch.ones(1, 2, dtype=torch.float64))


def test_nmi_is_one_for_a_permutation_and_zero_for_a_collapse():
    n = 16
    one_hot = torch.eye(n, dtype=torch.float64)[None, :, None] * 200
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    found = attention_statistics(one_hot, one_hot[:, order], grid=(4, 4))
    torch.testing.assert_close(found.nmi, torch.ones(1, 1, dtype=torch.float64))
    same = attention_statistics(one_hot[:, :1].expand(-1, n, -1, -1), one_hot, grid=(4, 4))
    assert same.nmi.item() == 0  # every query on one key
    query, key = tensors(1, n, batch=1)
    same = attention_statistics(query.expand(-1, n, -1, -1), key, grid=(4, 4))
    assert same.nmi.abs().max() < 1e-12


GAUSSIANS = [(0.5, 0.763, 6), (1, 0.499, 18), (2, 0.275, 37), (8, 0.011, 99)]


@pytest.mark.parametrize(("sigma", "nmi", "distance"), GAUSSIANS)
def test_a_gaussian_map_gives_the_published_values(sigma, nmi, distance):
    """Isotropic Gaussian on 14 x 14: exp(q·k - |k|²/2σ²) written as a dot product."""
    places = torch.cartesian_prod(torch.arange(14.0), torch.arange(14.0)).double()
    key = torch.cat([places, places.square().sum(1, keepdim=True)], 1)[None, :, None]
    query = torch.cat([places / sigma**2, torch.full((196, 1), -0.5 / sigma**2)], 1)[None, :, None].double()
    found = attention_statistics(query, key, grid=(14, 14), scale=1.0)
    assert found.nmi.item() == pytest.approx(nmi, abs=1e-3)
    assert 16 * found.distance.item() == pytest.approx(distance, abs=0.6)


def test_a_planted_sink_is_seen():
    """All heads look at token 0 with score s, elsewhere 0: its mass is e^s / (e^s + i)."""
    n, score = 40, 3.0
    query = torch.ones(1, n, 2, 1, dtype=torch.float64)
    key = torch.zeros(1, n, 2, 1, dtype=torch.float64)
    key[:, 0] = score
    found = attention_statistics(query, key, grid=(n,), is_causal=True, scale=1.0, num_sinks=1)
    want = sum(math.exp(score) / (math.exp(score) + i) for i in range(n)) / n
    torch.testing.assert_close(found.sink_mass, torch.full((1, 2), want, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_matter_and_low_precision_stays_close(dtype):
    query, key = tensors(70, 70, dtype=dtype)
    options = {"grid": (70,), "is_causal": True, "windows": (8, 16)}
    whole = attention_statistics(query, key, **options)
    exact = attention_statistics(query.double(), key.double(), **options)
    for workspace in (1, 20_000):
        parts = attention_statistics(query, key, **options, workspace=workspace)
        for a, b, c in zip(whole, parts, exact, strict=True):
            for x, y, z in [(a[w], b[w], c[w]) for w in a] if isinstance(a, dict) else [(a, b, c)]:
                if x is not None:
                    torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)
                    torch.testing.assert_close(x, z, rtol=2e-6, atol=2e-6)


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("is_causal", [True, False])
def test_no_map_of_all_pairs_is_ever_held(is_causal):
    for n in (512, 1024):
        query, key = tensors(n, n, heads=2, kv_heads=1, batch=1, dtype=torch.float32)
        with Largest() as mode:
            attention_statistics(
                query, key, grid=(n,), is_causal=is_causal, windows=(64, 256), workspace=1 << 20
            )
        assert 1 << 17 < mode.bytes <= 1 << 20  # a map would be 2 and 8 MiB


def test_a_wrong_grid_is_refused_with_a_way_out():
    query, key = tensors(10, 10)
    with pytest.raises(ValueError, match="has 9 tokens, the keys 10"):
        attention_statistics(query, key, grid=(3, 3))
    with pytest.raises(ValueError, match="no multiple of 2"):
        attention_statistics(query[:, :, :3], key)
    with pytest.raises(ValueError, match="rows=0 is unknown"):
        attention_statistics(query, key, rows=0)
    assert window_pattern(9, (4, 20), False) == Neighborhood((4, 9))


def llama(**options):
    """A tiny decoder with four query heads on two key/value heads."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **options,
    )
    return transformers.LlamaForCausalLM(config).train()


def dinov2():
    """A tiny picture encoder with a class token and registers before its 4 x 6 patches."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=4,
        num_register_tokens=2,
        initializer_range=0.3,
    )
    return transformers.Dinov2WithRegistersModel(config).eval()


def eager_maps(model, **inputs):
    """The host's own attention maps, `[B, H, N, N]` for each layer."""
    was, training = model.config._attn_implementation, model.training
    model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(was)
    model.train(training)
    return [found.double() for found in maps]


def check_host(locality, maps, sequences, grid, num_prefix, is_causal, num_sinks):
    """Measured heads against the host's own maps; `sequences` are the rows and columns of real tokens."""
    windows = tuple(int(w) for w in locality.windows)
    assert len(locality.sites) == len(maps)
    for site, attention in zip(locality.sites, maps, strict=True):
        for h, head in enumerate(site.heads):
            each = [
                by_definition(
                    attention[b, h][real][:, real],
                    grid or (len(real),),
                    num_prefix,
                    windows,
                    is_causal,
                    num_sinks,
                    range(num_prefix, len(real)),
                )
                for b, real in enumerate(sequences)
            ]
            weights = [len(real) - num_prefix for real in sequences]

            def mean(name, each=each, weights=weights):
                return sum(e[name] * w for e, w in zip(each, weights, strict=True)) / sum(weights)

            assert head.distance == pytest.approx(mean("distance"), rel=1e-4)
            assert head.entropy == pytest.approx(mean("entropy"), rel=1e-4)
            assert head.sink_mass == pytest.approx(mean("sink_mass"), rel=1e-4)
            for c, window in enumerate(windows):
                want = sum(e["inside"][c] * w for e, w in zip(each, weights, strict=True)) / sum(weights)
                assert head.inside[str(window)] == pytest.approx(want, rel=1e-4)
            nmi = sum(e["nmi"] for e in each) / len(each)
            assert head.nmi is None if is_causal else head.nmi == pytest.approx(nmi, rel=1e-3)


def test_a_padded_decoder_with_shared_keys_is_measured_as_its_own_maps_say():
    model = llama()
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    heard = []
    found = measure(
        model, ids, attention_mask=mask, windows=(3, 16), num_sinks=2, progress=heard.append, name="tiny"
    )
    assert model.training  # as it was
    maps = eager_maps(model, input_ids=ids, attention_mask=mask)
    check_host(found, maps, [list(range(20)), list(range(6, 20))], None, 0, True, 2)
    assert heard == [site.name for site in found.sites] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert found.short_names() == ("model.layers.{}.self_attn", ["0", "1"])


def test_a_picture_encoder_is_measured_on_its_grid():
    model = dinov2()
    pixels = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    found = measure(model, pixel_values=pixels)
    assert found.windows == ("3",)
    check_host(found, eager_maps(model, pixel_values=pixels), [list(range(27))] * 2, (4, 6), 3, False, 0)
    assert found.sink_words == "class and register tokens"
    assert {site.unit for site in found.sites} == {"patches"}


def test_the_answer_is_the_contract(tmp_path):
    """JSON of exactly the agreed keys, a table that prints, a picture that is one."""
    rich = pytest.importorskip("rich.console")
    pytest.importorskip("matplotlib")
    ids = torch.arange(20)[None]
    found = measure(llama(), ids, windows=(4, 8), name="tiny")
    document = json.loads(json.dumps(found.json(), allow_nan=False))
    assert document.keys() == {"model", "sites"}
    assert document["model"] == "tiny"
    for site in document["sites"]:
        assert site.keys() == {"name", "heads"}
        assert len(site["heads"]) == 4
        for head in site["heads"]:
            assert head.keys() == {"distance", "inside", "entropy", "sink_mass", "nmi"}
            assert head["inside"].keys() == {"4", "8"}
            assert 0 <= head["inside"]["4"] <= head["inside"]["8"] <= 1
            assert head["nmi"] is None
    console = rich.Console(width=80, file=io.StringIO())
    console.print(found)
    printed = console.file.getvalue()
    assert "Locality of tiny" in printed
    assert "Most local" in printed
    path = found.save_picture(tmp_path / "heat.png", window="8")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="was not measured"):
        found.save_picture(path, window="5")


def test_numbers_that_are_none_are_refused_by_site():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn: \d+ of 256 numbers in its queries"):
        measure(model, torch.arange(8)[None])
    assert model.training
    with pytest.raises(ValueError, match="No attention was seen in Linear"):
        measure(torch.nn.Linear(3, 3), torch.randn(2, 3))


def saved_llama(folder):
    """A tiny decoder and a tokenizer of single characters, as a folder."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = {chr(code): code - 32 for code in range(32, 96)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token=" "))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    llama(max_position_embeddings=64).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token=" ").save_pretrained(folder)
    return folder


def test_a_folder_with_a_decoder_is_measured_on_text(tmp_path):
    pytest.importorskip("matplotlib")
    folder = saved_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text("A STORY OF NO LENGTH. " * 9, "utf-8")
    seen = []
    found = run(
        str(folder),
        tokens=48,
        text=str(tmp_path / "text.txt"),
        out=tmp_path / "out",
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert found.model == str(folder)
    assert found.windows == ("16",)
    assert seen[-1] == ("measure attention", 2, 2)
    assert json.loads((tmp_path / "out" / "locality.json").read_text("utf-8")) == found.json()
    assert (tmp_path / "out" / "locality.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="Give --tokens 64"):
        run(str(folder), tokens=65)
    (tmp_path / "text.txt").write_text("SHORT", "utf-8")
    with pytest.raises(ValueError, match="The text has 5 tokens, fewer than the 48 asked"):
        run(str(folder), tokens=48, text=str(tmp_path / "text.txt"))
    with pytest.raises(ValueError, match="--image has no meaning"):
        run(str(folder), image="a.png")


def test_a_folder_with_a_picture_encoder_is_measured_on_a_picture(tmp_path):
    image = pytest.importorskip("PIL.Image")
    dinov2().save_pretrained(tmp_path / "model")
    image.effect_noise((50, 40), 60).save(tmp_path / "noise.png")
    found = run(str(tmp_path / "model"), image=tmp_path / "noise.png", windows=(3,))
    assert [site.site.grid for site in found.sites] == [(6, 6), (6, 6)]
    assert all(0 < head.nmi < 1 for site in found.sites for head in site.heads)
    (tmp_path / "noise.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        run(str(tmp_path / "model"), image=tmp_path / "noise.png")
    with pytest.raises(ValueError, match="--tokens has no meaning"):
        run(str(tmp_path / "model"), tokens=8)


def test_an_unknown_model_is_refused_with_the_known_ones(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="There is no model"):
        run(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="Did you mean 'smollm2-135m'"):
        run("smollm2")
