"""Laws of the layer of local linear attention."""

from __future__ import annotations

import pytest
import torch

from nearfield.nn.local_linear_attention import LocalLinearAttention
from nearfield.nn.rotary import rotate
from nearfield.ops.dense import dense_attention
from nearfield.testing import assert_close

KINDS = {"full": {}, "window": {"kernel_size": 5}, "grouped": {"num_kv_heads": 2, "rope_base": None}}


def layer_of(kind: str, dtype: torch.dtype = torch.float64, **more: object) -> LocalLinearAttention:
    torch.manual_seed(0)
    return LocalLinearAttention(24, 4, **{**KINDS[kind], **more}).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [(13, 1, 1, 1), (1, 1, 14), (3, 9, 2, 2), (0, 16)])
def test_steps_with_a_cache_are_the_whole(kind: str, chunks: tuple[int, ...]) -> None:
    layer, x = layer_of(kind), torch.randn(2, 16, 24, dtype=torch.float64)
    outputs, cache = [], None
    with torch.no_grad():
        for part in x.split([n for n in chunks if n], 1):
            out, cache = layer.step(part, cache)
            outputs.append(out)
        assert_close(torch.cat(outputs, 1), layer(x), within=1e-9)  # few iterations amplify rounding
    assert cache is not None
    assert cache.length == 16
    assert cache.key.shape[1] == (4 if kind == "window" else 16)


def test_a_large_ridge_is_softmax_attention() -> None:
    layer, x = layer_of("full", ridge_init=1e8), torch.randn(2, 16, 24, dtype=torch.float64)
    q, k, v = layer._project(x, 0)
    expected = layer.proj(dense_attention(q, k, v, is_causal=True).flatten(-2))
    assert_close(layer(x), expected, within=1e-7)
    assert not torch.allclose(layer_of("full")(x), expected, rtol=1e-3)


def test_the_future_and_what_left_the_window_have_no_say() -> None:
    layer, x = layer_of("window"), torch.randn(1, 16, 24, dtype=torch.float64)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0, 10].sum(), x)
    seen = grad.abs().amax(-1)[0] > 0
    assert seen.nonzero().flatten().tolist() == [6, 7, 8, 9, 10]


def test_every_parameter_learns_and_the_ridge_starts_as_asked() -> None:
    layer, x = layer_of("grouped", ridge_init=2.5), torch.randn(2, 9, 24, dtype=torch.float64)
    assert torch.allclose(layer.ridge, torch.full((4,), 2.5, dtype=torch.float64))
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_distances_matter_and_positions_do_not() -> None:
    q, k = torch.randn(2, 1, 6, 1, 8, dtype=torch.float64)
    at = torch.arange(6)[None]
    near, far = (torch.einsum("bnhd,bmhd->bnm", rotate(q, at + s), rotate(k, at + s)) for s in (0, 1000))
    assert_close(near, far, within=1e-10)  # angles of 1000 have lost three digits
    moved = torch.einsum("bnhd,bmhd->bnm", rotate(q, at), rotate(k, at + 1))
    assert not torch.allclose(near, moved)
    assert torch.equal(rotate(q, at[:, :1].expand(1, 6)), q)


def test_half_precision_and_the_meta_device() -> None:
    layer = layer_of("full", torch.bfloat16, ridge_floor=0.25)
    x = torch.randn(1, 20, 24)
    assert_close(
        layer(x.bfloat16()), layer.double()(x.double()).bfloat16(), within=3e-2
    )  # projections round too
    with torch.device("meta"):
        empty = LocalLinearAttention(24, 4, kernel_size=5)
    assert all(p.is_meta for p in empty.parameters())
    real = empty.to_empty(device="cpu")
    real.load_state_dict(layer_of("window", torch.float32).state_dict())
    assert torch.equal(real(x), layer_of("window", torch.float32)(x))


@pytest.mark.compile
def test_it_compiles_whole() -> None:
    torch._dynamo.reset()
    layer = layer_of("window", torch.float32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (7, 12):
        x = torch.randn(1, tokens, 24)
        assert_close(compiled(x), layer(x))


def test_wrong_arguments_are_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="must divide"):
        LocalLinearAttention(24, 5)
    with pytest.raises(ValueError, match="must divide"):
        LocalLinearAttention(24, 4, 3)
    with pytest.raises(ValueError, match="below ridge_init"):
        LocalLinearAttention(24, 4, ridge_init=0.01)
    with pytest.raises(ValueError, match="even"):
        rotate(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, dtype=torch.int64))
