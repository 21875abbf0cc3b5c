"""HTNet: attention within the blocks of four facial regions, merged level by level, for micro-expressions."""
