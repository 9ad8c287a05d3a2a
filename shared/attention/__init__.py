"""What a concept changes in how its model attends, while it is learned and where it acts. A new part: one file, one line."""

from shared.attention.base import AttentionPart
from shared.attention.sparse_causal import SparseCausal

Attention = SparseCausal  # a union, once there are more

__all__ = ["Attention", "AttentionPart", "SparseCausal"]
