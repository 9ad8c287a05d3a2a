"""Changes to a model's attention that belong to a concept, in training and in use. A new part is one file and one line here."""

from shared.attention.base import AttentionPart
from shared.attention.sparse_causal import SparseCausal

Attention = SparseCausal  # a union, once there are more

__all__ = ["Attention", "AttentionPart", "SparseCausal"]
