"""Layers: modules built from the operators, one file each."""
