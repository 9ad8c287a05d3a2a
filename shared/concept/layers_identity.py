"""Computes a fingerprint of the weights that a concept builds on, which is the same in every precision."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.concept.fitting import base_weight

_SAMPLES = 4096  # values sampled from each weight to tell checkpoints apart


@torch.no_grad()
def layers_identity(backbone: Backbone, layers: Mapping[str, Iterable[str]], encoders: Iterable[str]) -> str:
    """Returns the sha256 of the signs of the weights that a concept builds on.

    These are the weights of its layers and the embeddings of a few letters. Rounding to another precision keeps the
    signs, so a model has the same hash in every precision.
    """
    digest = hashlib.sha256()
    with backbone.active({}):  # with everything off, changed weights have their base values
        weights = [(c, p, base_weight(backbone, c, p)) for c, paths in sorted(layers.items()) for p in sorted(paths)]
        words = [(c, "", backbone.word_embeddings(c, "a b c d e")) for c in sorted(encoders)]
        for component, path, weight in [*weights, *words]:
            if weight is not None:
                digest.update(f"{component}.{path}".encode() + _signs(weight))
    return digest.hexdigest()


def _signs(weight: Tensor) -> bytes:
    flat = weight.detach().reshape(-1)
    step = -(-flat.numel() // _SAMPLES) | 1  # odd, so that samples visit all columns of a matrix of even width
    return torch.signbit(flat[::step]).cpu().numpy().tobytes()
