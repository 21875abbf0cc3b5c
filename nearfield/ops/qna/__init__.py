"""Query-and-attend: attention in windows with one query for all of them, so that a token has one score."""

from __future__ import annotations

from math import prod

from jaxtyping import Float
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.core.dims import per_dim
from nearfield.ops.checks import check, no_forward_mode, no_transform, under_autocast
from nearfield.ops.qna import native, reference, tiled

__all__ = ["qna_attention"]

OP = "qna_attention"
BACKENDS = {"native": native.attend, "tiled": tiled.attend, "reference": reference.attend}
FEW = (
    9  # keys in a window up to which shifting the values is faster than the kernels (measured: not so at 15)
)


def qna_attention(
    score: Float[Tensor, "b *grid heads"],
    value: Float[Tensor, "b *grid heads dim"],
    position_bias: Float[Tensor, "heads *kernel"] | None = None,
    *,
    kernel_size: int | tuple[int, ...],
    backend: str = "auto",
) -> Float[Tensor, "b *grid heads dim"]:
    """The mean of the values around each token, weighted by one score for each of them.

        out[l] = sum_j exp(score[j] + position_bias[j - l]) value[j] / the same without value[j]

    where j runs over the window of odd `kernel_size` centred on l, and over tokens of the grid only. Entry 0
    of `position_bias` belongs to the first token of the window. With a query q that all windows share,
    `score = x @ (W_key q)` needs one product per token and head, whatever the kernel.
    """
    rank = score.dim() - 2
    if rank not in (1, 2, 3):
        raise ValueError(
            f"score has shape {list(score.shape)}. It must be [batch, one to three grid sides, heads]."
        )
    check("score", score, tuple(score.shape), value)
    if value.dim() != score.dim() + 1:
        raise ValueError(
            f"value has shape {list(value.shape)}. It must be {[*score.shape, 'dim']}: "
            "that of the scores, and channels."
        )
    check("value", value, (*score.shape, value.shape[-1]), score, score.dtype)
    sizes = per_dim("kernel_size", kernel_size, rank)
    if any(size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(
            f"kernel_size={kernel_size} must hold odd numbers of at least 1, so that windows have a centre."
        )
    if position_bias is not None:
        check("position_bias", position_bias, (score.shape[-1], *sizes), score)

    def ask_native() -> Verdict:
        few = f"with {prod(sizes)} keys in a window, shifting the values is faster."
        return Verdict(no_transform() or native.supports(score, value), few if prod(sizes) <= FEW else None)

    name = choose(
        OP, backend, {"native": ask_native, "tiled": lambda: Verdict(no_forward_mode()), "reference": Verdict}
    )

    def attend(score: Tensor, value: Tensor) -> Tensor:
        return BACKENDS[name](score, value, position_bias, sizes)

    return under_autocast(attend, score, value)
