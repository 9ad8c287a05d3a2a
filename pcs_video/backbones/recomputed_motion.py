"""Gradient checkpointing for motion modules. diffusers sets it for them, but their forward pass ignores it, although they
store far more than the image layers do."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def recompute_motion(unet: Any) -> None:
    """Makes the motion modules of a `UNetMotionModel` obey its `enable_gradient_checkpointing`."""
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

    for module in unet.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            for block in module.transformer_blocks:
                block.__class__ = _recomputed_block()


@lru_cache
def _recomputed_block() -> type:
    from diffusers.models.attention import BasicTransformerBlock

    class RecomputedBlock(BasicTransformerBlock):
        """A transformer block whose activations are recomputed in the backward pass while checkpointing is on."""

        gradient_checkpointing = False  # diffusers sets this on all modules that have it
        _gradient_checkpointing_func: Any

        def forward(self, hidden_states: Tensor, *args: Any, **more: Any) -> Tensor:
            run = super().forward
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return self._gradient_checkpointing_func(lambda x: run(x, *args, **more), hidden_states)
            return run(hidden_states, *args, **more)

    return RecomputedBlock
