"""Which tokens to hide so that a model learns most: those that resist merging."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from nearfield.ops.routing.members import largest


@torch.no_grad()
def sample_informative(
    group_sizes: Int[Tensor, "b n"],
    num_samples: int,
    *,
    smallest: int = 1,
    key_mask: Bool[Tensor, "b n"] | None = None,
    generator: Generator | None = None,
) -> Bool[Tensor, "b n"]:
    """True at `num_samples` tokens of each row, drawn without replacement in proportion to 1 / size^2.

        sizes = groups.sizes.gather(1, groups.source)   # of each token, the size of its group
        hidden = sample_informative(sizes, num_samples=1024)

    Each group is as likely as it is small, and its tokens share that. Groups below `smallest` count as that
    large, so that tokens alone do not take it all. Masked tokens are never drawn; a row with fewer real
    tokens gets those.
    """
    if not 0 <= num_samples <= group_sizes.shape[1]:
        raise ValueError(
            f"num_samples={num_samples} of {group_sizes.shape[1]} tokens. Give between 0 and that many."
        )
    device = group_sizes.device if generator is None else generator.device
    lots = torch.rand(group_sizes.shape, generator=generator, device=device).to(group_sizes.device)
    # the largest of log weight + Gumbel noise are draws without replacement
    noise = (
        -(-lots.clamp(min=torch.finfo(lots.dtype).tiny).log()).clamp(min=torch.finfo(lots.dtype).tiny).log()
    )
    keys = noise - 2 * group_sizes.clamp(min=max(smallest, 1)).to(noise.dtype).log()
    if key_mask is not None:
        keys = keys.masked_fill(~key_mask, -torch.inf)
    return largest(keys, num_samples)
