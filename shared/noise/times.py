"""Distributions of the training time t in [0, 1000), and of the noise."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shared.config import NotNegative, Part, Positive, Real

Fraction = Annotated[float, Field(ge=0, le=1)]


class _Times(Part):
    low: Fraction = 0.0  # lowest time, as a fraction of the whole time range
    high: Fraction = 1.0  # highest time, as a fraction of the whole time range
    clean_first_frame: Fraction = 0.0  # probability that the first latent frame of a clip has no noise
    offset: NotNegative = 0.0  # noise offset: standard deviation of a random shift per picture and channel

    @model_validator(mode="after")
    def _ordered(self) -> _Times:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self

    def _fractions(self, count: int, generator: torch.Generator) -> Tensor:
        raise AssertionError("a distribution of times must define how to draw them")

    def draw_times(self, count: int, generator: torch.Generator, discrete: bool) -> Tensor:
        """Draws `count` times in [0, 1000). With `discrete` (for models trained on integer timesteps), they are
        whole numbers."""
        t = 1000 * (self.low + (self.high - self.low) * self._fractions(count, generator))
        return t.floor().clamp(0, 999) if discrete else t.clamp(1e-3, 999.999)

    def of_frames(self, t: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the times of `latents`. These are just `t` ([B]), except for clips if `clean_first_frame` is above 0.

        Such clips get one time per frame ([B, f]). With probability `clean_first_frame`, the first frame of a clip
        has no noise (t = 0), as in LTX-Video's training (https://arxiv.org/abs/2501.00103)."""
        if latents.ndim != 5 or not self.clean_first_frame:
            return t
        given = (torch.rand(len(t), generator=generator) < self.clean_first_frame).to(t.device)
        each = t[:, None].repeat(1, latents.shape[2])
        each[:, 0] = torch.where(given, torch.zeros_like(t), t)
        return each

    def draw_noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draws Gaussian noise with the shape of `like`, [B, C, (f), h, w]. The noise is drawn on the CPU, so that it
        does not depend on the device."""
        noise = torch.randn(like.shape, generator=generator)
        if self.offset:
            noise = noise + self.offset * torch.randn(*like.shape[:2], *([1] * (like.ndim - 2)), generator=generator)
        return noise.to(like.device, like.dtype)


class Uniform(_Times):
    """Draws times uniformly (DDPM, https://arxiv.org/abs/2006.11239)."""

    kind: Literal["uniform"] = "uniform"

    def _fractions(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, generator=generator)


class LogitNormal(_Times):
    """Draws t from sigmoid(N(mean, std)) and shifts it to t' = s t / (1 + (s - 1) t), where s is `shift` (SD 3,
    https://arxiv.org/abs/2403.03206, eqs. 19 and 23)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: Real = 0.0  # mean of the normal distribution
    std: Positive = 1.0  # standard deviation of the normal distribution
    shift: Positive = 1.0  # s in the equation; values above 1 give more noise

    def _fractions(self, count: int, generator: torch.Generator) -> Tensor:
        u = torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator))
        assert math.isfinite(self.shift)
        return self.shift * u / (1 + (self.shift - 1) * u)
