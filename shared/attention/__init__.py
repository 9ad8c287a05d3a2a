"""Changes to a model's attention that belong to a concept. They take effect in both training and generation.

To add a part, write a module and add its class here.
"""

from shared.attention.base import AttentionPart
from shared.attention.sparse_causal import SparseCausal

Attention = SparseCausal  # a union, once there are several parts

__all__ = ["Attention", "AttentionPart", "SparseCausal"]
