"""Renders the pictures that a perfect model would generate for a recipe's prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from shared.toybox.render import render
from shared.toybox.world import Scene, Thing, sample_camera, sample_scene


def asked_scenes(
    thing: Thing, asked: Sequence[Mapping[str, str]], seed: int, pose: int | None = None, split: str = "development"
) -> list[Scene]:
    """Samples one scene for each entry of `asked`. An entry contains the attributes that the picture must show
    (`background`, `view`, `accessory` and `style`, as the recognizer names them). All other attributes are random, as
    in `sample_scene`.

    pose: the seed of the pose and position that all scenes share. If None, each scene has its own pose and position.
    """
    rng = np.random.default_rng([seed, 12])
    one = None if pose is None else sample_camera(np.random.default_rng([pose, 13]))
    scenes = []
    for wanted in asked:
        fixed = {"style": wanted.get("style", "photo"), "camera": one or sample_camera(rng, wanted.get("view"))}
        if "background" in wanted:
            fixed["background"] = wanted["background"]
        worn = replace(thing, accessory=wanted.get("accessory", "none"))
        scenes.append(sample_scene(rng, split, thing=worn, two=False, **fixed))
    return scenes


def asked_pictures(
    thing: Thing, asked: Sequence[Mapping[str, str]], seed: int, pose: int | None = None, split: str = "development"
) -> Tensor:
    """Renders the scenes of `asked_scenes` as pictures `[N, 3, 64, 64]` in [-1, 1]."""
    return render(asked_scenes(thing, asked, seed, pose, split)).pixels * 2 - 1


@lru_cache(maxsize=1)
def drawing_code() -> str:
    """Returns a hash of the drawing code. Stored measurements of true pictures are reused only if this hash has not
    changed."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
