"""TNT: a small transformer among the words of each patch feeds the transformer among patches."""
