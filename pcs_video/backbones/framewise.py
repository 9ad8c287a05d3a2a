"""Encodes and decodes clips with an image autoencoder, frame by frame."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from shared.backbones.latents import LatentCodec

FRAMES_AT_ONCE = 2**18  # pixels decoded at a time (one 512x512 frame), which limits the memory for activations


def by_frame(function: Callable[[Tensor], Tensor], clips: Tensor, at_once: int | None = None) -> Tensor:
    """Applies a function of pictures [N, C, H, W] to every frame of clips [B, C, F, H, W]. Pictures are passed to it as
    they are.

    Args:
        at_once: frames per call. If None, all frames are passed in one call
    """
    if clips.ndim == 4:
        return function(clips)
    frames = clips.transpose(1, 2).flatten(0, 1)
    done = torch.cat([function(part) for part in frames.split(at_once or len(frames))])
    return done.unflatten(0, (len(clips), -1)).transpose(1, 2)


class FramewiseCodec(LatentCodec):
    """The part of a backbone that applies an image autoencoder to pictures [B, 3, H, W] and clips [B, 3, F, H, W] alike.

    `most_frames` is the largest frame count that the model supports.
    """

    most_frames: int
    frames_apart: bool = True

    def image_layers(self) -> AbstractContextManager[None]:
        """Returns a context in which clips pass only through the image layers, frame by frame."""
        return nullcontext()

    def encode_pixels(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encodes pixels [B, 3, (F), H, W] in [-1, 1] to latents [B, C, (F), h, w]. With a generator, samples the
        latents; without one, returns their mean. The result is differentiable."""
        encode = super().encode_pixels
        return by_frame(lambda frames: encode(frames, generator), pixels)

    def latent_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of the latents, each [B, C, (F), h, w]."""
        moments = super().latent_moments
        both = by_frame(lambda frames: torch.cat(moments(frames), dim=1), pixels)
        mean, std = both.chunk(2, dim=1)
        return mean.contiguous(), std.contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents [B, C, (F), h, w] to pixels [B, 3, (F), H, W], nominally in [-1, 1] and not clamped."""
        pixels = latents.shape[-2] * latents.shape[-1] * self.vae_factor**2
        return by_frame(super().decode, latents, max(1, FRAMES_AT_ONCE // pixels))

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Returns (C, h, w) for a picture and (C, F, h, w) for a clip. Raises ValueError if the height or the width is
        not a multiple of the number that the model requires, or if there are fewer than 2 frames or more than the model
        supports."""
        channels, *grid = super().latent_shape(height, width)
        if frames is None:
            return (channels, *grid)
        check_framewise_frames(self.family, frames, self.most_frames)
        return (channels, frames, *grid)


def check_framewise_frames(family: str, frames: int, most: int) -> None:
    """Raises ValueError, naming the nearest valid frame count, if `frames` is less than 2 or more than `most`."""
    if not 2 <= frames <= most:
        nearest = min(max(frames, 2), most)
        raise ValueError(
            f"a clip of {frames} frame{'s' if frames != 1 else ''} does not fit this {family} model, which generates 2 to "
            f"{most} frames; the nearest is {nearest}"
        )


def shares(clip: Any, picture: Any, names: tuple[str, ...]) -> None:
    """Makes `picture` use the named submodules of `clip` instead of its own, without copying them. Names that `picture`
    does not have are skipped."""
    for name in names:
        if getattr(picture, name, None) is not None:
            setattr(picture, name, getattr(clip, name))
