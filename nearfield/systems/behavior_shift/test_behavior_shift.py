"""The three looks equal their formulas on models small enough to work them out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nearfield.systems.behavior_shift import study
from nearfield.systems.behavior_shift.model import Planted, planted, random_llama
from nearfield.systems.behavior_shift.study import (
    Words,
    attribution,
    concepts,
    density,
    find_span,
    head_pairs,
    instruction_score,
    overlap,
    sparsify,
    welch,
)

transformers = pytest.importorskip("transformers")


class Linear(nn.Module):
    """Logits at a row: a fixed matrix of the sum of all embeddings up to it."""

    def __init__(self, vocabulary=7, dim=5):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Embedding.from_pretrained(torch.randn(vocabulary, dim, generator=draw))
        self.matrix = torch.randn(dim, vocabulary, generator=draw)

    def get_input_embeddings(self):
        return self.table

    def forward(self, *, inputs_embeds, use_cache, logits_to_keep):
        return SimpleNamespace(logits=(inputs_embeds.cumsum(1) @ self.matrix)[:, -logits_to_keep:])


@pytest.mark.parametrize("of", ["probability", "log-probability"])
@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_attribution_equals_its_closed_form_on_a_linear_model(of, chunk):
    model = Linear()
    prompt, response = torch.tensor([1, 5, 2, 0]), torch.tensor([3, 6, 4])
    found = attribution(model, prompt, response, of=of, chunk=chunk)
    e = model.table.weight[torch.cat([prompt, response])].double()
    for j, token in enumerate(response):
        p = (e[: 4 + j].sum(0) @ model.matrix.double()).softmax(-1)
        slope = model.matrix.double()[:, token] - model.matrix.double() @ p  # of log p, in the sum
        for i in range(4):
            wanted = (p[token] if of == "probability" else 1) * slope @ e[i]
            assert float(found[i, j]) == pytest.approx(float(wanted), rel=1e-4, abs=1e-6)


def test_attribution_of_a_decoder_equals_a_backward_for_each_token():
    model = random_llama(0)
    tokens = torch.randint(64, (11,), generator=torch.Generator().manual_seed(0))
    found = attribution(model, tokens[:7], tokens[7:], chunk=3)
    given = model.get_input_embeddings()(tokens).detach().requires_grad_()
    p = model(inputs_embeds=given[None]).logits[0].softmax(-1)
    for j in range(4):
        (gradient,) = torch.autograd.grad(p[6 + j, tokens[7 + j]], given, retain_graph=True)
        torch.testing.assert_close(found[:, j], (gradient * given).sum(-1)[:7], rtol=1e-3, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="of='logit'"):
        attribution(model, tokens[:7], tokens[7:], of="logit")
    with pytest.raises(ValueError, match="0 of response"):
        attribution(model, tokens, tokens[:0])


def test_memory_of_attribution_is_linear_in_the_prompt():
    """No N x N tensor is kept: the largest that the graph saves grows as the tokens do."""
    model = random_llama(0)

    def most(tokens):
        sizes = []
        ids = torch.zeros(tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            attribution(model, ids[:-2], ids[-2:], chunk=1)
        return max(sizes)

    assert most(1024) <= 2.1 * most(512)


def test_scores_become_whole_numbers_and_small_ones_nothing():
    raw = torch.tensor([[1.0, 0.0, -1.0], [0.71, 2.0, -2.0], [0.70, 1.5, 0.0], [-3.0, 1.0, 0.0]])
    assert sparsify(raw, threshold=0).tolist() == [[10, 0, 0], [8, 10, 0], [7, 8, 0], [0, 5, 0]]
    assert sparsify(raw).tolist() == [[10, 0, 0], [8, 10, 0], [0, 8, 0], [0, 0, 0]]


def test_density_is_large_for_what_matters_steadily():
    rows = torch.tensor(
        [[0.0, 9.0, 0.0, 0.0], [8.0, 8.0, 8.0, 8.0], [0.0, 0.0, 0.0, 0.0], [8.0, 0.0, 9.0, 10.0]]
    )
    found = density(rows)
    assert found[:3].tolist() == pytest.approx([1.0, 4**0.75, 0.0], abs=1e-6)
    torch.testing.assert_close(density(rows[:, [2, 0, 3, 1]]), found)


def test_the_score_of_an_instruction_is_its_density_over_the_log_of_its_length():
    densities = torch.tensor([1.0, 4.0, 2.0, 0.0])
    assert instruction_score(densities, range(1, 3)) == pytest.approx(1.5 / math.log2(4))
    assert find_span([5, 1, 2, 1, 2, 3], [1, 2, 3]) == range(3, 6)
    with pytest.raises(ValueError, match="2 tokens are nowhere"):
        find_span([1, 2, 3], [2, 1])


def attention_of(model, layer=0):
    return model.model.layers[layer].self_attn


@torch.no_grad()
def test_one_pair_of_words_passes_a_head_made_for_it(monkeypatch):
    """Words are axes; two dimensions of head 1 read word 0 as a query and word 2 as a key."""
    model = random_llama(0)
    for layer in range(4):
        for part in ("q_proj", "k_proj"):
            getattr(attention_of(model, layer), part).weight.zero_()
    model.model.layers[2].input_layernorm.weight.fill_(0.5)
    for r in (8, 9):
        attention_of(model, 2).q_proj.weight[r, 0] = 1.0
    for r in (0, 1):
        attention_of(model, 2).k_proj.weight[r, 2] = 1.0
    words = Words(("Big", "old", "Red"), torch.eye(64)[:3], torch.eye(64)[:3])
    monkeypatch.setattr(study, "SPREAD", 0.0)  # of three words none lies 1.96 deviations above the mean
    kin = torch.tensor([[1.0, 0.0, 0.9], [0.0, 1.0, 0.1], [0.9, 0.1, 1.0]])

    def pairs(similar, **more):
        found = head_pairs(model, words, similar=similar, top=1, **more)
        return {(head.layer, head.head): dict(head.pairs) for head in found if head.pairs}

    assert pairs(kin) == {(2, 1): {("big", "red"): 2}}
    assert pairs(kin, least=3) == {}
    assert pairs(torch.full_like(kin, 0.5)) == {}  # no word is nearer to one than to all
    attention_of(model, 2).k_proj.weight.neg_()
    assert pairs(kin) == {}


@torch.no_grad()
def test_queries_and_keys_of_words_are_those_of_the_model_with_its_norm_folded():
    model = random_llama(1)
    model.model.layers[1].input_layernorm.weight.copy_(torch.rand(64) + 0.5)
    modules, x = dict(model.named_modules()), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(
        study._normed(modules, "model.layers.1.self_attn", x),
        modules["model.layers.1.input_layernorm"](x),
        rtol=1e-4,
        atol=1e-5,
    )


@torch.no_grad()
def test_directions_are_the_principal_ones_and_signs_mean_nothing():
    model = random_llama(0)
    vectors = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    words = Words(tuple("abcdef"), *vectors)
    found = concepts(model, words, ranks=64, top=2)
    assert [each.layer for each in found] == [0, 1, 2, 3]
    values = model.model.layers[1].mlp.down_proj.weight.T.double()
    covariance = torch.cov(values.T)
    here = found[1]
    assert float(here.shares.sum()) == pytest.approx(1, abs=1e-5)
    along = here.directions[0].double()
    largest = torch.linalg.eigvalsh(covariance)[-1]
    assert float(along @ covariance @ along) == pytest.approx(float(largest), rel=1e-4)
    assert float(here.shares[0]) == pytest.approx(float(largest / covariance.trace()), rel=1e-4)
    near = (along @ torch.nn.functional.normalize(words.output.double(), dim=-1).T).abs()
    assert here.words[0] == tuple("abcdef"[i] for i in near.topk(2).indices)
    turned = here._replace(directions=-here.directions)
    assert overlap(here, turned, 8) == pytest.approx(1, abs=1e-4)
    assert overlap(here, found[2], 8) < 0.5


def test_a_model_without_what_is_read_is_refused():
    with pytest.raises(NotImplementedError, match=r"no layers called mlp\.down_proj"):
        concepts(nn.Linear(2, 2), Words(("a",), torch.ones(1, 2), torch.ones(1, 2)))
    with pytest.raises(ValueError, match="'b' have no tokens"):
        study.words_of(random_llama(0), ["a", "b"], [[1], []])


def test_welch_gives_known_values():
    first, second = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9], [16.9, 20.9, 23.6, 19.8, 15.0, 18.8]
    found = welch(first, second)
    stats = pytest.importorskip("scipy.stats")
    known = stats.ttest_ind(first, second, equal_var=False, alternative="greater")
    assert found.t == pytest.approx(known.statistic) and found.p == pytest.approx(known.pvalue, abs=1e-6)
    assert welch(second, first).p == pytest.approx(1 - found.p, abs=1e-6)
    with pytest.raises(ValueError, match="Neither sample varies"):
        welch([1.0, 1.0], [2.0, 2.0])
    with pytest.raises(ValueError, match="two values or more"):
        welch([1.0], [2.0, 3.0])


def test_a_planted_copy_differs_where_it_says():
    here = planted(3)
    assert isinstance(here, Planted)
    changed = {
        name
        for (name, a), b in zip(here.base.state_dict().items(), here.tuned.state_dict().values(), strict=True)
        if not torch.equal(a, b)
    }
    attention = f"model.layers.{here.head // 8}.self_attn"
    assert changed == {
        f"{attention}.q_proj.weight",
        f"{attention}.k_proj.weight",
        f"model.layers.{here.layer}.mlp.down_proj.weight",
    }
