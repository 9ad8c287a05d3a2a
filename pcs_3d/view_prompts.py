"""Builds the teacher's prompt for each view: the scene's prompt with words for the visible side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from pcs_3d.cameras import Cameras, wrapped_deg
from shared.config import Part
from shared.prompts import names_in, without

Direction = Literal["front", "side", "back", "overhead"]
DIRECTIONS: tuple[Direction, ...] = ("front", "side", "back", "overhead")
Share = Annotated[float, Field(ge=0, le=1)]


class ViewWords(Part):
    """The words for each direction, and the angles that determine a camera's direction (DreamFusion, section 3.2).

    `place` determines where the words go. With `noun`, they directly follow the first `<name>` in the prompt, so that
    they refer to the object. If the prompt has no name, they go at the end. With `end`, they always go at the end. If
    the prompt contains `{view}`, the words replace it, whatever `place` is.
    """

    front: str = "front view"  # words for this direction
    side: str = "side view"  # words for this direction
    back: str = "back view"  # words for this direction
    overhead: str = "overhead view"  # words for this direction
    place: Literal["noun", "end"] = "noun"
    front_deg: Annotated[float, Field(gt=0, lt=180)] = 45.0  # front views are within this angle of azimuth 0
    back_deg: Annotated[float, Field(gt=0, lt=180)] = 45.0  # back views are within this angle of azimuth 180
    overhead_deg: Annotated[float, Field(gt=0, le=90)] = 60.0  # overhead views are at this elevation or above
    blend_deg: Annotated[float, Field(ge=0, le=45)] = 0.0  # within this angle of a border, embeddings are mixed
    # share of back views whose prompt names only the class; useful because few pictures show the back
    drop_subject: Share = 0.0

    def directions(self, cameras: Cameras) -> list[Direction]:
        """Returns the direction of each camera."""
        around = wrapped_deg(cameras.azimuth_deg).abs().tolist()
        above = cameras.elevation_deg.tolist()
        return [self._direction(a, e) for a, e in zip(around, above, strict=True)]

    def _direction(self, around: float, above: float) -> Direction:
        if above >= self.overhead_deg:
            return "overhead"
        if around <= self.front_deg:
            return "front"
        return "back" if around >= 180 - self.back_deg else "side"

    def shares(self, cameras: Cameras) -> list[dict[Direction, float]]:
        """Returns the share of each direction for each camera. The shares of a camera sum to 1, and shares of 0 are
        left out.

        The shares are the weights in DreamFusion's combination of text embeddings (section 3.2). Within `blend_deg` of
        a border, the shares change linearly. Elsewhere, one direction has a share of 1.
        """
        around = wrapped_deg(cameras.azimuth_deg).abs().tolist()
        above = cameras.elevation_deg.tolist()
        return [self._shares(a, e) for a, e in zip(around, above, strict=True)]

    def _shares(self, around: float, above: float) -> dict[Direction, float]:
        overhead = self._past(above, self.overhead_deg)
        front = self._past(self.front_deg, around)
        back = (1 - front) * self._past(around, 180 - self.back_deg)
        level = 1 - overhead
        found: dict[Direction, float] = {
            "front": level * front,
            "side": level * (1 - front - back),
            "back": level * back,
            "overhead": overhead,
        }
        return {d: share for d, share in found.items() if share > 1e-6}

    def _past(self, angle: float, border: float) -> float:
        """Returns 0 for an angle before a border and 1 for an angle beyond it. Within `blend_deg` of the border, the
        value changes linearly."""
        if self.blend_deg == 0:
            return float(angle >= border)
        return min(max((angle - border) / (2 * self.blend_deg) + 0.5, 0.0), 1.0)

    def said(self, prompt: str, direction: Direction | None) -> str:
        """Returns the prompt with words for a direction, or without them if the direction is None."""
        words = getattr(self, direction) if direction else ""
        if "{view}" in prompt:
            return _tidy(prompt.replace("{view}", words))
        if not words:
            return prompt
        named = names_in(prompt)
        if self.place == "noun" and named:
            name = f"<{named[0]}>"
            before, after = prompt.split(name, 1)
            return _tidy(f"{before}{name}, {words}{',' if after.strip() else ''}{after}")
        return f"{prompt}, {words}"


@dataclass(frozen=True)
class Views:
    """The B views of one step.

    nameless: whether the prompt for each view leaves out the subject's name.
    blind: whether the cameras are hidden from the model.
    regions: maps each region's name to the share of each cell that the region covers, [B, 1, h, w] in [0, 1].
    """

    cameras: Cameras
    nameless: tuple[bool, ...]
    blind: bool = False
    regions: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cameras)


#: The texts for one view, each preceded by its weight. The embeddings of the texts are mixed with these weights.
Mix = tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class ScenePrompts:
    """All prompts for one asset. Texts refer to concepts as `<name>`.

    class_nouns: the class of each concept, for views whose prompt leaves out the name.
    by_direction: the prompts for those directions whose prompt differs from `prompt` in more than the view words.
    """

    prompt: str
    negative: str = ""
    words: ViewWords = field(default_factory=ViewWords)
    class_nouns: Mapping[str, str] | None = None
    by_direction: Mapping[Direction, str] = field(default_factory=dict)

    def views(self, cameras: Cameras, generator: Generator) -> Views:
        """Returns the views of a step. For each back view, draws whether its prompt leaves out the subject's name."""
        coins = torch.rand(len(cameras), generator=generator).tolist()
        behind = [d == "back" for d in self.words.directions(cameras)]
        return Views(cameras, tuple(b and c < self.words.drop_subject for b, c in zip(behind, coins, strict=True)))

    def text(self, direction: Direction | None, nameless: bool = False) -> str:
        """Returns the prompt for one direction."""
        prompt = self.by_direction.get(direction, self.prompt) if direction else self.prompt
        said = self.words.said(prompt, direction)
        return without(said, self.class_nouns or {}) if nameless else said

    def all_texts(self) -> list[str]:
        """Returns the texts for each direction and for no direction, the negative prompt and the empty prompt, without
        duplicates. All of them keep the subject's name."""
        texts = [self.text(d) for d in (None, *DIRECTIONS)] + [self.negative, ""]
        return list(dict.fromkeys(texts))

    def rows(self, kind: str, views: Views) -> list[Mix]:
        """Returns the weighted texts of each view. The kind of conditioning is "prompt", "plain_prompt" (the prompt
        without words for the view), "negative" or "null"."""
        if kind == "prompt":
            shares = self.words.shares(views.cameras)
            return [
                tuple((share, self.text(d, nameless)) for d, share in of.items())
                for of, nameless in zip(shares, views.nameless, strict=True)
            ]
        texts = {"plain_prompt": self.text(None), "negative": self.negative, "null": ""}
        return [((1.0, texts[kind]),)] * len(views)


def _tidy(text: str) -> str:
    return re.sub(r"\s+,", ",", re.sub(r"\s+", " ", text)).strip(" ,")
