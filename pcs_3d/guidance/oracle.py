"""A teacher that knows a scene exactly. For each camera, it returns the exact score of a Gaussian around the true view.
The gradient of each guidance method is therefore known exactly, and an asset can be compared with the scene."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.guidance.noisers import noised
from pcs_3d.guidance.scores import Adapters, Ask, Told, coefficients
from pcs_3d.view_prompts import Views

#: Takes the cameras of B views. Returns the mean latents of the scene's views, [B, C, h, w].
Means = Callable[[Cameras], Tensor]


class OracleScores:
    """The `Scores` of a model that has perfectly learned p(z | camera) = N(mean, spread²). The posterior mean of the
    noise is sigma (z_t - alpha mean) / (alpha² spread² + sigma²). Latents are pixels in [-1, 1].

    Args:
        scene: the mean and the spread for each kind of conditioning; missing kinds are treated as "prompt"
        student: the means that the student has learned. The student's spread is that of "prompt". The student's
            parameters belong to the caller.
    """

    discrete_time = True

    def __init__(self, scene: Mapping[Told, tuple[Means, float]], student: Means | None = None) -> None:
        if "prompt" not in scene:
            raise ValueError('scene needs an entry for "prompt"')
        self.scene, self.student = dict(scene), student
        steps = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - steps**2, 0)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma of Stable Diffusion's schedule, in float64."""
        bar = self.alphas_cumprod[t.long().cpu()].to(t.device)
        return bar.sqrt(), (1 - bar).sqrt()

    def eps(self, asks: Sequence[Ask], z_t: Tensor, t: Tensor, views: Views) -> list[Tensor]:
        with torch.no_grad():
            return [self._eps(ask, z_t, t, views) for ask in asks]

    def _eps(self, ask: Ask, z_t: Tensor, t: Tensor, views: Views) -> Tensor:
        means, width = self.scene.get(ask.told, self.scene["prompt"])
        if ask.adapters == "student":
            if self.student is None:
                raise ValueError("this oracle has no student")
            means, width = self.student, self.scene["prompt"][1]
        alpha, sigma = coefficients(self, t, z_t)
        return sigma * (z_t - alpha * means(views.cameras).to(z_t)) / (alpha**2 * width**2 + sigma**2)

    def encode(self, pixels: Tensor) -> Tensor:
        return 2 * pixels - 1

    def decode(self, latents: Tensor) -> Tensor:
        return (latents + 1) / 2

    def prediction_loss(self, ask: Ask, z: Tensor, noise: Tensor, t: Tensor, views: Views) -> Tensor:
        return (self._eps(ask, noised(self, z, noise, t), t, views) - noise).square().mean()

    @contextmanager
    def under(self, adapters: Adapters) -> Iterator[None]:
        yield
