"""Foreign models: the only place that knows how PyTorch and transformers models call attention."""
