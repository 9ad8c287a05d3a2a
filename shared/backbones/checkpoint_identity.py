"""Which weights a model has, as one string that is the same in every precision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 2**16  # of each tensor, at most


@torch.no_grad()
def checkpoint_identity(networks: Mapping[str, nn.Module], samples: int = SAMPLES) -> str:
    """sha256 over the sign bits of (up to `samples` evenly spread values of) every parameter, in the order of names.

    Rounding to the nearest value of any floating-point format keeps the sign bit, also of what underflows to zero or
    overflows. So files in float32, float16 and bfloat16 of one model, loaded in any precision and rounded any number
    of times, give the same string exactly. A hash of rounded values would not: float32 -> float16 -> bfloat16 and
    float32 -> bfloat16 differ in the last bit of some values, whatever is kept of it.

    Two different checkpoints differ in some sign. Of n weights with spread s that move by d each, about n d / (pi s)
    change their sign. One layer of full size gives 65,536 samples, so that a change of a thousandth of its spread flips
    20, and the same change of a hundred layers 2,000: that none does has a probability of exp(-2,000). What is not seen
    is a change that flips no sampled sign: of a few values among millions, or of the scales of normalisation layers
    alone.
    """
    digest = hashlib.sha256()
    for name, module in sorted(networks.items()):
        digest.update(name.encode())
        for _, parameter in sorted(module.named_parameters()):
            digest.update(np.packbits(_signs(parameter, samples).numpy()).tobytes())
            digest.update(str(parameter.numel()).encode())
    return digest.hexdigest()


def _signs(tensor: Tensor, samples: int) -> Tensor:
    """Bool [n] on the CPU. The stride is odd, so that it walks through the columns of a matrix of even width."""
    flat = tensor.detach().reshape(-1)
    stride = -(-flat.numel() // samples) | 1 if flat.numel() > samples else 1
    return torch.signbit(flat[::stride]).cpu()
