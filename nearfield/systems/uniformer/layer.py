"""UniFormer's blocks: local affinities, attention, attention by time and frame, attention of kept tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nearfield.nn.attention import HEADS, Attention
from nearfield.nn.convolution import ConvPosition, convolve, pad_to
from nearfield.nn.mlp import Mlp
from nearfield.nn.residual import DropPath, LayerScale
from nearfield.ops.dense import dense_attention

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class BatchNorm(nn.Module):
    """Batch norm of maps, or of clips with `rank=3`, whose channels come last."""

    def __init__(self, dim: int, rank: int = 2):
        super().__init__()
        self.norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](dim)

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        return convolve(self.norm, x)


class ClipEmbed(nn.Module):
    """A strided convolution of a clip, then a norm; other sides than its multiples get zeros behind."""

    def __init__(self, dim_in: int, dim: int, size: int, *, frames: int = 1, frame_stride: int = 1):
        super().__init__()
        self.proj = nn.Conv3d(
            dim_in, dim, (frames, size, size), (frame_stride, size, size), (frames // 2, 0, 0)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b t y x dim"]) -> Float[Tensor, "b t2 y2 x2 out"]:
        return self.norm(convolve(self.proj, pad_to(x, self.proj.stride)))


class LocalAttention(nn.Module):
    """Every channel weighs the 5 x 5 (of a clip 5 x 5 x 5) positions around by weights for their offset.

    Attention with a head for each channel, whose weights are learned and the same everywhere: `value`,
    `affinity`, `proj` are two matrices and a depthwise convolution between them.
    """

    def __init__(self, dim: int, *, kernel_size: int = 5, rank: int = 2):
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.value = nn.Linear(dim, dim)
        self.affinity = conv(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        return self.proj(convolve(self.affinity, self.value(x)))


class Parts(nn.Module):
    """What every block holds: a position code, attention of either kind, a feed-forward network.

    `layer_scale` is where learned factors for each channel of the two branches start.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        *,
        norm: Callable[[int], nn.Module] = LAYER_NORM,
        rank: int = 2,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.pos_embed = ConvPosition(dim, rank=rank)
        self.norm1 = norm(dim)
        self.attn = attention
        self.scale1 = _scale(dim, layer_scale)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.scale2 = _scale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)


class Block(Parts):
    """The three in turn, each added to what came in."""

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        x = self.pos_embed(x)
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class SplitBlock(Block):
    """Each position attends to itself in all frames of the clip, then each frame to itself.

    In the official order attention within frames sees what came through time, but is added to the tokens
    from before: what came through time does not go on by itself. Otherwise both are added in turn. At the
    start nothing comes through time.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attention: nn.Module,
        *,
        official: bool,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__(dim, attention, rank=3, drop_path=drop_path, layer_scale=layer_scale)
        self.official = official
        self.time_norm = LAYER_NORM(dim)
        self.time_attn = Attention(dim, num_heads)

    def forward(self, x: Float[Tensor, "b t y x dim"]) -> Float[Tensor, "b t y x dim"]:
        x = self.pos_embed(x)
        by_place = rearrange(x, "b t y x c -> (b y x) t c")
        by_place = by_place + self.drop_path(self.time_attn(self.time_norm(by_place)))
        seen = rearrange(by_place, "(b y x) t c -> (b t) y x c", y=x.shape[2], x=x.shape[3])
        frames = x.flatten(0, 1) if self.official else seen
        frames = frames + self.drop_path(self.scale1(self.attn(self.norm1(seen))))
        x = frames.view(x.shape)
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))

    def start_still(self) -> None:
        """Nothing comes through time at first; the matrix of ones lets gradients reach the values."""
        for parameter in (*self.time_attn.qkv.parameters(), self.time_attn.proj.bias):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.time_attn.proj.weight)


class State(NamedTuple):
    """What runs from block to block beside a class token."""

    map: Tensor  # [B, Y, X, C]
    token: Tensor  # [B, 1, C]
    score: Tensor | None  # [B, Y * X], how much the class token has attended to each position so far


class TokenBlock(Parts):
    """Attention between the class token and the share `prune_ratio` of tokens that it attended to most.

    The other tokens are merged into one by their scores, and to each of them is added what attention and the
    network add to that one. The score of the tokens that take part moves by `trade_off` towards the weight,
    a mean over heads, with which the class token attends to them here. The first block, to which nothing
    told the scores, sets them; None is for it, and all tokens take part.
    """

    attn: Attention

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        prune_ratio: float | None = None,
        trade_off: float = 0.5,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__(
            dim, Attention(dim, num_heads), mlp_ratio=mlp_ratio, drop_path=drop_path, layer_scale=layer_scale
        )
        if prune_ratio is not None and not 0 < prune_ratio <= 1:
            raise ValueError(f"prune_ratio={prune_ratio} must lie above 0 and be at most 1, which keeps all.")
        self.prune_ratio, self.trade_off = prune_ratio, trade_off
        self.scale3 = _scale(dim, None if prune_ratio is None else layer_scale)

    def forward(self, state: State) -> State:
        x, token, score = self.pos_embed(state.map), state.token, state.score
        tokens = x.flatten(1, 2)
        if score is None or self.prune_ratio is None or self.prune_ratio == 1:
            rows, seen, _ = self._through(torch.cat([token, tokens], 1))
            score = seen if score is None else score.lerp(seen, self.trade_off)
            return State(rows[:, 1:].view(x.shape), rows[:, :1], score)
        order = score.argsort(dim=1, descending=True, stable=True)
        kept, others = order.tensor_split([int(order.shape[1] * self.prune_ratio)], 1)
        share = score.gather(1, others)
        share = (share / share.sum(1, keepdim=True)).to(tokens.dtype)
        merged = share.unsqueeze(1) @ _taken(tokens, others)
        rows, seen, told = self._through(torch.cat([token, _taken(tokens, kept), merged], 1))
        tokens = tokens + self.scale3(told)
        tokens = tokens.scatter(1, _wide(kept, tokens), rows[:, 1:-1].to(tokens.dtype))
        score = score.scatter(1, kept, score.gather(1, kept).lerp(seen[:, :-1], self.trade_off))
        return State(tokens.view(x.shape), rows[:, :1], score)

    def _through(
        self, rows: Float[Tensor, "b n dim"]
    ) -> tuple[Float[Tensor, "b n dim"], Float[Tensor, "b others"], Float[Tensor, "b 1 dim"]]:
        """Rows behind both branches, how the first attends to the others, and what is added to the last.

        What is added is without drop path and factors, for `scale3` and the merged tokens.
        """
        q, k, v = rearrange(self.attn.qkv(self.norm1(rows)), HEADS, three=3, h=self.attn.num_heads)
        attended = self.attn.proj(dense_attention(q, k, v).flatten(-2))
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = torch.einsum("bhd,bnhd->bhn", q[:, 0], k).to(wide) * q.shape[-1] ** -0.5
        seen = logits.softmax(-1).mean(1)[:, 1:]
        rows = rows + self.drop_path(self.scale1(attended))
        fed = self.mlp(self.norm2(rows))
        return rows + self.drop_path(self.scale2(fed)), seen, attended[:, -1:] + fed[:, -1:]


def halved(score: Float[Tensor, "b n"], sides: Sequence[int]) -> Float[Tensor, "b n2"]:
    """Scores of a map with half the sides, rounded up: means of 2 x 2, whose sum is that of the scores."""
    means = F.avg_pool2d(score.view(-1, 1, *sides), 2, ceil_mode=True).flatten(1)
    return means * (score.sum(1, keepdim=True) / means.sum(1, keepdim=True))


def _scale(dim: int, start: float | None) -> nn.Module:
    return nn.Identity() if start is None else LayerScale(dim, start)


def _wide(numbers: Tensor, tokens: Float[Tensor, "b n dim"]) -> Tensor:
    return numbers.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])


def _taken(tokens: Float[Tensor, "b n dim"], numbers: Tensor) -> Float[Tensor, "b m dim"]:
    return tokens.gather(1, _wide(numbers, tokens))
