"""UniFormer: learned local affinities on fine maps, attention between all positions on coarse ones."""
