"""Hooks that the sampler calls between denoising steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from pydantic import field_validator
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.config import MOST_STRENGTH, Part, validate

if TYPE_CHECKING:
    from shared.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class DenoisingStep:
    """The state of a denoising step before its prediction."""

    index: int  # 0 … steps - 1
    steps: int  # the number of scheduler calls (two per step for second-order schedulers)
    t: Tensor  # scalar, in units of the model's training time
    backbone: Backbone
    prompts: Sequence[str]  # B expanded prompts; inside `during`, as changed by hooks
    seeds: Sequence[int]  # B seeds
    noise: Tensor  # the initial noise [B, C, (f), h, w], of unit variance
    scale: Tensor | float = 1.0  # factor applied to latents before the network; 1 except for Karras et al.'s schedulers
    order: int = 1  # scheduler calls per step
    # clean latents [B, C, (f), h, w] predicted by the previous scheduler call; None for the first call
    clean: Tensor | None = None

    @property
    def fraction(self) -> float:
        """The fraction of the steps that have been done. It is 0 at the first step and less than 1 at the last."""
        return self.index / self.steps

    @property
    def last(self) -> bool:
        return self.index + 1 == self.steps

    @property
    def levels(self) -> tuple[float, float]:
        """The coefficients of the clean latents and of the unit noise in this step's latents, in the scheduler's units."""
        alpha, sigma = self.backbone.alpha_sigma(self.t)
        return float(alpha / self.scale), float(sigma / self.scale)

    def noised(self, x0: Tensor) -> Tensor:
        """Adds the initial noise, at this step's level, to clean latents [B or 1, C, (f), h, w]. Returns [B, C, (f), h, w] in
        the scheduler's units."""
        return self.backbone.add_noise(x0.expand_as(self.noise), self.noise, self.t) / self.scale


@runtime_checkable
class SamplingHook(Protocol):
    """A hook that the sampler calls between denoising steps. `SamplingHookBase` implements every method as a no-op."""

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> SamplingHook:
        """Returns the hook for one call of the sampler. This is the hook itself or, if it needs files, a hook that has
        read them. Raises ValueError if the files do not match the sampled size."""
        ...

    def initial_noise(self, backbone: Backbone, noise: Tensor) -> Tensor:
        """Returns the initial noise to use ([B, C, (f), h, w], of unit variance), for example inverted noise."""
        ...

    def prompts(self, step: DenoisingStep, prompts: Sequence[str]) -> Sequence[str]:
        """Returns the prompts to use at this step. A hook can, for example, add a subject at a later step."""
        ...

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        """Returns the latents [B, C, (f), h, w] for the prediction, for example after a gradient step on the layout."""
        ...

    def jumps(self, step: DenoisingStep) -> bool:
        """Returns whether `latents` changes the latents so abruptly that the scheduler must forget past predictions."""
        ...

    def told(self, step: DenoisingStep, t: Tensor) -> Tensor:
        """Returns the time to pass to the network: a scalar, or [B, f] if the network takes one time per frame."""
        ...

    def during(self, step: DenoisingStep) -> AbstractContextManager[object]:
        """Returns a context for this step's prediction, for example one that sets strengths or edits attention."""
        ...

    def after(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        """Returns the latents [B, C, (f), h, w] with which to continue after the step."""
        ...


class SamplingHookBase(Part):
    """The base class of hooks. Its methods change nothing."""

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> SamplingHook:
        return self

    def initial_noise(self, backbone: Backbone, noise: Tensor) -> Tensor:
        return noise

    def prompts(self, step: DenoisingStep, prompts: Sequence[str]) -> Sequence[str]:
        return prompts

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        return latents

    def jumps(self, step: DenoisingStep) -> bool:
        return False

    def told(self, step: DenoisingStep, t: Tensor) -> Tensor:
        return t

    def during(self, step: DenoisingStep) -> AbstractContextManager[object]:
        return nullcontext()

    def after(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        return latents


def check_points(text: str) -> str:
    """Returns `text` if it is a valid strength schedule without a name ("0@0,1@0.2", or ""). Raises ValueError otherwise."""
    try:
        StrengthSchedule.parse(f"concept={text or '1@0'}")
    except ValueError:
        raise ValueError(
            f"{text!r} is not a strength schedule; write STRENGTH@FRACTION,…, such as 0@0,1@0.2, with strengths from "
            f"-{MOST_STRENGTH} to {MOST_STRENGTH}, and fractions of the steps from 0 to 1"
        ) from None
    return text


class StrengthSchedule(SamplingHookBase):
    """Sets adapter strengths by step. `{"my-mug": {0: 0, 0.2: 1}}` leaves the mug out of the first fifth of the steps.

    Other adapters keep their strength. This is the delayed subject conditioning of FastComposer (Xiao et al., arXiv
    2305.10431, section 4.3), applied to adapters instead of text.
    """

    kind: Literal["strength_schedule"] = "strength_schedule"
    strengths: Mapping[str, Mapping[float, float]]  # for each concept, its strength from a fraction of the steps onward
    linear: bool = False  # whether strengths are interpolated linearly between these points rather than kept constant

    @field_validator("strengths")
    @classmethod
    def _fractions(cls, value: Mapping[str, Mapping[float, float]]) -> Mapping[str, Mapping[float, float]]:
        for name, points in value.items():
            if any(not abs(s) <= MOST_STRENGTH for s in points.values()):
                raise ValueError(f"{name}: strengths must be between -{MOST_STRENGTH} and {MOST_STRENGTH}")
            if not points or any(not 0 <= f <= 1 for f in points):
                raise ValueError(
                    f"{name}: map fractions of the steps (from 0 to 1) to strengths, such as {{0: 0, 0.2: 1}}"
                )
        return value

    @classmethod
    def parse(cls, text: str) -> StrengthSchedule:
        """Parses text such as `my-mug=0@0,1@0.2`, which means strength 0 from the first step, and strength 1 after a
        fifth of the steps.

        Raises ValueError if the text has a different format, or if a fraction is outside [0, 1] or repeated.
        """
        name, _, points = text.partition("=")
        try:
            pairs = [point.split("@") for point in points.split(",")]
            schedule = {float(fraction): float(strength) for strength, fraction in pairs}
            if len(schedule) < len(pairs):
                raise ValueError("duplicate fraction")
        except ValueError:
            usage = "write NAME=STRENGTH@FRACTION,…, such as my-mug=0@0,1@0.2"
            raise ValueError(f"{text!r} is not a strength schedule; {usage}") from None
        return validate(cls, {"strengths": {name: schedule}})

    def times(self, factor: float) -> StrengthSchedule:
        """Returns the schedule with every strength multiplied by `factor`."""
        scaled = {n: {f: factor * s for f, s in points.items()} for n, points in self.strengths.items()}
        return self.model_copy(update={"strengths": scaled})

    def at(self, name: str, fraction: float) -> float:
        """Returns a concept's strength once `fraction` of the steps are done. Before the first point, the strength is
        the same as at the first point."""
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
