"""Adds noise to the latents of views. The noise is random, fixed, or taken from the model's own trajectory.

Each noiser returns a `Noised`, which contains the noised latents and times at which the teacher is evaluated, and the
noise with which the guided prediction is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from pcs_3d.guidance.scores import Ask, Scores, Told, coefficients, spread
from pcs_3d.guidance.times import Times, whole
from pcs_3d.schedules import Moment, Schedule
from pcs_3d.view_prompts import Views
from shared.config import GuidanceScale, NotNegative, Part, Seed, default_kind

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Noised:
    """Noised latents.

    z_t: [B, C, h, w].
    t: the time of each view, [B].
    target: the noise that the guided prediction is compared with, [B, C, h, w].
    start: an earlier point (z_s, s) on the trajectory, or None if the noiser has no earlier point.
    """

    z_t: Tensor
    t: Tensor
    target: Tensor
    start: tuple[Tensor, Tensor] | None = None

    def at(self, point: Literal["t", "s"]) -> tuple[Tensor, Tensor]:
        """Returns the latents and the time at which a term is evaluated. Raises ValueError if there is no earlier
        point."""
        if point == "t":
            return self.z_t, self.t
        if self.start is None:
            raise ValueError(
                "guidance.terms: at=s needs the earlier point of noiser.kind=interval, which this noiser does not have"
            )
        return self.start


def noised(scores: Scores, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Returns alpha z + sigma noise."""
    alpha, sigma = coefficients(scores, t, z)
    return alpha * z + sigma * noise


def ddim_step(scores: Scores, z_t: Tensor, eps: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """Takes one deterministic step from t to `to`, in either direction (DDIM, https://arxiv.org/abs/2010.02502, eq.
    12)."""
    alpha, sigma = coefficients(scores, t, z_t)
    return noised(scores, (z_t - sigma * eps) / alpha, eps, to)


def _gaussian(like: Tensor, generator: Generator, offset: float = 0.0) -> Tensor:
    """Draws noise, with a random offset for each view and channel if `offset` is not 0. The noise is drawn on the CPU,
    so that it is the same on all devices."""
    noise = torch.randn(like.shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn(*like.shape[:2], 1, 1, generator=generator)
    return noise.to(like.device, like.dtype)


class RandomNoise(Part):
    """Fresh noise eps at every step, so that z_t = alpha z + sigma eps (DreamFusion, https://arxiv.org/abs/2209.14988).
    The noise is also the target."""

    kind: Literal["random"] = "random"
    offset: NotNegative = 0.0  # size of the noise offset, a random shift of each view and channel

    def __call__(
        self, z: Tensor, times: Times, scores: Scores, views: Views, moment: Moment, generator: Generator
    ) -> Noised:
        t = times.draw(len(z), moment, generator, scores.discrete_time).to(z.device)
        noise = _gaussian(z, generator, self.offset)
        return Noised(noised(scores, z, noise, t), t, noise)


class FixedNoise(Part):
    """The same noise at every step, with a separate sample for each view of the batch."""

    kind: Literal["fixed"] = "fixed"
    seed: Seed = 0

    def __call__(
        self, z: Tensor, times: Times, scores: Scores, views: Views, moment: Moment, generator: Generator
    ) -> Noised:
        t = times.draw(len(z), moment, generator, scores.discrete_time).to(z.device)
        noise = _gaussian(z, torch.Generator().manual_seed(self.seed))
        return Noised(noised(scores, z, noise, t), t, noise)


class Interval(Part):
    """Interval score matching (LucidDreamer, https://arxiv.org/abs/2311.11284, eqs. 14 to 17). A little noise is added
    to z. From there, the model's DDIM inversion, which is unconditional by default, goes to s = t - delta and, in one
    more step, to t. The target is the prediction at (z_s, s). The same prediction is used for the last step."""

    kind: Literal["interval"] = "interval"
    delta: Schedule = 0.08  # t - s, as a share of the range of t
    stride: Annotated[float, Field(gt=0, le=1)] = 0.2  # largest inversion step before s, as a share of the range of t
    steps: Annotated[int, Field(ge=0, le=1000)] = 5  # number of inversion steps before s
    offset: NotNegative = 0.0  # size of the noise offset, a random shift of each view and channel
    told: Told = "null"  # the conditioning of the inversion; "null" is the empty prompt

    def __call__(
        self, z: Tensor, times: Times, scores: Scores, views: Views, moment: Moment, generator: Generator
    ) -> Noised:
        t = times.draw(len(z), moment, generator, scores.discrete_time).to(z.device)
        s = (t - 1000 * moment.of(self.delta)).clamp_min(0.0)
        begin = (s - 1000 * self.stride * self.steps).clamp_min(0.0)
        places = [
            whole(begin + (s - begin) * (i / max(1, self.steps)), scores.discrete_time) for i in range(self.steps)
        ]
        places = [*places, whole(s, scores.discrete_time), t]
        z_s = noised(scores, z, _gaussian(z, generator, self.offset), places[0])
        for now, then in pairwise(places[:-1]):
            z_s = ddim_step(scores, z_s, self._eps(scores, z_s, now, views), now, then)
        target = self._eps(scores, z_s, places[-2], views)
        return Noised(ddim_step(scores, z_s, target, places[-2], t), t, target, (z_s, places[-2]))

    def _eps(self, scores: Scores, z_t: Tensor, t: Tensor, views: Views) -> Tensor:
        return scores.eps([Ask(self.told)], z_t, t, views)[0]


class Inversion(Part):
    """Score distillation via inversion (https://arxiv.org/abs/2405.15891, section 4). The conditional DDIM inversion
    goes from z to z_t in `steps` equal steps. The target is the noise that the result implies, (z_t - alpha z) / sigma.
    With weight sigma / alpha, the gradient is z - x0(z_t).

    `scale` is the guidance scale in this package's convention. The paper's scale is -7.5, because the paper writes
    eps_c + s (eps_c - eps_u).
    """

    kind: Literal["inversion"] = "inversion"
    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    scale: GuidanceScale = -6.5
    jitter: Share = 1.0  # largest random increase in t, as a fraction of one step
    eta: NotNegative = 0.3  # amount of fresh noise, relative to the noise of one ancestral step

    def __call__(
        self, z: Tensor, times: Times, scores: Scores, views: Views, moment: Moment, generator: Generator
    ) -> Noised:
        drawn = times.draw(len(z), moment, generator, False).to(z.device)
        later = self.jitter * torch.rand(1, generator=generator).to(z.device)
        last = (drawn * (1 + later / self.steps)).clamp_max(999.0)
        places = [whole(last * (i / self.steps), scores.discrete_time) for i in range(self.steps + 1)]
        z_t, previous = z.detach(), places[0]
        for now, then in pairwise(places):
            z_t, previous = ddim_step(scores, z_t, self._eps(scores, z_t, now, views), now, then), now
        t = places[-1]
        alpha, sigma = coefficients(scores, t, z)
        if self.eta:
            z_t = z_t + self.eta * _ancestral(scores, previous, t, z) * _gaussian(z, generator)
        return Noised(z_t, t, (z_t - alpha * z.detach()) / sigma)

    def _eps(self, scores: Scores, z_t: Tensor, t: Tensor, views: Views) -> Tensor:
        if self.scale == 1:
            return scores.eps([Ask("prompt")], z_t, t, views)[0]
        with_prompt, without = scores.eps([Ask("prompt"), Ask("negative")], z_t, t, views)
        return without + self.scale * (with_prompt - without)


def _ancestral(scores: Scores, before: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Returns the standard deviation of the noise that one ancestral step from t to `before` adds (DDPM's posterior;
    DDIM, eq. 16)."""
    alpha, sigma = (v.double() for v in scores.alpha_sigma(t))
    alpha_0, sigma_0 = (v.double() for v in scores.alpha_sigma(before))
    variance = (sigma_0 / sigma) ** 2 * (1 - (alpha / alpha_0) ** 2)
    return spread(variance.clamp_min(0).sqrt(), like)


Noiser = Annotated[RandomNoise | FixedNoise | Interval | Inversion, Field(discriminator="kind"), default_kind("random")]
