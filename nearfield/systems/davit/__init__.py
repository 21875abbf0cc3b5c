"""DaViT: window attention over space alternates with attention over channels."""
