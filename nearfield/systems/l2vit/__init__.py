"""L2ViT: softmax attention inside windows alternates with linear attention over all positions."""
