"""Changes to a model's attention that belong to a concept, in training and in generation.

To add a part, write one file and add one line here.
"""

from shared.attention.base import AttentionPart
from shared.attention.sparse_causal import SparseCausal

Attention = SparseCausal  # becomes a union when there are more

__all__ = ["Attention", "AttentionPart", "SparseCausal"]
