"""TNT models: words attend to the words of their patch, and patches, the sentences, to one another."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.core.dims import per_dim
from nearfield.nn.attention import Attention, WindowAttention
from nearfield.nn.backbone import Backbone
from nearfield.nn.convolution import pad_to
from nearfield.nn.mlp import Mlp
from nearfield.nn.position import resize_positions
from nearfield.nn.residual import DropPath, drop_path_rates

POSITIONS = ("word", "sentence")


class State(NamedTuple):
    """What runs from block to block: words, sentences, and the class token beside these."""

    words: Tensor  # [B, Y, X, M, c]
    sentences: Tensor  # [B, Y, X, d]
    token: Tensor  # [B, 1, d]


class Compose(nn.Module):
    """One vector for the words of each patch, laid end to end: norm, linear, norm.

    `by_word` norms each word by itself before, and nothing behind, as the older layout has it.
    """

    def __init__(self, word_dim: int, num_words: int, dim: int, *, bias: bool, by_word: bool = False):
        super().__init__()
        self.by_word = by_word
        self.norm1 = nn.LayerNorm(word_dim if by_word else num_words * word_dim)
        self.proj = nn.Linear(num_words * word_dim, dim, bias=bias)
        self.norm2 = nn.Identity() if by_word else nn.LayerNorm(dim)

    def forward(self, words: Float[Tensor, "b y x words c"]) -> Float[Tensor, "b y x dim"]:
        x = self.norm1(words).flatten(-2) if self.by_word else self.norm1(words.flatten(-2))
        return self.norm2(self.proj(x))


class Stem(nn.Module):
    """Words of a picture, by a 7 x 7 convolution that sees zeros outside of the patch, and its sentences.

    With `whole` the convolution goes over the whole picture, and words see 3 pixels of other patches.
    """

    def __init__(
        self,
        in_channels: int,
        word_dim: int,
        dim: int,
        *,
        patch_size: int,
        stride: int,
        whole: bool,
        has_positions: bool,
    ):
        super().__init__()
        if patch_size % stride:
            raise ValueError(f"stride={stride} must divide patch_size={patch_size} into words.")
        self.patch_size, self.side, self.whole = patch_size, patch_size // stride, whole
        self.conv = nn.Conv2d(in_channels, word_dim, 7, stride, 3)
        self.pos_embed = nn.Parameter(torch.empty(self.side**2, word_dim)) if has_positions else None
        self.compose = Compose(word_dim, self.side**2, dim, bias=True)

    def forward(
        self, images: Float[Tensor, "b channels y x"]
    ) -> tuple[Float[Tensor, "b y2 x2 words c"], Float[Tensor, "b y2 x2 dim"]]:
        words = self.words(images)
        if self.pos_embed is not None:
            words = words + self.pos_embed
        return words, self.compose(words)

    def words(self, images: Float[Tensor, "b channels y x"]) -> Float[Tensor, "b y2 x2 words c"]:
        """The words, yet without their positions."""
        patch = (self.patch_size, self.patch_size)
        images = pad_to(images.movedim(1, -1), patch).movedim(-1, 1)
        height, width = (length // self.patch_size for length in images.shape[-2:])
        if self.whole:
            return rearrange(self.conv(images), "b c (y p) (x q) -> b y x (p q) c", p=self.side, q=self.side)
        patches = rearrange(images, "b c (y p) (x q) -> (b y x) c p q", y=height, x=width)
        return rearrange(self.conv(patches), "(b y x) c p q -> b y x (p q) c", y=height, x=width)


class Inner(nn.Module):
    """Words attend to the words of their patch and pass a small network; then they join the sentence."""

    def __init__(
        self, word_dim: int, num_heads: int, num_words: int, dim: int, *, drop_path: DropPath, by_word: bool
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(word_dim)
        self.attn = WindowAttention(word_dim, num_heads, num_words, qkv_bias=False)
        self.norm2 = nn.LayerNorm(word_dim)
        self.mlp = Mlp(word_dim, 4 * word_dim)
        self.compose = Compose(word_dim, num_words, dim, bias=by_word, by_word=by_word)
        self.drop_path = drop_path

    def forward(
        self, words: Float[Tensor, "b y x words c"]
    ) -> tuple[Float[Tensor, "b y x words c"], Float[Tensor, "b y x dim"]]:
        rows = self.norm1(words).flatten(1, 3)  # patches end to end, each of them one window
        words = words + self._dropped(self.attn(rows).view(words.shape))
        words = words + self._dropped(self.mlp(self.norm2(words)))
        return words, self.compose(words)

    def _dropped(self, branch: Tensor) -> Tensor:
        """Patches, not pictures, are what is dropped of an inner branch."""
        return self.drop_path(branch.flatten(0, 2)).view(branch.shape)


class Block(nn.Module):
    """The inner transformer adds to the sentences, which then attend to one another and the class token."""

    def __init__(self, dim: int, num_heads: int, inner: Inner | None, drop_path: DropPath):
        super().__init__()
        self.inner = inner
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = drop_path

    def forward(self, state: State) -> State:
        words, sentences, token = state
        if self.inner is not None:
            words, told = self.inner(words)
            sentences = sentences + told
        x = torch.cat([token, sentences.flatten(1, 2)], 1)  # [B, 1 + N, d]
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return State(words, x[:, 1:].unflatten(1, sentences.shape[1:3]), x[:, :1])


class TNT(Backbone):
    """A vision transformer on sentences, with a transformer on words inside each.

    Features are `[B, 1 + N, d]`, the class token first; it alone goes into the classifier.
    """

    parts_name = "blocks"
    global_pool = "token"
    normed_anywhere = True

    def __init__(
        self,
        dims: tuple[int, int],
        num_heads: tuple[int, int],
        depth: int,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int | tuple[int, int],
        patch_size: int,
        stride: int,
        drop_path: float,
        legacy: bool,
        positions: Collection[str],
    ):
        (word_dim, dim), (word_heads, heads) = dims, num_heads
        super().__init__(dim, num_classes)
        if set(positions) - set(POSITIONS):
            raise ValueError(f"positions={positions!r} may hold {' and '.join(POSITIONS)}.")
        self.stem = Stem(
            in_channels,
            word_dim,
            dim,
            patch_size=patch_size,
            stride=stride,
            whole=legacy,
            has_positions="word" in positions,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed: nn.Parameter | None = None
        self.pos_embed_token: nn.Parameter | None = None
        if "sentence" in positions:
            grid = (max(1, side // patch_size) for side in per_dim("image_size", image_size, 2))
            self.pos_embed = nn.Parameter(torch.empty(1, *grid, dim))
            self.pos_embed_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList()
        for rate in drop_path_rates(drop_path, (depth,))[0]:
            dropped, inner = DropPath(rate), None
            if word_heads:
                inner = Inner(word_dim, word_heads, self.stem.side**2, dim, drop_path=dropped, by_word=legacy)
            self.blocks.append(Block(dim, heads, inner, dropped))
        self.norm = nn.LayerNorm(dim)
        self.head = self.make_head(num_classes)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size, "module": f"blocks.{number}"} for number in range(depth)
        ]
        self.initialise()

    def initialise(self) -> None:
        """As usual, and the class token and positions alike."""
        super().initialise()
        for each in (self.cls_token, self.pos_embed, self.pos_embed_token, self.stem.pos_embed):
            if each is not None:
                nn.init.trunc_normal_(each, std=0.02)

    def embed(self, images: Float[Tensor, "b channels y x"]) -> State:
        words, sentences = self.stem(images)
        token: Tensor = self.cls_token
        if self.pos_embed is not None and self.pos_embed_token is not None:
            sentences = sentences + resize_positions(self.pos_embed, sentences.shape[1:3])
            token = token + self.pos_embed_token
        return State(words, sentences, token.repeat(len(words), 1, 1))

    def as_map(self, state: State) -> Float[Tensor, "b y x dim"]:
        return state.sentences

    def finish(self, state: State) -> Float[Tensor, "b tokens dim"]:
        return self.norm(torch.cat([state.token, state.sentences.flatten(1, 2)], 1))

    def pool(self, features: Float[Tensor, "b tokens dim"]) -> Float[Tensor, "b dim"]:
        """The class token."""
        return features[:, 0]

    def no_weight_decay(self) -> set[str]:
        names = {"cls_token", "pos_embed", "pos_embed_token", "stem.pos_embed"}
        return names & dict(self.named_parameters()).keys()

    def _normed(self, state: State) -> State:
        return State(state.words, self.norm(state.sentences), self.norm(state.token))


def tnt(
    dims: tuple[int, int],
    num_heads: tuple[int, int],
    depth: int = 12,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    stride: int = 4,
    drop_path: float = 0.1,
    legacy: bool = False,
    positions: Collection[str] = POSITIONS,
) -> TNT:
    """A TNT of any size: `dims` and `num_heads` are those of words and of sentences.

    A patch holds `(patch_size / stride)²` words. No heads for the words leave the inner transformer out.
    `legacy` is the older layout, of timm's tnt_s_legacy_patch16_224. `positions` says what has learned ones;
    those of sentences are interpolated for pictures of other sides than `image_size`.
    """
    return TNT(
        dims,
        num_heads,
        depth,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        patch_size=patch_size,
        stride=stride,
        drop_path=drop_path,
        legacy=legacy,
        positions=positions,
    )


tnt_tiny = partial(tnt, (12, 192), (2, 3))
tnt_small = partial(tnt, (24, 384), (4, 6))
tnt_base = partial(tnt, (40, 640), (4, 10))
tnt_small_legacy = partial(tnt_small, legacy=True)
