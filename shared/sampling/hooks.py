"""What happens between denoising steps: hooks around one sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from pydantic import field_validator
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.config import Part, validate

if TYPE_CHECKING:
    from shared.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class DenoisingStep:
    """One denoising step, before its prediction."""

    index: int  # 0 … steps - 1
    steps: int  # calls of the scheduler (second-order ones call twice per step)
    t: Tensor  # scalar, in the model's training time
    backbone: Backbone
    prompts: Sequence[str]  # B, expanded; within `during`, what hooks made of them
    seeds: Sequence[int]  # B
    noise: Tensor  # [B, C, (f), h, w], of unit variance: what sampling started from
    scale: Tensor | float = 1.0  # latents times this are what the network sees; not 1 for schedulers of Karras et al.

    @property
    def fraction(self) -> float:
        """How much is done: 0 at the first step, towards 1 at the last."""
        return self.index / self.steps

    @property
    def last(self) -> bool:
        return self.index + 1 == self.steps

    def noised(self, x0: Tensor) -> Tensor:
        """Clean latents [B or 1, C, (f), h, w] as they are at this step, with the noise that sampling started from, in
        the scheduler's units: [B, C, (f), h, w]."""
        return self.backbone.add_noise(x0.expand_as(self.noise), self.noise, self.t) / self.scale


@runtime_checkable
class SamplingHook(Protocol):
    """Something that happens between denoising steps. `SamplingHookBase` does nothing, to build on."""

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> SamplingHook:
        """What acts in one call of the sampler: itself, or what it makes of files, once. ValueError where they do not fit
        what is to be sampled."""
        ...

    def initial_noise(self, backbone: Backbone, noise: Tensor) -> Tensor:
        """What sampling starts from, [B, C, (f), h, w] of unit variance, in place of the noise (inversion)."""
        ...

    def prompts(self, step: DenoisingStep, prompts: Sequence[str]) -> Sequence[str]:
        """The prompts from here on this step (delayed subjects)."""
        ...

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        """The latents [B, C, (f), h, w] before the prediction (layout gradients, what is given)."""
        ...

    def told(self, step: DenoisingStep, t: Tensor) -> Tensor:
        """The times that the network is told: a scalar, or [B, f] where it reads one for each frame."""
        ...

    def during(self, step: DenoisingStep) -> AbstractContextManager[object]:
        """What holds while this step is predicted (strengths, attention)."""
        ...

    def after(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        """The latents [B, C, (f), h, w] that the step leaves."""
        ...


class SamplingHookBase(Part):
    """A change that hooks nothing."""

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> SamplingHook:
        return self

    def initial_noise(self, backbone: Backbone, noise: Tensor) -> Tensor:
        return noise

    def prompts(self, step: DenoisingStep, prompts: Sequence[str]) -> Sequence[str]:
        return prompts

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        return latents

    def told(self, step: DenoisingStep, t: Tensor) -> Tensor:
        return t

    def during(self, step: DenoisingStep) -> AbstractContextManager[object]:
        return nullcontext()

    def after(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        return latents


def check_points(text: str) -> str:
    """A strength by step without a name ("0@0,1@0.2", or nothing) as it is. ValueError when it is none."""
    try:
        StrengthSchedule.parse(f"concept={text or '1@0'}")
    except ValueError:
        raise ValueError(
            f"{text!r} is no strength by step; write STRENGTH@FRACTION,… with fractions of the steps in [0, 1]: 0@0,1@0.2"
        ) from None
    return text


class StrengthSchedule(SamplingHookBase):
    """Adapter strengths by step: `{"my-mug": {0: 0, 0.2: 1}}` leaves the mug out of the first fifth of the steps.

    Adapters that are not named keep the strength they have. As delayed subject conditioning of FastComposer
    (Xiao et al., arXiv 2305.10431, section 4.3) does with text, here for adapters.
    """

    kind: Literal["strength_schedule"] = "strength_schedule"
    strengths: Mapping[str, Mapping[float, float]]  # concept -> {fraction of steps done: strength from there on}
    linear: bool = False  # True: strengths in between are interpolated instead of held

    @field_validator("strengths")
    @classmethod
    def _fractions(cls, value: Mapping[str, Mapping[float, float]]) -> Mapping[str, Mapping[float, float]]:
        for name, points in value.items():
            if not points or any(not 0 <= f <= 1 or not math.isfinite(s) for f, s in points.items()):
                raise ValueError(
                    f"{name}: give strengths at fractions of the steps in [0, 1], such as {{0: 0, 0.2: 1}}"
                )
        return value

    @classmethod
    def parse(cls, text: str) -> StrengthSchedule:
        """`my-mug=0@0,1@0.2`: strength 0 from the first step on, 1 once a fifth of the steps is done.

        ValueError when it is written in another way, or a fraction is outside [0, 1] or said twice.
        """
        name, _, points = text.partition("=")
        try:
            pairs = [point.split("@") for point in points.split(",")]
            schedule = {float(fraction): float(strength) for strength, fraction in pairs}
            if len(schedule) < len(pairs):
                raise ValueError("one fraction twice")
        except ValueError:
            usage = "write NAME=STRENGTH@FRACTION,…: my-mug=0@0,1@0.2"
            raise ValueError(f"{text!r} is no strength by step; {usage}") from None
        return validate(cls, {"strengths": {name: schedule}})

    def times(self, factor: float) -> StrengthSchedule:
        """The same schedule, every strength `factor` times as large."""
        scaled = {n: {f: factor * s for f, s in points.items()} for n, points in self.strengths.items()}
        return self.model_copy(update={"strengths": scaled})

    def at(self, name: str, fraction: float) -> float:
        """The strength of one concept when `fraction` of the steps is done; before the first point, the first's."""
        points = sorted(self.strengths[name].items())
        before = [p for p in points if p[0] <= fraction] or points[:1]
        after = [p for p in points if p[0] > fraction]
        (f0, s0) = before[-1]
        if not self.linear or not after or fraction < f0:
            return s0
        (f1, s1) = after[0]
        return s0 + (s1 - s0) * (fraction - f0) / (f1 - f0)

    def during(self, step: DenoisingStep) -> AbstractContextManager[object]:
        now = {name: self.at(name, step.fraction) for name in self.strengths}
        return step.backbone.active({**step.backbone.strengths, **now})
