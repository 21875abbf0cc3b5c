"""Local linear attention: the output is the intercept of a local ridge regression of values on keys."""

from nearfield.ops.lla.attention import first_order_attention, local_linear_attention
from nearfield.ops.lla.decode import local_linear_attention_decode
from nearfield.ops.lla.solver import Solver

__all__ = ["Solver", "first_order_attention", "local_linear_attention", "local_linear_attention_decode"]
