"""Token merging: neighbours into spans, or any tokens into groups; differentiable, and with a way back."""

from nearfield.ops.merge.adjacent import Merged, merge_adjacent
from nearfield.ops.merge.bipartite import Groups, bipartite_merge
from nearfield.ops.merge.geometry import lengths, num_pairs
from nearfield.ops.merge.sampling import sample_informative
from nearfield.ops.merge.spans import bipartite_unmerge, proportional_bias, span_mass, span_sources, unmerge

__all__ = [
    "Groups",
    "Merged",
    "bipartite_merge",
    "bipartite_unmerge",
    "lengths",
    "merge_adjacent",
    "num_pairs",
    "proportional_bias",
    "sample_informative",
    "span_mass",
    "span_sources",
    "unmerge",
]
