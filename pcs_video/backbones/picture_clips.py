"""Generates clips with a picture model alone, frame by frame."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pcs_video.backbones.framewise import FramewiseCodec, by_frame
from shared.backbones.stable_diffusion import StableDiffusionBackbone

NONE = "none"  # given instead of a motion adapter's folder
_MOST_FRAMES = 1024


class PictureClipsBackbone(FramewiseCodec, StableDiffusionBackbone):
    """A diffusers `StableDiffusionPipeline` that also generates clips. The frames of a clip are processed separately.

    The model has no layers for motion, so a subject moves only along a trajectory (`FollowTrajectory`). Concepts for
    the picture model work unchanged. Frames attend to one another only where attention is edited (`SparseCausal`).

    Args:
        pipe: the pipeline; its networks are used in place and frozen
        name: the model's name as the user gave it
    """

    most_frames: int = _MOST_FRAMES

    def __init__(self, pipe: Any, name: str = "") -> None:
        super().__init__(pipe, name)
        self.frames: int | None = 16

    def _run_denoiser(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        run = super()._run_denoiser
        if x_t.ndim == 4:
            return run(x_t, t, context)
        frames = x_t.shape[2]
        times, each = t.repeat_interleave(frames) if t.ndim else t, context.repeat_interleave(frames, dim=0)
        return by_frame(lambda x: run(x, times, each), x_t)
