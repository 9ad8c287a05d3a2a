"""Encodes and decodes clips with a causal autoencoder, which turns the first frame, and then each group of frames, into
one latent frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.backbones.latents import LatentCodec


class CausalCodec(LatentCodec):
    """The autoencoder part of a backbone whose autoencoder maps r n + 1 frames to n + 1 latent frames.

    Pictures [B, 3, H, W] are handled as clips of one frame, but their latents [B, C, h, w] have no frame axis. The
    autoencoder's own latents z are normalized to (z - mean) / spread per channel. Each family defines the mean and the
    spread. `frame_factor` is r.
    """

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the spread of the autoencoder's own latents, each [C], on the device and in the dtype of
        `like`."""
        raise NotImplementedError

    def encode_pixels(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encodes pixels [B, 3, (F), H, W] in [-1, 1] to latents [B, C, (f), h, w]. With a generator, samples the
        latents; without one, returns their mean. The result is differentiable."""
        posterior = self._posterior(pixels)
        z = posterior.mode() if generator is None else posterior.sample(generator)
        return self._like(pixels, self._normalized(z))

    def latent_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of the latents, each [B, C, (f), h, w]."""
        posterior = self._posterior(pixels)
        spread = _of_channels(self._statistics(posterior.std)[1])
        return self._like(pixels, self._normalized(posterior.mean)), self._like(pixels, posterior.std / spread)

    def _posterior(self, pixels: Tensor) -> Any:
        clips = pixels if pixels.ndim == 5 else pixels[:, :, None]
        self.latent_shape(clips.shape[3], clips.shape[4], clips.shape[2])
        self._use_vae()
        return self.vae.encode(clips.to(self.vae.dtype)).latent_dist

    def _normalized(self, z: Tensor) -> Tensor:
        mean, spread = map(_of_channels, self._statistics(z))
        return (z - mean) / spread

    def _like(self, pixels: Tensor, latents: Tensor) -> Tensor:
        return (latents if pixels.ndim == 5 else latents[:, :, 0]).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents [B, C, (f), h, w] to pixels [B, 3, (F), H, W], nominally in [-1, 1]."""
        self._use_vae()
        clips = latents if latents.ndim == 5 else latents[:, :, None]
        mean, spread = map(_of_channels, self._statistics(clips))
        pixels = self._decode((clips * spread + mean).to(self.vae.dtype))
        return pixels if latents.ndim == 5 else pixels[:, :, 0]

    def _decode(self, z: Tensor) -> Tensor:
        """Decodes the autoencoder's own latents [B, C, f, h, w] to pixels [B, 3, F, H, W]."""
        return self.vae.decode(z, return_dict=False)[0]

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Returns (C, h, w) for a picture and (C, f, h, w) for a clip. Raises ValueError if the height or the width is
        not a multiple of the number that the model requires, or if the frame count is not r n + 1."""
        channels, *grid = super().latent_shape(height, width)
        if frames is None:
            return (channels, *grid)
        return (channels, check_causal_frames(self.family, frames, self.frame_factor), *grid)


def check_causal_frames(family: str, frames: int, factor: int) -> int:
    """Returns the number of latent frames of a clip with this many frames. If `frames` is not `factor` n + 1, raises
    ValueError, naming the nearest valid frame counts."""
    more, rest = divmod(frames - 1, factor)
    if frames < 1 or rest:
        nearest = f"{more * factor + 1} and {(more + 1) * factor + 1}" if frames > 0 else "1"
        raise ValueError(
            f"a clip of {frames} frames does not fit {family}, which generates {factor}n + 1 frames (nearest: {nearest})"
        )
    return more + 1


def _of_channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)
