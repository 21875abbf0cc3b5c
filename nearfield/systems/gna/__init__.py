"""Generalized Neighborhood Attention: strides in `nearfield.ops.neighborhood`, the simulator in `nearfield.plan`."""
