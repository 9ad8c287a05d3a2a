"""Sampling settings, which are passed as one object from the command line to the sampler."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from torch import Tensor

from shared.sampling.hooks import SamplingHook


@dataclass(frozen=True)
class Start:
    """Starts sampling from existing latents instead of pure noise (SDEdit, https://arxiv.org/abs/2108.01073).

    Args:
        latents: clean latents [B, C, (f), h, w]
        strength: the fraction of the sampling steps to take, in (0, 1]. Small values change the latents only slightly,
            whereas 1 preserves almost nothing of them

    Raises:
        ValueError: if the strength is not in (0, 1]
    """

    latents: Tensor
    strength: float

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength = {self.strength:g} must be above 0 and at most 1; 0 would change nothing")

    def __getitem__(self, rows: slice) -> Start:
        return Start(self.latents[rows], self.strength)


class HowSampled(Protocol):
    """The sampling settings in a recipe, or in a concept's record of its recipe. None means the backbone's default."""

    @property
    def steps(self) -> int | None: ...
    @property
    def guidance(self) -> float | None: ...
    @property
    def scheduler(self) -> str | None: ...


@dataclass(frozen=True)
class SamplingSettings:
    """All settings of the sampler except prompts and seeds. None means the backbone's default, unless noted
    otherwise."""

    negative: str | tuple[str, ...] = ""  # one text, or one per picture
    # scale of classifier-free guidance (1 means none), or of the model's distilled guidance
    guidance: float | None = None
    steps: int | None = None  # scheduler steps
    scheduler: str | None = None  # one of `scheduler_names(backbone)`
    height: int | None = None  # pixels
    width: int | None = None
    frames: int | None = None  # frame count of a clip; 0 for a picture, even from a clip model
    hooks: tuple[SamplingHook, ...] = field(default=())  # applied between steps, in order
    start: Start | None = None  # where sampling starts; None means pure noise

    def completed(self, by: HowSampled) -> SamplingSettings:
        """Returns a copy whose guidance, steps and scheduler are taken from `by` wherever they are None."""
        own = {key: getattr(self, key) for key in ("guidance", "steps", "scheduler")}
        return replace(self, **{key: getattr(by, key) if value is None else value for key, value in own.items()})

    def stated(self) -> dict[str, Any]:
        """Returns the settings that differ from their defaults, keyed by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
