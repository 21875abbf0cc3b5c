"""Steers with an operator of their own: asked with edited tensors, in order, where it can be told all."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfield.hosts.seam import Site
from nearfield.ops.dense import dense_attention
from nearfield.steer import Steer

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**more):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **more})).eval()


def ids(rows=2, tokens=20):
    return torch.randint(1, 96, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@dataclass
class Dense(Steer):
    """The host's own attention by another operator, times a factor."""

    factor: float = 1.0
    sites: str = "*"
    seen: list = field(default_factory=list)

    def attend(self, site: Site, query, key, value, mask, scale):
        self.seen.append((site.name, tuple(query.shape), tuple(key.shape), mask is None))
        causal = mask is None and site.is_causal
        return self.factor * dense_attention(query, key, value, mask=mask, is_causal=causal, scale=scale)


@dataclass
class Silent(Dense):
    """Looks and leaves the site to the host."""

    def attend(self, site, query, key, value, mask, scale):
        super().attend(site, query, key, value, mask, scale)


@dataclass
class Sharpen(Steer):
    factor: float = 1.0
    sites: str = "*"

    def edit(self, site, query, key, value):
        return query * self.factor, key, value


@dataclass
class Favour(Steer):
    bias: float = 0.0
    sites: str = "*"

    def score(self, site, scores, rows, keys):
        return scores + self.bias * (torch.arange(keys.start, keys.stop) % 5 == 0)


@dataclass
class Louder(Steer):
    factor: float = 1.0
    sites: str = "*"

    def output(self, site, heads):
        return heads * self.factor


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def padded():
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def test_the_hosts_own_attention_by_another_operator():
    model, steer = llama(), Dense(sites="*.layers.[02].*")
    alone = model(ids()).logits
    with steer(model):
        found = model(ids()).logits
        assert [name for name, *_ in steer.seen] == [f"model.layers.{i}.self_attn" for i in (0, 2)]
        assert steer.seen[0][1:] == ((2, 20, 4, 8), (2, 20, 2, 8), True)
        close(model(ids(), **padded()).logits[padded()["attention_mask"].bool()],
              unsteered(model, padded())[padded()["attention_mask"].bool()])  # fmt: skip
        assert steer.seen[-1][-1] is False
    close(found, alone)
    assert not torch.equal(found, alone)
    assert torch.equal(model(ids()).logits, alone)
    with Dense(1.5)(model):
        assert not torch.allclose(model(ids()).logits, alone, atol=1e-3)


def unsteered(model, given):
    twin = llama()
    twin.load_state_dict(model.state_dict())
    return twin(ids(), **given).logits


def test_none_leaves_the_bits_of_the_host():
    model, steer = llama(), Silent()
    alone = model(ids()).logits
    with steer(model):
        assert torch.equal(model(ids()).logits, alone)
    assert len(steer.seen) == 3
    assert not any("nearfield" in key for module in model.modules() for key in vars(module))


def test_it_stands_between_edits_and_outputs_and_the_last_answers():
    model = llama()
    first, last = Dense(9.0), Dense(1.5)
    with (first + Sharpen(1.3) + last + Louder(2.0))(model):
        found = model(ids()).logits
    assert not first.seen and len(last.seen) == 3
    with (Sharpen(1.3) + Louder(3.0))(model):
        close(found, model(ids()).logits)
    silent = Silent()
    with (Dense(1.5) + silent)(model), Louder(2.0)(model):
        louder = model(ids()).logits
    assert len(silent.seen) == 3
    with Louder(3.0)(model):
        close(louder, model(ids()).logits)


def test_an_operator_and_other_scores_exclude_each_other():
    model = llama()
    with (Favour() + Dense())(model):  # scores that come back equal are no other scores
        close(model(ids()).logits, llama()(ids()).logits)
    with (Favour(2.0) + Dense())(model), pytest.raises(ValueError, match="the scores are changed too"):
        model(ids())
    with (Favour(2.0, sites="*.0.*") + Dense(sites="*.1.*"))(model):
        model(ids())


def test_steps_are_shown_all_keys():
    model, steer = llama(), Dense(sites="*.layers.1.*")
    cache = transformers.DynamicCache(config=model.config)
    alone = model(ids()).logits
    with steer(model):
        model(ids()[:, :15], past_key_values=cache)
        close(model(ids()[:, 15:16], past_key_values=cache).logits, alone[:, 15:16])
        close(model(ids()[:, 16:], past_key_values=cache).logits, alone[:, 16:])
    assert [(q[1], k[1], free) for _, q, k, free in steer.seen] == [
        (15, 15, True),
        (1, 16, True),
        (4, 20, False),
    ]


def test_capped_scores_and_dropped_weights_are_not_its_matter():
    config = transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=8, attn_logit_softcapping=0.05)
    torch.manual_seed(0)
    gemma, steer = transformers.Gemma2ForCausalLM(config).eval(), Dense(2.0)
    alone = gemma(ids()).logits
    with steer(gemma):
        close(gemma(ids()).logits, alone)
    assert not steer.seen
    training, steer = llama(attention_dropout=0.5).train(), Dense(2.0)
    with steer(training):
        training(ids())
    assert not steer.seen


def test_plain_torch_hosts_too():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))

    model, x, steer = nn.Sequential(Attention()), torch.randn(2, 12, 16), Dense()
    with steer(model):
        close(model(x), nn.Sequential.forward(model, x))
    assert steer.seen[0][1:] == ((2, 12, 2, 8), (2, 12, 2, 8), True)


def test_a_wrong_shape_is_named():
    class Short(Steer):
        sites = "*"

        def attend(self, site, query, key, value, mask, scale):
            return query[:, :1]

    model = llama()
    with (
        Short()(model),
        pytest.raises(ValueError, match=r"Short.attend gave \[2, 1, 4, 8\] .* Give \[2, 20, 4, 8\]"),
    ):
        model(ids())
