"""Tiny random AnimateDiff pipelines, built from the real diffusers classes."""

from __future__ import annotations

from typing import Any

import torch

from pcs_video.backbones.animatediff import with_motion


def motion_adapter(seed: int = 0, frames: int = 8, scale: float = 0.2) -> Any:
    """Builds a `MotionAdapter` for the tiny U-Net.

    Its output projections are drawn with standard deviation `scale`, so that the frames visibly influence each other.
    """
    from diffusers import MotionAdapter

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter: Any = MotionAdapter(
            block_out_channels=(16, 32, 32),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=4,
            motion_max_seq_length=frames,
        )
        for name, parameter in adapter.named_parameters():
            if "proj_out" in name:
                torch.nn.init.normal_(parameter, std=scale)
    return adapter.eval()


def build_animatediff(pipe: Any, seed: int = 0, frames: int = 8) -> Any:
    """Adds motion modules to a tiny `StableDiffusionPipeline`."""
    return with_motion(pipe, motion_adapter(seed, frames))
