"""Faster Neighborhood Attention: the operator lives in `nearfield.ops.neighborhood`; here are its claims."""
