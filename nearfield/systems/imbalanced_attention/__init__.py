"""PAINT: image tokens that the vision tower itself attends to get more attention while a model speaks."""
