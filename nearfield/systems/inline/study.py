"""Small attention layers written out as their matrix: to look at rows, and to hide places from queries."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfield.nn.attention import HEADS
from nearfield.systems.inline.layer import LocalResidual

KINDS = ("softmax", "divided", "InLine, no residual", "InLine")
EQUAL = 0.05  # near-duplicates differ by less than this share of how far they are from all weights equal


def rows(
    kind: str,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    hidden: Bool[Tensor, "n n"] | None = None,
) -> Float[Tensor, "b h n n"]:
    """The attention matrix written out; `hidden` pairs get 0, and what is left of a row still sums to one."""
    if hidden is None:
        hidden = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    if kind == "divided":
        weights = (q.relu() @ k.relu().mT).masked_fill(hidden, 0)
        return weights / (weights.sum(-1, keepdim=True) + 1e-10)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if kind == "softmax":
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)
    count = (~hidden).sum(-1, keepdim=True)
    mean = scores.masked_fill(hidden, 0).sum(-1, keepdim=True) / count
    return ((scores - mean + 1) / count).masked_fill(hidden, 0)


class Written(nn.Module):
    """An attention layer by its matrix, to be looked at, and to hide pairs of places from."""

    def __init__(self, kind: str, dim: int, num_heads: int):
        super().__init__()
        self.kind, self.num_heads = kind, num_heads
        self.hidden: Tensor | None = None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.residual = LocalResidual(dim, num_heads) if kind == "InLine" else None

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        matrix, v = self.matrix(x)
        out = rearrange(matrix @ v, "b h (y x) d -> b y x (h d)", y=x.shape[1])
        if self.residual is not None:
            out = out + self.residual(rearrange(v, "b h (y x) d -> b y x (h d)", y=x.shape[1]), x)
        return self.proj(out)

    def matrix(self, x: Float[Tensor, "b y x dim"]) -> tuple[Tensor, Tensor]:
        """The rows and the values."""
        q, k, v = rearrange(self.qkv(x.flatten(1, 2)), HEADS, three=3, h=self.num_heads).transpose(2, 3)
        return rows(self.kind, q, k, self.hidden), v


def hide(net: nn.Module, hidden: Bool[Tensor, "n n"] | None) -> None:
    """Let no query of any layer of `net` see the keys that are True in its row; None shows them again."""
    for layer in net.modules():
        if isinstance(layer, Written):
            layer.hidden = hidden


@torch.no_grad()
def duplicates(net: nn.Module, pictures: Tensor) -> float:
    """The share of rows that are nearly the row of another query of the same picture and head."""
    seen: list[Tensor] = []
    watching = [
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(layer.matrix(*inputs)[0]))
        for layer in net.modules()
        if isinstance(layer, Written)
    ]
    net(pictures)
    for hook in watching:
        hook.remove()
    matrix = torch.stack(seen)
    gaps = torch.cdist(matrix, matrix) / (matrix - 1 / matrix.shape[-1]).norm(dim=-1, keepdim=True)
    gaps.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return float((gaps.amin(-1) < EQUAL).float().mean())
