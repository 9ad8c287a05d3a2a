"""The teacher's protocol: noise predictions for views, under named conditions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from pcs_3d.view_prompts import Views

#: Which adapters are on: none (base), the loaded concepts' (teacher), or the loaded concepts' and the student's (student).
Adapters = Literal["base", "teacher", "student"]
#: The kind of conditioning (`ScenePrompts.rows`, and for Perp-Neg the two directions to avoid).
Told = Literal["prompt", "plain_prompt", "negative", "null", "away_near", "away_far"]


@dataclass(frozen=True)
class Ask:
    """One kind of prediction."""

    told: Told = "prompt"
    adapters: Adapters = "teacher"


class Scores(Protocol):
    """Noise predictions of a diffusion process `z_t = alpha z + sigma eps`, and its space of latents."""

    discrete_time: bool  # trained on integer timesteps

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times [B] in [0, 1000)."""
        ...

    def eps(self, asks: Sequence[Ask], z_t: Tensor, t: Tensor, views: Views) -> list[Tensor]:
        """The noise in z_t [B, C, h, w] at t [B] for each ask, without gradients, in z_t's precision."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> latents [B, C, h, w], differentiable."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, H, W], nominally in [0, 1]."""
        ...

    def prediction_loss(self, ask: Ask, z: Tensor, noise: Tensor, t: Tensor, views: Views) -> Tensor:
        """The plain diffusion loss on clean latents z [B, C, h, w], with gradients: a scalar. Call it, and run its backward
        pass, inside `under`."""
        ...

    def under(self, adapters: Adapters) -> AbstractContextManager[None]:
        """Within the context, these adapters are on."""
        ...


def spread(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1] in the precision and on the device of `like`."""
    return values.to(like.device, like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


def coefficients(scores: Scores, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at t [B], each [B, 1, 1, 1]."""
    alpha, sigma = scores.alpha_sigma(t)
    return spread(alpha, like), spread(sigma, like)
