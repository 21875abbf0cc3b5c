"""Functions on tensors, one folder a family; the layout is `[batch, *tokens, heads, head_dim]` everywhere."""
