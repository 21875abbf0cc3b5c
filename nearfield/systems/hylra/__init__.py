"""HyLRA: in decoding, some layers choose the key blocks that are read and the next ones reuse the choice."""
