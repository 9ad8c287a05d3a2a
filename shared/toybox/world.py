"""Defines the vocabularies of the toybox world, and samples scenes from it.

Angles are in degrees. The camera sees the front of a thing at azimuth 0, and its left side at azimuth 90. At elevation
90, the camera looks straight down. Positions and sizes are fractions of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

CLASSES = (
    "duck",
    "car",
    "mug",
    "robot",
    "rocket",
    "house",
    "dog",
    "cat",
    "teapot",
    "boot",
    "boat",
    "bear",
    "face",
)
COLORS = ("red", "yellow", "green", "blue", "purple", "pink", "white", "black")
BACKGROUNDS = (
    "beach",
    "snow",
    "grass",
    "wooden floor",
    "brick wall",
    "night sky",
    "water",
    "city",
    "mountain",
    "forest",
    "white studio",
    "gray studio",
    "black studio",
    "blue studio",
)
VIEWS = ("front", "side", "back", "above")
ACCESSORIES = ("none", "red hat", "yellow crown", "pink glasses", "rainbow scarf")
STYLES = ("photo", "pencil sketch", "watercolor painting", "pixel art", "cartoon", "neon")

# The pattern and identity seeds of each split. The ranges are disjoint. The training range is small enough for each of
# its seeds to occur several times, in different colours and places.
SEEDS = {
    "train": range(0, 20_000),
    "development": range(1_000_000, 1_010_000),
    "reporting": range(2_000_000, 2_010_000),
}
IDENTITY_SIZE = 16

RGB = {
    "red": (0.84, 0.1, 0.1),
    "yellow": (0.97, 0.83, 0.1),
    "green": (0.1, 0.6, 0.2),
    "blue": (0.1, 0.3, 0.88),
    "purple": (0.46, 0.14, 0.64),
    "pink": (1.0, 0.55, 0.74),
    "white": (0.96, 0.96, 0.96),
    "black": (0.09, 0.09, 0.1),
}


@dataclass(frozen=True)
class Thing:
    """An object in a scene.

    main, second: its two colours
    pattern_seed: the seed of its pattern and proportions, or None for a plain thing
    identity: for a face, IDENTITY_SIZE numbers in [-1, 1]; None for everything else
    """

    class_name: str
    main: str
    second: str
    pattern_seed: int | None = None
    accessory: str = "none"
    identity: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for value, choices in (
            (self.class_name, CLASSES),
            (self.main, COLORS),
            (self.second, COLORS),
            (self.accessory, ACCESSORIES),
        ):
            if value not in choices:
                raise ValueError(f"the toybox has no {value!r}; choose from {', '.join(choices)}")
        if self.main == self.second:
            raise ValueError(f"the main and second colours must differ, but both are {self.main!r}")
        if (self.class_name == "face") != (self.identity is not None):
            raise ValueError("faces must have an identity, and other things must not")


@dataclass(frozen=True)
class Camera:
    """The viewpoint from which a thing is seen, and the position and scale of the thing in the picture.

    x points right and y points down from the centre of the picture. At scale 1, the thing nearly fills the picture.
    """

    azimuth_deg: float = 0.0
    elevation_deg: float = 15.0
    roll_deg: float = 0.0
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0

    @property
    def view(self) -> str:
        """The name of the view, one of VIEWS."""
        turn = abs((self.azimuth_deg + 180) % 360 - 180)
        if self.elevation_deg >= 50:
            return "above"
        return "front" if turn <= 40 else "back" if turn >= 140 else "side"

    @property
    def view_is_clear(self) -> bool:
        """Whether the view is far enough from the boundaries between views to be named in a caption."""
        turn = abs((self.azimuth_deg + 180) % 360 - 180)
        if self.elevation_deg >= 52:
            return True
        return self.elevation_deg <= 38 and (turn <= 34 or 50 <= turn <= 130 or turn >= 146)


@dataclass(frozen=True)
class Scene:
    """The content of a picture. It shows one or two things, each with its own camera. The left thing comes first.

    seed: determines the details of the background and the light
    pan: the shift of the background to the right, in fractions of the picture. It is positive if the camera has moved
        to its right.
    """

    things: tuple[Thing, ...]
    background: str
    cameras: tuple[Camera, ...]
    style: str = "photo"
    seed: int = 0
    pan: float = 0.0

    @property
    def view(self) -> str:
        """The view of the first thing, one of VIEWS."""
        return self.cameras[0].view


def identity_of(seed: int) -> tuple[float, ...]:
    """Returns the identity vector that a seed gives to a face. It has IDENTITY_SIZE numbers in [-1, 1]."""
    values = np.random.default_rng([seed, 7]).uniform(-1, 1, IDENTITY_SIZE)
    return tuple(round(float(v), 4) for v in values)


def _choose(rng: np.random.Generator, values: tuple[str, ...], but: tuple[str, ...] = ()) -> str:
    left = [v for v in values if v not in but]
    return left[int(rng.integers(len(left)))]


def sample_thing(rng: np.random.Generator, split: str = "train", **fixed: Any) -> Thing:
    """Samples a random thing.

    fixed: any of class_name, main, second, accessory, pattern (bool), pattern_seed, identity
    """
    name = fixed.get("class_name") or _choose(rng, CLASSES)
    main = fixed.get("main") or _choose(rng, COLORS, (fixed.get("second", ""),))
    second = fixed.get("second") or _choose(rng, COLORS, (main,))
    accessory = fixed.get("accessory")
    if accessory is None:
        accessory = _choose(rng, ACCESSORIES[1:]) if rng.random() < 0.17 else "none"
    seeds = SEEDS[split]
    seed = int(seeds[int(rng.integers(len(seeds)))])
    patterned = bool(rng.random() < 0.48)
    if name == "face":
        return Thing(name, main, second, None, accessory, fixed.get("identity") or identity_of(seed))
    if fixed.get("pattern_seed") is not None:
        return Thing(name, main, second, fixed["pattern_seed"], accessory)
    return Thing(name, main, second, seed if fixed.get("pattern", patterned) else None, accessory)


def sample_camera(rng: np.random.Generator, view: str | None = None) -> Camera:
    """Samples a random camera. If `view` is set, the camera clearly shows this view."""
    if view is None and rng.random() < 0.75:
        view = VIEWS[int(rng.choice(4, p=(0.3, 0.28, 0.25, 0.17)))]
    low = float(np.clip(abs(rng.normal(14, 10)), 0, 35))
    side = float(rng.choice((-1.0, 1.0)))
    if view is None:
        azimuth, elevation = rng.uniform(-180, 180), np.degrees(np.arcsin(rng.uniform(np.sin(-0.15), 1))) * 0.95
    elif view == "above":
        azimuth, elevation = rng.uniform(-180, 180), rng.uniform(54, 80)
    elif view == "side":
        azimuth, elevation = side * rng.uniform(55, 125), low
    else:
        azimuth, elevation = rng.uniform(-32, 32) + 180 * (view == "back"), low
    if rng.random() < 0.72:
        roll, x, y, scale = rng.normal(0, 2), rng.normal(0, 0.04), rng.normal(0.03, 0.035), rng.uniform(0.78, 1.0)
    else:
        scale = rng.uniform(0.4, 1.1)
        # A thing may touch the border, but most of it stays in the picture.
        room = min(0.35, max(0.04, 0.56 - 0.4 * scale))
        roll, x, y = rng.uniform(-25, 25), rng.uniform(-room, room), rng.uniform(-room, room)
    azimuth = (azimuth + 180) % 360 - 180
    return Camera(*(round(float(v), 4) for v in (azimuth, elevation, roll, x, y, scale)))


def _pair(
    rng: np.random.Generator, split: str, fixed: dict[str, Any]
) -> tuple[tuple[Thing, Thing], tuple[Camera, Camera]]:
    """Samples two things of different classes that are side by side, and their cameras. The left thing comes first."""
    first = sample_thing(rng, split, **{"accessory": "none", **fixed})
    other = _choose(rng, CLASSES, (first.class_name,))
    second = sample_thing(rng, split, class_name=other, accessory="none")
    view = fixed.get("view") or (VIEWS[int(rng.choice(4, p=(0.4, 0.3, 0.2, 0.1)))] if rng.random() < 0.8 else None)
    cameras = []
    for sign in (-1, 1):
        seen = sample_camera(rng, view)
        cameras.append(
            Camera(
                seen.azimuth_deg,
                seen.elevation_deg if sign < 0 else cameras[0].elevation_deg,
                round(float(rng.normal(0, 2)), 4),
                round(sign * float(rng.uniform(0.21, 0.25)), 4),
                round(float(rng.normal(0.06, 0.03)), 4),
                round(float(rng.uniform(0.52, 0.62)), 4),
            )
        )
    return (first, second), (cameras[0], cameras[1])


def sample_scene(rng: np.random.Generator, split: str = "train", **fixed: Any) -> Scene:
    """Samples a random scene.

    split: "train", "development" or "reporting", which determines the range of the pattern and identity seeds
    fixed: any of class_name, main, second, accessory, pattern (bool), pattern_seed, identity, thing (a complete Thing),
        background, view, camera, style, two (bool), seed
    """
    known = {
        "class_name",
        "main",
        "second",
        "accessory",
        "pattern",
        "pattern_seed",
        "identity",
        "thing",
        "background",
        "view",
        "camera",
        "style",
        "two",
        "seed",
    }
    if unknown := set(fixed) - known:
        raise ValueError(f"sample_scene cannot fix {', '.join(sorted(unknown))}; it can fix {', '.join(sorted(known))}")
    alone = {"thing", "camera", "accessory"} & set(fixed)
    two = fixed.get("two", False if alone else bool(rng.random() < 0.08))
    if two:
        things, cameras = _pair(rng, split, {k: v for k, v in fixed.items() if k not in ("thing", "camera")})
    else:
        things = (fixed.get("thing") or sample_thing(rng, split, **fixed),)
        camera = fixed.get("camera") or sample_camera(rng, fixed.get("view"))
        # Glasses cannot be seen from behind, so captions must not mention them in such pictures.
        while not fixed.get("view") and not fixed.get("camera") and _hidden(things[0], camera):
            camera = sample_camera(rng)
        if not fixed.get("accessory") and not fixed.get("thing") and _hidden(things[0], camera):
            things = (sample_thing(rng, split, **{**fixed, "accessory": "none"}),)
        cameras = (camera,)
    style = fixed.get("style") or (_choose(rng, STYLES[1:]) if rng.random() < 0.15 else "photo")
    background = fixed.get("background") or _choose(rng, BACKGROUNDS)
    return Scene(things, background, cameras, style, int(fixed.get("seed", rng.integers(2**31))))


def _hidden(thing: Thing, camera: Camera) -> bool:
    return thing.accessory == "pink glasses" and abs(camera.azimuth_deg) > 105 and camera.elevation_deg < 60
