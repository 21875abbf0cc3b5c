"""Generalized Neighborhood Attention: strides of `nearfield.ops.neighborhood`, and `nearfield.plan`."""
