"""Attention at a cost linear in the tokens: plain, gated, by the delta rule, or otherwise normalised."""

from nearfield.ops.linear.attention import delta_rule, gated_linear_attention, linear_attention
from nearfield.ops.linear.calls import LinearResult
from nearfield.ops.linear.normalizers import enhanced_linear_attention, inline_attention

__all__ = [
    "LinearResult",
    "delta_rule",
    "enhanced_linear_attention",
    "gated_linear_attention",
    "inline_attention",
    "linear_attention",
]
