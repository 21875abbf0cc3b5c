"""How local a model's attention is, and what a local pattern would cost it."""
