"""Defines subjects, faces and styles for personalization. They are held out from training and divided into two splits.

Use the "development" split while you work on a method, and the "reporting" split for final numbers. Every subject comes
with distractors, which are other things of the same class and palette that differ from it only in pattern or identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from shared.config import unknown
from shared.toybox.patterns import accents, pattern
from shared.toybox.world import BACKGROUNDS, CLASSES, COLORS, SEEDS, Camera, Scene, Thing, identity_of, sample_scene

DISTRACTORS = 8
_STYLES = {
    "development": ("blueprint", "halftone", "stained glass", "thermal"),
    "reporting": ("duotone", "mosaic", "woodcut", "crosshatch"),
}
# The colours of the faces' hair and shirts.
_PALETTES = (("black", "red"), ("yellow", "blue"), ("red", "green"), ("white", "purple"))


@dataclass(frozen=True)
class HeldOut:
    """A held-out subject, and the distractors for which it must not be mistaken."""

    name: str
    thing: Thing
    distractors: tuple[Thing, ...]


def _check(split: str) -> None:
    if split not in _STYLES:
        raise ValueError(f"no held-out split {split!r}; choose from {', '.join(_STYLES)}")


def styles(split: str) -> tuple[str, ...]:
    """Returns the drawing styles that only this split uses."""
    _check(split)
    return _STYLES[split]


def _differ(a: Thing, b: Thing) -> bool:
    """Returns whether two patterned things of the same class and palette can clearly be distinguished."""
    assert a.pattern_seed is not None and b.pattern_seed is not None
    first, second = pattern(a.pattern_seed), pattern(b.pattern_seed)
    gap = float(np.abs(np.subtract(accents(a)[0], accents(b)[0])).sum())
    return gap > (0.35 if first.kind != second.kind else 0.8)


def _faces_differ(a: Thing, b: Thing) -> bool:
    return float(np.linalg.norm(np.subtract(a.identity, b.identity))) > 2.0  # type: ignore[arg-type]


def _gather(thing: Thing, candidates: list[Thing], differ: Callable[[Thing, Thing], bool]) -> tuple[Thing, ...]:
    """Returns the first DISTRACTORS candidates that differ from the thing and from each other."""
    chosen: list[Thing] = []
    for other in candidates:
        if all(differ(other, known) for known in (thing, *chosen)):
            chosen.append(other)
        if len(chosen) == DISTRACTORS:
            return tuple(chosen)
    raise AssertionError(f"too few distractors for {thing}")


@lru_cache(maxsize=2)
def subjects(split: str) -> tuple[HeldOut, ...]:
    """Returns the 12 subjects of a split, one of each class except the face."""
    _check(split)
    rng = np.random.default_rng([SEEDS[split].start, 1])
    held_out = []
    for index, name in enumerate(c for c in CLASSES if c != "face"):
        main = COLORS[(index * 3 + int(rng.integers(2))) % len(COLORS)]
        second = [c for c in COLORS if c != main][int(rng.integers(len(COLORS) - 1))]
        first = SEEDS[split].start + 500 * index
        things = [Thing(name, main, second, seed) for seed in range(first, first + 500)]
        held_out.append(HeldOut(f"{split}-{name}", things[0], _gather(things[0], things[1:], _differ)))
    return tuple(held_out)


@lru_cache(maxsize=2)
def faces(split: str) -> tuple[HeldOut, ...]:
    """Returns the held-out faces of a split. Their distractors have the same hair and shirt colours."""
    _check(split)
    held_out = []
    for index, (hair, shirt) in enumerate(_PALETTES):
        first = SEEDS[split].start + 8000 + 500 * index
        things = [Thing("face", hair, shirt, identity=identity_of(seed)) for seed in range(first, first + 500)]
        held_out.append(HeldOut(f"{split}-face-{index}", things[0], _gather(things[0], things[1:], _faces_differ)))
    return tuple(held_out)


def reference_scenes(thing: Thing, n: int, seed: int, split: str = "development") -> list[Scene]:
    """Returns scenes for n photos of a thing, like those that a user would take. The thing is near the middle of each
    picture. It is seen from several sides and in several places.

    The views cycle through front, left, back, right, above and front right. Backgrounds repeat only after all of them
    have been used.
    """
    rng = np.random.default_rng([seed, SEEDS[split].start, 9])
    order = [BACKGROUNDS[i] for i in rng.permutation(len(BACKGROUNDS))]
    turn = float(rng.uniform(-15, 15))
    scenes = []
    for i in range(n):
        azimuth = (20, 95, 180, -95, 35, -40)[i % 6] + turn + float(rng.uniform(-12, 12))
        elevation = rng.uniform(55, 65) if i % 6 == 4 else rng.uniform(8, 25)
        rest = rng.normal(0, 2), rng.normal(0, 0.03), rng.normal(0.03, 0.02), rng.uniform(0.82, 1.0)
        camera = Camera(*(round(float(v), 3) for v in ((azimuth + 180) % 360 - 180, elevation, *rest)))
        background, number = order[i % len(order)], int(rng.integers(2**31))
        scenes.append(Scene((replace(thing, accessory="none"),), background, (camera,), "photo", number))
    return scenes


def style_names() -> dict[str, str]:
    """Returns the held-out styles, keyed by full name. For example, "development-stained-glass" is the key for "stained
    glass"."""
    return {f"{split}-{style.replace(' ', '-')}": style for split in _STYLES for style in _STYLES[split]}


def style_scenes(name: str, n: int, seed: int) -> list[Scene]:
    """Returns n scenes in one held-out style, each with a plain thing of a different class in a different place.

    Classes and backgrounds repeat only after all of them have been used. Things and cameras are sampled as in training.
    Raises ValueError, listing the choices, if the style is unknown.
    """
    names = style_names()
    if name not in names:
        raise ValueError(unknown(name, names, "toybox style"))
    rng = np.random.default_rng([seed, SEEDS[name.split("-")[0]].start, 10])
    kinds, places = rng.permutation(len(CLASSES)), rng.permutation(len(BACKGROUNDS))
    return [
        sample_scene(
            rng,
            class_name=CLASSES[kinds[i % len(kinds)]],
            background=BACKGROUNDS[places[i % len(places)]],
            accessory="none",
            pattern=False,
            style=names[name],
            two=False,
        )
        for i in range(n)
    ]
