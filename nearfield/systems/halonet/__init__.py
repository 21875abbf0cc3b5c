"""HaloNet: blocks of queries attend to themselves and to a halo around, where a ResNet convolves."""
