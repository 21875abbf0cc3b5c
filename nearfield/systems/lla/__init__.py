"""Local Linear Attention: softmax attention with a local linear regression in the place of a local mean."""
