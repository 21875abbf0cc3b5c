"""How the weights of narrow language models begin."""

import torch
from torch import nn

DRAWN = 0.02  # the deviation that transformers draws them with


@torch.no_grad()
def widen(layers: nn.Module, width: int) -> None:
    """Makes fresh matrices as large as their width asks for, a deviation of `width ** -0.5`.

    At transformers' 0.02 the scores of a narrow model are all but equal at first, and heads that look
    something up take many times as long to form.
    """
    for parameter in layers.parameters():
        if parameter.ndim > 1:
            parameter.mul_(width**-0.5 / DRAWN)
