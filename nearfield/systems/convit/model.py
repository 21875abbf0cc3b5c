"""ConViT models: gated positional attention over the patches, then attention with a class token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.core.dims import per_dim
from nearfield.nn.attention import Attention
from nearfield.nn.backbone import Backbone
from nearfield.nn.mlp import Mlp
from nearfield.nn.position import resize_positions
from nearfield.nn.pyramid import PatchEmbed
from nearfield.nn.residual import DropPath, drop_path_rates
from nearfield.systems.convit.layer import GatedPositionalAttention


class State(NamedTuple):
    """What runs from block to block: the map of patches, and the class token beside it."""

    patches: Tensor  # [B, Y, X, C]
    token: Tensor  # [B, 1, C]


class Block(nn.Module):
    """Attention, then the feed-forward network; each added to what came in.

    A block of gated positional attention sees patches only; the class token waits until the first other one.
    """

    def __init__(self, dim: int, attention: nn.Module, *, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, state: State) -> State:
        patches, token = state
        if isinstance(self.attn, GatedPositionalAttention):
            return State(self._mixed(patches), token)
        x = self._mixed(torch.cat([token, patches.flatten(1, 2)], 1))  # [B, 1 + N, C]
        return State(x[:, 1:].unflatten(1, patches.shape[1:3]), x[:, :1])

    def _mixed(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConViT(Backbone):
    """A vision transformer whose first `local_depth` blocks have gated positional attention.

    Features are `[B, 1 + N, C]`, the class token first; it alone goes into the classifier.
    """

    parts_name = "blocks"
    global_pool = "token"
    normed_anywhere = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        depth: int,
        local_depth: int,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int | tuple[int, int],
        patch_size: int,
        drop_path: float,
        locality_strength: float | None,
    ):
        super().__init__(dim, num_classes)
        if not 0 <= local_depth < depth:
            raise ValueError(
                f"local_depth={local_depth} must be 0 to {depth - 1}: of {depth} blocks "
                "the class token needs at least one with plain attention."
            )
        self.stem = PatchEmbed(in_channels, dim, patch_size, patch_size)
        grid = (max(1, side // patch_size) for side in per_dim("image_size", image_size, 2))
        self.pos_embed = nn.Parameter(torch.empty(1, *grid, dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        make: list[Callable[..., nn.Module]] = [
            partial(GatedPositionalAttention, locality_strength=locality_strength)
        ] * local_depth
        make += [partial(Attention, qkv_bias=False)] * (depth - local_depth)
        (rates,) = drop_path_rates(drop_path, (depth,))
        self.blocks = nn.ModuleList(
            Block(dim, attention(dim, num_heads), drop_path=rate)
            for attention, rate in zip(make, rates, strict=True)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = self.make_head(num_classes)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size, "module": f"blocks.{number}"} for number in range(depth)
        ]
        self.initialise()

    def initialise(self) -> None:
        """As usual, then what makes attention local."""
        super().initialise()
        for each in (self.pos_embed, self.cls_token):
            nn.init.trunc_normal_(each, std=0.02)
        for module in self.modules():
            if isinstance(module, GatedPositionalAttention):
                module.make_local()

    def embed(self, images: Float[Tensor, "b channels y x"]) -> State:
        patches = self.stem(images.movedim(1, -1))
        patches = patches + resize_positions(self.pos_embed, patches.shape[1:3])
        return State(patches, self.cls_token.repeat(len(patches), 1, 1))

    def as_map(self, state: State) -> Float[Tensor, "b y x dim"]:
        return state.patches

    def finish(self, state: State) -> Float[Tensor, "b tokens dim"]:
        return self.norm(torch.cat([state.token, state.patches.flatten(1, 2)], 1))

    def pool(self, features: Float[Tensor, "b tokens dim"]) -> Float[Tensor, "b dim"]:
        """The class token."""
        return features[:, 0]

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def _normed(self, state: State) -> State:
        return State(self.norm(state.patches), self.norm(state.token))


def convit(
    head_dim: int,
    num_heads: int,
    depth: int = 12,
    local_depth: int = 10,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    drop_path: float = 0.1,
    locality_strength: float | None = 1.0,
) -> ConViT:
    """A ConViT of any size; pictures of other sides than `image_size` get interpolated positions.

    `local_depth=0` makes a plain vision transformer with a class token, and `locality_strength=None` gated
    attention without its local start.
    """
    return ConViT(
        head_dim * num_heads,
        num_heads,
        depth,
        local_depth,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        patch_size=patch_size,
        drop_path=drop_path,
        locality_strength=locality_strength,
    )


convit_tiny = partial(convit, 48, 4)
convit_tiny_plus = partial(convit, 64, 4)
convit_small = partial(convit, 48, 9)
convit_small_plus = partial(convit, 64, 9)
convit_base = partial(convit, 48, 16)
convit_base_plus = partial(convit, 64, 16)
