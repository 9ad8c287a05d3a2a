"""Identifies a model's weights by a string that is the same in every precision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 2**16  # the maximum number of values to sample from each tensor


@torch.no_grad()
def checkpoint_identity(networks: Mapping[str, nn.Module], samples: int = SAMPLES) -> str:
    """Returns the SHA-256 of the sign bits of all parameters, in the order of their names. Each parameter contributes up to
    `samples` evenly spaced values. The hash also covers the networks' names and the parameters' sizes.

    Rounding to any floating-point format keeps the sign bit, even of values that underflow to zero or overflow. Therefore,
    float32, float16 and bfloat16 files of one model give exactly the same string, whatever precision they are loaded in and
    however often they are rounded. A hash of rounded values would not have this property: float32 -> float16 -> bfloat16 and
    float32 -> bfloat16 differ in the last bit of some values, however many bits are kept.

    Two different checkpoints normally differ in some signs. If n weights with standard deviation s each change by about d,
    roughly n d / (pi s) of them change sign. One full-size layer contributes 65,536 samples, so a change of a thousandth of
    its standard deviation flips about 20 signs. The same change in a hundred layers flips about 2,000 signs, and the
    probability that none flips is exp(-2,000). A change that flips no sampled sign goes unnoticed. Examples are changes to a
    few values among millions, and changes to nothing but the scales of normalisation layers.
    """
    digest = hashlib.sha256()
    for name, module in sorted(networks.items()):
        digest.update(name.encode())
        for _, parameter in sorted(module.named_parameters()):
            digest.update(np.packbits(_signs(parameter, samples).numpy()).tobytes())
            digest.update(str(parameter.numel()).encode())
    return digest.hexdigest()


def _signs(tensor: Tensor, samples: int) -> Tensor:
    """Returns a sample of a tensor's sign bits as a bool tensor [n] on the CPU. The stride is odd, so that the sample covers
    all columns of a matrix whose width is a power of two."""
    flat = tensor.detach().reshape(-1)
    stride = -(-flat.numel() // samples) | 1 if flat.numel() > samples else 1
    return torch.signbit(flat[::stride]).cpu()
