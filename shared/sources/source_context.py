"""What a source is given besides its own settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from shared.io.denoising_progress import Steps
from shared.types import Subject


class Generate(Protocol):
    """Pictures or clips of the model itself, without any concept; one seed per prompt."""

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        guidance: float,
        steps: int,
        resolution: int,
        frames: int = 0,
        progress: Steps | None = None,
    ) -> Tensor:
        """[N, 3, resolution, resolution] in [-1, 1], or clips [N, 3, frames, resolution, resolution] where `frames` says
        how long; `progress` is told of every denoising step."""
        ...


@dataclass(frozen=True)
class SourceContext:
    """The run that examples are for."""

    subjects: Mapping[str, Subject]
    resolution: int  # side of the pictures, in pixels
    seed: int
    cache_dir: Path  # generated pictures are kept here, between runs
    generate: Generate | None = None  # None: this run cannot make pictures
    backbone_key: str = ""  # the weights that `generate` uses: `Backbone.checkpoint`
    phase_folders: Mapping[str, Path] = field(default_factory=dict)  # earlier phases that made pictures -> where
    progress: Callable[[str, int, int], None] | None = None  # told (what, done, of) after each denoising step


def owner_among(subjects: Mapping[str, Subject], name: str, what: str) -> str:
    """The subject called `name`, or the only one there is. ValueError lists them."""
    names = ", ".join(sorted(subjects)) or "none"
    if name and name not in subjects:
        raise ValueError(f"{what}: there is no subject {name!r}. There are: {names}.")
    if not name and len(subjects) != 1:
        raise ValueError(f"{what}: say which subject it belongs to. There are: {names}.")
    return name or next(iter(subjects))
