"""Identifies a model's weights by a string that is the same in every precision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 2**16  # the most values to sample from each tensor


@torch.no_grad()
def checkpoint_identity(networks: Mapping[str, nn.Module], samples: int = SAMPLES) -> str:
    """Returns the SHA-256 of sign bits of all parameters in order of names, up to `samples` evenly spaced values of each.

    Rounding to any floating-point format keeps the sign bit, even of values that underflow to zero or overflow. So float32,
    float16 and bfloat16 files of one model, loaded in any precision and rounded any number of times, give exactly the same
    string. A hash of rounded values would not: float32 -> float16 -> bfloat16 and float32 -> bfloat16 differ in the last bit
    of some values, however many bits are kept.

    Two different checkpoints differ in some signs. Of n weights with spread s that each move by d, about n d / (pi s)
    change sign. One full-size layer gives 65,536 samples, so a change of a thousandth of its spread flips 20 signs, and the
    same change in a hundred layers flips 2,000: the probability that none flips is exp(-2,000). A change that flips no
    sampled sign goes unnoticed, for example a change to a few values among millions, or only to the scales of
    normalisation layers.
    """
    digest = hashlib.sha256()
    for name, module in sorted(networks.items()):
        digest.update(name.encode())
        for _, parameter in sorted(module.named_parameters()):
            digest.update(np.packbits(_signs(parameter, samples).numpy()).tobytes())
            digest.update(str(parameter.numel()).encode())
    return digest.hexdigest()


def _signs(tensor: Tensor, samples: int) -> Tensor:
    """Returns a sample of a tensor's signs, bool [n] on the CPU. The stride is odd, so that the sample covers all columns of a
    matrix whose width is a power of two."""
    flat = tensor.detach().reshape(-1)
    stride = -(-flat.numel() // samples) | 1 if flat.numel() > samples else 1
    return torch.signbit(flat[::stride]).cpu()
