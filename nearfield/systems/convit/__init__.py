"""ConViT: attention that starts as a convolution and may leave locality through a gate for each head."""
