"""Defines what a world knows about the thing in the references, such as its look-alikes and its true appearance.

Only a world that draws its own pictures, such as the toybox, knows this. This knowledge must not influence what is
learned or which checkpoint is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from shared.metrics.freedom import Range


@dataclass(frozen=True)
class Asked:
    """One prompt, in the form needed to draw a true picture for it."""

    expects: Mapping[str, str]  # attribute -> value
    free: bool  # whether the prompt asks for a photo and fixes neither the thing's view nor its position in the picture


class TrueThing(Protocol):
    """A thing that can be drawn exactly as it is, any number of times."""

    key: str  # identifies the thing and the drawing code; equal keys give equal pictures

    def pictures(self, asked: Sequence[Mapping[str, str]], seed: int, pose: int | None = None) -> Tensor:
        """Draws one picture for each item in `asked`. Returns `[N, 3, H, W]` in [-1, 1].

        pose: the seed of the pose and position that all pictures share. If None, each picture has its own
        """
        ...


@dataclass(frozen=True)
class Known:
    """What a world knows in addition to the references."""

    gallery: Mapping[str, Tensor]  # look-alikes: name -> [n, 3, H, W] in [-1, 1]
    fresh: Tensor  # [F, 3, H, W]: new pictures of the thing, not among the references
    true: TrueThing


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bar(_Kept):
    """The verification bar for one style of picture."""

    least: float  # likeness to the references that 95% of the true pictures reach
    # T, the share of other true pictures that pass all three conditions; for a face, only those that show it count
    passed: float
    pictures: int  # number of pictures on which each of these two figures was measured
    faceless: int = 0  # number of these pictures that were not judged, because they show no face


class TrueFigures(_Kept):
    """Figures measured on true pictures of a thing."""

    bars: Mapping[str, Bar]  # style that a prompt names ("" for a photo) -> bar
    # correlation at which a thing counts as pasted from a reference; few true pictures reach it
    pasted: float | None = None
    free: float | None = None  # R in `shared.metrics.freedom`
    fixed: float | None = None  # F in `shared.metrics.freedom`
    place: float | None = None  # spread of the true thing's position within a prompt, in units of half the picture
    size: float | None = None
    views: float | None = None  # effective number of views

    @property
    def range(self) -> Range | None:
        return None if self.free is None or self.fixed is None else Range(self.free, self.fixed)

    def bar(self, expects: Mapping[str, str]) -> Bar | None:
        """Returns the bar for a picture that must show `expects`, or None if its style has no bar."""
        return self.bars.get(style_of(expects))


def style_of(expects: Mapping[str, str]) -> str:
    """Returns the style that a prompt asks for, or "" if it names none."""
    return expects.get("style", "")
