"""How pictures are made, as one object that travels from a command line to the sampler."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from shared.sampling.hooks import SamplingHook


@dataclass(frozen=True)
class Start:
    """Sampling from something that is there instead of from noise alone (SDEdit, https://arxiv.org/abs/2108.01073).

    latents: clean, [B, C, (f), h, w]. strength: the share of the steps that are taken, in (0, 1]: a little changes little, and
    of 1 hardly anything stays. Raises ValueError for another one.
    """

    latents: Tensor
    strength: float

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(
                f"strength = {self.strength:g}: it is more than 0, where nothing would change, and at most 1"
            )

    def __getitem__(self, rows: slice) -> Start:
        return Start(self.latents[rows], self.strength)


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
    start: Start | None = None  # None: noise

    def stated(self) -> dict[str, Any]:
        """What differs from the defaults, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
