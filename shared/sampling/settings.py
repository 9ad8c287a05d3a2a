"""How pictures are made, as one object that travels from a command line to the sampler."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from shared.sampling.hooks import SamplingHook


@dataclass(frozen=True)
class SamplingSettings:
    """What a sampler is told besides prompts and seeds; None is the backbone's own."""

    negative: str | tuple[str, ...] = ""  # one text, or one for each picture
    guidance: float | None = None  # classifier-free guidance, or the distilled one where the model reads it; 1 is none
    steps: int | None = None  # scheduler steps
    scheduler: str | None = None  # a name of `scheduler_names(backbone)`
    height: int | None = None  # pixels
    width: int | None = None
    frames: int | None = None  # of a clip; 0: a picture, of a model of clips too
    hooks: tuple[SamplingHook, ...] = field(default=())  # what happens between steps, in order

    def stated(self) -> dict[str, Any]:
        """What differs from the defaults, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
