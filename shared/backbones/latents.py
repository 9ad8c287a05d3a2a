"""Encodes pixels to latents and decodes latents to pixels, applying the autoencoder's scale and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.backbones.placement import Placement


class LatentCodec:
    """The autoencoder part of a backbone. Latents are (z - shift) * scale, as in diffusers' pipelines."""

    family: str
    vae: Any
    placement: Placement | None = None
    latent_multiple: int = 1  # the height and width of the latent grid must be multiples of this
    frame_factor: int = 1  # frames per latent frame, from the second latent frame on

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    @property
    def vae_factor(self) -> int:
        """The number of pixels per latent cell along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def _scale_shift(self) -> tuple[float, float]:
        return self.vae.config.scaling_factor, self.vae.config.get("shift_factor") or 0.0

    def encode_pixels(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encodes pixels [B, 3, H, W] in [-1, 1] to latents [B, C, h, w]. With a generator, samples the latents; without one,
        returns their mean. The result is differentiable."""
        posterior = self._posterior(pixels)
        z = posterior.mode() if generator is None else posterior.sample(generator)
        scale, shift = self._scale_shift
        return ((z - shift) * scale).to(self.dtype)

    def latent_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of the latents, each [B, C, h, w]. `mean + std * noise` is a sample."""
        posterior = self._posterior(pixels)
        scale, shift = self._scale_shift
        return ((posterior.mean - shift) * scale).to(self.dtype), (posterior.std * scale).to(self.dtype)

    def _posterior(self, pixels: Tensor) -> Any:
        self.latent_shape(pixels.shape[-2], pixels.shape[-1])
        self._use_vae()
        return self.vae.encode(pixels.to(self.vae.dtype)).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents [B, C, h, w] to pixels [B, 3, H, W], nominally in [-1, 1]. Values are not clamped, so that gradients
        can pass."""
        self._use_vae()
        scale, shift = self._scale_shift
        return self.vae.decode((latents.to(self.vae.dtype) / scale) + shift, return_dict=False)[0]

    def _use_vae(self) -> None:
        """Moves the autoencoder to the device. Its `encode` and `decode` methods bypass forward hooks, so this method must be
        called before them."""
        if self.placement:
            self.placement.use("vae")

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Returns the latent shape (C, h, w) of a picture. Raises ValueError when `frames` is given, or when a side is not a
        positive multiple of `vae_factor * latent_multiple` pixels."""
        if frames is not None:
            raise ValueError(f"frames = {frames}: {self.family} generates pictures, not clips")
        unit = self.vae_factor * self.latent_multiple
        if height < unit or width < unit or height % unit or width % unit:
            raise ValueError(
                f"a picture of {width}x{height} does not fit {self.family}: both sides must be multiples of {unit}"
            )
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor
