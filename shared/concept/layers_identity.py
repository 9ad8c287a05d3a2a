"""Computes a fingerprint of the weights that a concept builds on. It is the same in every precision."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.concept.fitting import base_weight

_SAMPLES = 4096  # the maximum number of values sampled from each weight


@torch.no_grad()
def layers_identity(backbone: Backbone, layers: Mapping[str, Iterable[str]], encoders: Iterable[str]) -> str:
    """Returns a sha256 hash of the weights that a concept builds on: those of its layers, and the embeddings of a few
    letters.

    Only the signs of a sample of the values are hashed. Rounding to another precision keeps the signs, so a model has
    the same hash in every precision.
    """
    digest = hashlib.sha256()
    with backbone.active({}):  # with every concept switched off, changed weights have their base values
        weights = [(c, p, base_weight(backbone, c, p)) for c, paths in sorted(layers.items()) for p in sorted(paths)]
        words = [(c, "", backbone.word_embeddings(c, "a b c d e")) for c in sorted(encoders)]
        for component, path, weight in [*weights, *words]:
            if weight is not None:
                digest.update(f"{component}.{path}".encode() + _signs(weight))
    return digest.hexdigest()


def _signs(weight: Tensor) -> bytes:
    flat = weight.detach().reshape(-1)
    # odd, because an even step would skip every second column of a matrix of even width
    step = -(-flat.numel() // _SAMPLES) | 1
    return torch.signbit(flat[::step]).cpu().numpy().tobytes()
