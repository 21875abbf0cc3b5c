"""LITv2: convolutional blocks on fine maps, then heads that look closely beside heads that look coarsely."""
