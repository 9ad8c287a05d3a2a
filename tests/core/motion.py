"""A tiny U-Net with motion modules, used to test how a backbone describes and runs its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def motion_unet(unet: Any) -> Any:
    """Returns a motion U-Net with the weights of `unet` and additional motion modules."""
    from diffusers import MotionAdapter, UNetMotionModel

    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )
    grown: Any = UNetMotionModel.from_unet2d(unet, adapter)
    return grown.eval()


def ask_motion(backbone: Any, frames: int, batch: int = 2) -> Tensor:
    """Returns the prediction of a backbone's motion U-Net for clips of noise, as a tensor `[B, C, F, h, w]`."""
    x = torch.randn(batch, 4, frames, 8, 8, generator=torch.Generator().manual_seed(0))
    context = backbone.encode(["a mug"] * batch).context.repeat_interleave(frames, dim=0)
    with torch.no_grad():
        return backbone.unet(x, torch.tensor(300), encoder_hidden_states=context).sample
