"""What has decayed by how much inside chunks of tokens: none, one decay a head, or one a channel.

Log decays g <= 0 come as [..., C, 1 or K]. A key s is seen by a query t through exp(g_{s+1} + ... + g_t).
That is written as a product of two factors of at most 1, by a point between them: halving a chunk again and
again puts every pair (t, s) on both sides of exactly one middle. So nothing overflows, whatever g is, and no
small sum is a difference of large ones. C is a power of two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def blocks(matrix: Tensor, half: int) -> Tensor:
    """Of [..., C, C] the view [..., C / 2 half, half, half]: rows after, columns before each middle."""
    size, count = 2 * half, matrix.shape[-1] // (2 * half)
    tiles = matrix.unflatten(-1, (count, size)).unflatten(-3, (count, size))  # [..., count, t, count, s]
    return tiles.diagonal(dim1=-4, dim2=-2)[..., half:, :half, :].movedim(-1, -3)


def halved(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Of [..., C, D] the rows before and after each middle, views [..., C / 2 half, half, D]."""
    both = x.unflatten(-2, (-1, 2, half))
    return both[..., 0, :, :], both[..., 1, :, :]


class NoDecay:
    """Everything stays."""

    into: Tensor | None = None  # [..., C, 1 or K]: how far what was before the chunk has decayed at t
    out_of: Tensor | None = None  # [..., C, 1 or K]: how far key s has decayed at the end
    whole: Tensor | None = None  # [..., 1 or K, 1]: both at once

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[..., C, C]: q_t k_s, as far as it has decayed, for s <= t."""
        return (q @ k.mT).tril_()

    def scores_backward(self, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of q and k from that of the scores, whose entries with s > t are 0."""
        return grad @ k, grad.mT @ q

    def gradient(self, into: Tensor, out_of: Tensor, whole: Tensor) -> Tensor | None:
        """The gradient of g from those of the three exponents and of all scores before."""
        return None


class Decay(NoDecay):
    """One decay for all channels of a head, g [..., C, 1]."""

    def __init__(self, g: Tensor):
        self.halves: list[tuple[int, Tensor, Tensor]] = []  # per level: half, factor before, factor after
        since, until = g.clone(), torch.zeros_like(g)  # within blocks of `half`: sums up to t, sums after s
        half = 1
        while half < g.shape[-2]:
            since_before, since_after = halved(since, half)
            until_before, _ = halved(until, half)
            self.halves.append((half, until_before.exp(), since_after.exp()))
            before, after = since_before[..., -1:, :].clone(), since_after[..., -1:, :].clone()
            since_after += before
            until_before += after
            half *= 2
        self.into, self.out_of, self.whole = since.exp(), until.exp(), since[..., -1:, :].exp().mT
        self._prepare(g)

    def _prepare(self, g: Tensor) -> None:
        size = g.shape[-2]
        self.fade = torch.eye(size, dtype=g.dtype, device=g.device).repeat(*g.shape[:-2], 1, 1)
        for half, before, after in self.halves:
            blocks(self.fade, half).copy_(after * before.mT)
        self.change: Tensor | float = 0.0

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT).mul_(self.fade)

    def scores_backward(self, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        faded = grad * self.fade
        pairs = (faded * (q @ k.mT)).tril_(-1)  # a token does not decay for itself
        self.change = self.change + (pairs.sum(-1) - pairs.sum(-2)).unsqueeze(-1)
        return faded @ k, faded.mT @ q

    def gradient(self, into: Tensor, out_of: Tensor, whole: Tensor) -> Tensor:
        into, out_of = into.sum(-1, keepdim=True), out_of.sum(-1, keepdim=True)
        return from_here(into + self.change) + before_here(out_of) + whole.sum(-1).unsqueeze(-1).unsqueeze(-1)


class ChannelDecay(Decay):
    """A decay for every channel of the keys, g [..., C, K]."""

    def _prepare(self, g: Tensor) -> None:
        # per level, the gradients of the exponents after the middle and before it
        self.changes = [
            (torch.zeros_like(after), torch.zeros_like(before)) for _, before, after in self.halves
        ]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        out = torch.diag_embed((q * k).sum(-1))
        for half, before, after in self.halves:
            k_before, q_after = halved(k, half)[0] * before, halved(q, half)[1] * after
            blocks(out, half).copy_(q_after @ k_before.mT)
        return out

    def scores_backward(self, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        own = grad.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        dq, dk = own * k, own * q
        for (half, before, after), (since, until) in zip(self.halves, self.changes, strict=True):
            k_before, q_after = halved(k, half)[0] * before, halved(q, half)[1] * after
            block = blocks(grad, half)
            dq_after, dk_before = block @ k_before, block.mT @ q_after
            halved(dk, half)[0].add_(dk_before * before)
            halved(dq, half)[1].add_(dq_after * after)
            until += dk_before * k_before
            since += dq_after * q_after
        return dq, dk

    def gradient(self, into: Tensor, out_of: Tensor, whole: Tensor) -> Tensor:
        since, until = into.clone(), out_of.clone()  # the way of __init__ back, from large blocks to small
        since[..., -1, :] += whole
        for (half, _, _), change in zip(reversed(self.halves), reversed(self.changes), strict=True):
            since_before, since_after = halved(since, half)
            until_before, _ = halved(until, half)
            since_before[..., -1, :] += since_after.sum(-2)
            since_after[..., -1, :] += until_before.sum(-2)
            since_after += change[0]
            until_before += change[1]
        return since


def decay_of(g: Tensor | None) -> NoDecay:
    """The decay that g describes."""
    if g is None:
        return NoDecay()
    return Decay(g) if g.shape[-1] == 1 else ChannelDecay(g)


def from_here(x: Tensor) -> Tensor:
    """At each token of [..., C, D] the sum over it and those after."""
    return x.flip(-2).cumsum(-2).flip(-2)


def before_here(x: Tensor) -> Tensor:
    """At each token of [..., C, D] the sum over those before."""
    return F.pad(x, (0, 0, 1, -1)).cumsum(-2)
