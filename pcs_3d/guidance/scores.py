"""The protocol of the teacher, which predicts the noise in views for several kinds of conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from pcs_3d.view_prompts import Views

#: The adapters that are on: none (base), those of all concepts (teacher), those of all concepts and the student (student),
#: or those of the named concepts and adapter sets.
Adapters = Literal["base", "teacher", "student"] | tuple[str, ...]
#: The kind of conditioning. The last two are Perp-Neg's negatives (see `PerpNeg.rows`). For the others, see
#: `ScenePrompts.rows`.
Told = Literal["prompt", "plain_prompt", "negative", "null", "away_near", "away_far"]


@dataclass(frozen=True)
class Ask:
    """One kind of prediction, given by its conditioning and its adapters."""

    told: Told = "prompt"
    adapters: Adapters = "teacher"


class Scores(Protocol):
    """The noise predictions of a diffusion model with `z_t = alpha z + sigma eps`, and the encoder and decoder of its
    latents."""

    discrete_time: bool  # whether the model was trained on integer timesteps

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma at times `t` (`[B]`, in [0, 1000)), each `[B]`."""
        ...

    def eps(self, asks: Sequence[Ask], z_t: Tensor, t: Tensor, views: Views) -> list[Tensor]:
        """Predicts the noise in `z_t` (`[B, C, h, w]`) at times `t` (`[B]`) for each ask, without gradients and in the
        precision of `z_t`."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Encodes pixels (`[B, 3, H, W]` in [0, 1]) as latents (`[B, C, h, w]`), differentiably."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (`[B, C, h, w]`) to pixels (`[B, 3, H, W]`), nominally in [0, 1]."""
        ...

    def prediction_loss(self, ask: Ask, z: Tensor, noise: Tensor, t: Tensor, views: Views) -> Tensor:
        """Returns the plain diffusion loss, a scalar with gradients, on clean latents `z` (`[B, C, h, w]`). Call this
        method and run the backward pass inside `under`."""
        ...

    def under(self, adapters: Adapters) -> AbstractContextManager[None]:
        """Switches on exactly these adapters within the context."""
        ...


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes values from `[B]` to `[B, 1, 1, 1]`, in the precision and on the device of `like`."""
    return values.to(like.device, like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


def coefficients(scores: Scores, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns alpha and sigma at times `t` (`[B]`), each `[B, 1, 1, 1]`."""
    alpha, sigma = scores.alpha_sigma(t)
    return spread(alpha, like), spread(sigma, like)
