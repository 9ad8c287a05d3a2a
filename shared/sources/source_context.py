"""Defines what a source needs in addition to its own settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from shared.io.denoising_progress import Steps
from shared.types import Subject


class Generate(Protocol):
    """Generates pictures or clips with the base model, without the concepts that are being trained."""

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
        """Generates N pictures [N, 3, resolution, resolution] in [-1, 1] or, if `frames` is given, N clips
        [N, 3, frames, resolution, resolution]. There must be one seed per prompt. `progress` is called after every
        denoising step."""
        ...


@dataclass(frozen=True)
class SourceContext:
    """The facts about a run that its sources depend on."""

    subjects: Mapping[str, Subject]
    resolution: int  # side length of the pictures, in pixels
    seed: int
    cache_dir: Path  # generated pictures are kept here between runs
    generate: Generate | None = None  # None if this run cannot generate pictures
    backbone_key: str = ""  # `Backbone.checkpoint` of the model that `generate` uses
    phase_folders: Mapping[str, Path] = field(default_factory=dict)  # the folder of each earlier phase's pictures
    progress: Callable[[str, int, int], None] | None = None  # called with (what, done, total) after each denoising step


def owner_among(subjects: Mapping[str, Subject], name: str, what: str) -> str:
    """Returns `name` if a subject has this name, or the name of the only subject if `name` is empty. Otherwise raises
    ValueError, listing the subjects."""
    names = ", ".join(sorted(subjects)) or "none"
    if name and name not in subjects:
        raise ValueError(f"{what}: unknown subject {name!r}. Available: {names}.")
    if not name and len(subjects) != 1:
        raise ValueError(f"{what}: set the subject that it belongs to. Available: {names}.")
    return name or next(iter(subjects))
