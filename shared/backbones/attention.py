"""How attention layers compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from shared.backbones.protocol import Backbone

_FEW = 32 * 32  # places that look at each other: 4 MB for each head and picture, and 64 MB at twice the side


def pays(backbone: Backbone, side: int) -> bool:
    """Whether `unfused_attention` does for pictures of `side` pixels: on a CPU, while they are small. It keeps every row of
    every attention for the backward pass, which at 512 pixels would be gigabytes."""
    latents = backbone.latent_shape(side, side)
    return backbone.device.type == "cpu" and latents[-1] * latents[-2] <= _FEW


@contextmanager
def unfused_attention(network: nn.Module, on: bool) -> Iterator[None]:
    """Inside, diffusers' attention layers multiply matrices instead of calling PyTorch's fused kernel.

    The same function up to rounding; on a CPU the kernel's backward pass is slow (`tests/bench/bench_step.py` prints how
    much a step gains). Layers that run in something else than diffusers' default are left alone.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    layers = [m for m in network.modules() if on and isinstance(m, Attention) and type(m.processor) is AttnProcessor2_0]
    fused = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.processor = AttnProcessor()  # type: ignore[assignment]
        yield
    finally:
        for layer, processor in zip(layers, fused, strict=True):
            layer.processor = processor
