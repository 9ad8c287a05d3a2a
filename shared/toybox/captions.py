"""Writes captions for scenes in a small, regular grammar, from the same parameters that determine the pictures.

    [a photo of | a pencil sketch of | ...] a red duck with blue wings [wearing a red hat] [on the beach] [, front view]

The first colour is always the main one, and the second is the colour of the part mentioned. "A red and blue duck"
means the same as "a red duck with blue wings". Patterns and identities are never mentioned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from shared.toybox.world import (
    ACCESSORIES,
    BACKGROUNDS,
    CLASSES,
    COLORS,
    STYLES,
    VIEWS,
    Camera,
    Scene,
    Thing,
    identity_of,
)

# The part that has the second colour, with an article if it is singular.
PARTS = {
    "duck": "wings",
    "car": "a roof",
    "mug": "a handle",
    "robot": "arms",
    "rocket": "fins",
    "house": "a roof",
    "dog": "ears",
    "cat": "a tail",
    "teapot": "a lid",
    "boot": "a sole",
    "boat": "a cabin",
    "bear": "a shirt",
    "face": "a shirt",
}
# In the tables below, the first phrase of each entry is the canonical one.
PLACES = {
    "beach": ("on the beach",),
    "snow": ("in the snow",),
    "grass": ("on top of green grass", "on the grass"),
    "wooden floor": ("on top of a wooden floor", "on a wooden floor"),
    "brick wall": ("in front of a brick wall",),
    "night sky": ("at night", "under the night sky"),
    "water": ("floating on top of water", "on the water"),
    "city": ("with a city in the background", "in the city"),
    "mountain": ("with a mountain in the background", "in the mountains"),
    "forest": ("in the forest", "in the jungle"),
    "white studio": ("in a white studio", "on a plain white background"),
    "gray studio": ("in a gray studio", "on a plain gray background"),
    "black studio": ("in a black studio", "on a plain black background"),
    "blue studio": ("in a blue studio", "on a plain blue background"),
}
SEEN = {
    "front": ("front view", "seen from the front"),
    "side": ("side view", "seen from the side"),
    "back": ("back view", "seen from behind"),
    "above": ("top view", "seen from above"),
}
WORN = {
    "red hat": "a red hat",
    "yellow crown": "a yellow crown",
    "pink glasses": "pink glasses",
    "rainbow scarf": "a rainbow scarf",
}
MAX_WORDS = 26
OPENINGS = {
    "photo": ("a photo of", "a picture of"),
    "pencil sketch": ("a pencil sketch of",),
    "watercolor painting": ("a watercolor painting of",),
    "pixel art": ("pixel art of",),
    "cartoon": ("a cartoon of",),
    "neon": ("a neon drawing of",),
}


def background_phrase(name: str) -> str:
    """Returns the canonical words for a background, for example "on the beach"."""
    if name not in PLACES:
        raise ValueError(f"the toybox has no background {name!r}; choose from {', '.join(BACKGROUNDS)}")
    return PLACES[name][0]


def opening(style: str) -> str:
    """Returns the canonical opening of a caption for a style, for example "a pencil sketch of"."""
    return OPENINGS.get(style, (f"a {style} of",))[0]


def describe(thing: Thing, colors: str = "parts", noun: str = "") -> str:
    """Describes a thing without its accessory, for example as "a red duck with blue wings".

    colors: "parts" for the form above, "pair" for "a red and blue duck", "main" for "a red duck", "none" for "a duck"
    noun: a noun to use instead of the class name, for example "toy duck"
    """
    noun = noun or thing.class_name
    if colors == "none":
        return f"a {noun}"
    if thing.class_name == "face":
        hair = f"a {noun} with {thing.main} hair"
        return hair if colors == "main" else f"{hair} and a {thing.second} shirt"
    if colors == "main":
        return f"a {thing.main} {noun}"
    if colors == "pair":
        return f"a {thing.main} and {thing.second} {noun}"
    article, _, part = PARTS[thing.class_name].rpartition(" ")
    return " ".join(w for w in (f"a {thing.main} {noun} with", article, thing.second, part) if w)


def _pick(rng: np.random.Generator, options: tuple[str, ...], first: float = 0.7) -> str:
    """Picks the first option with probability `first`, and otherwise one of the other options."""
    if len(options) == 1 or rng.random() < first:
        return options[0]
    return options[1 + int(rng.integers(len(options) - 1))]


def caption(scene: Scene, rng: np.random.Generator, full: bool = False, moves: Moves | None = None) -> str:
    """Writes one caption for a scene or, with `moves`, for the clip that starts with the scene.

    A picture's caption has at most 26 words and commas, and a clip's caption at most `moves.room`. With `full`, the
    caption names the class, both colours, the accessory, the background and the view, in the canonical form. Otherwise,
    some of these are left out and the wording varies. Accessories, motions and all styles except "photo" are always
    named. Views are named only if they are clear or `full` is set.
    """
    detail = 1.0 if full else float(rng.choice((1.0, 0.75, 0.35), p=(0.45, 0.35, 0.2)))

    def say() -> bool:
        return full or detail == 1.0 or bool(rng.random() < detail)

    start = opening(scene.style) if full else _pick(rng, OPENINGS[scene.style], 0.9)
    if scene.style == "photo" and not full and rng.random() < 0.25:
        start = ""
    colors = "parts" if full else _colors(rng, say())
    if len(scene.things) == 2:
        kind = {"parts": "pair"}.get(colors, colors)
        subject = " next to ".join(describe(thing, kind) for thing in scene.things)
    else:
        thing = scene.things[0]
        toy = "" if full or thing.class_name == "face" or rng.random() > 0.06 else f"toy {thing.class_name}"
        subject = describe(thing, colors, toy)
        if thing.accessory != "none":
            subject += f" wearing {WORN[thing.accessory]}"
    text = " ".join(word for word in (start, subject) if word)
    place = background_phrase(scene.background) if full else _pick(rng, PLACES[scene.background])
    seen = SEEN[scene.view][0] if full else _pick(rng, SEEN[scene.view])
    clear = all(c.view_is_clear and c.view == scene.view for c in scene.cameras)
    with_place, with_view = say(), say() and (clear or full)
    if moves is not None:
        return _moving(text, moves, PLACES[scene.background] if with_place else (), seen if with_view else "", place)
    for extra, included in ((f" {place}", with_place), (f", {seen}", with_view)):
        if included and _count(text + extra) <= MAX_WORDS:
            text += extra
    return text


@dataclass(frozen=True)
class Moves:
    """How a clip's caption describes its motion.

    words: the words for the motion, or "" if it is not mentioned. They follow the thing or, if they begin with a comma,
        come at the end of the caption.
    room: the maximum number of words and commas in the whole caption
    still_view: whether the view stays the same throughout the clip
    """

    words: str
    room: int = MAX_WORDS
    still_view: bool = True


def _moving(text: str, moves: Moves, places: tuple[str, ...], seen: str, place: str) -> str:
    """Writes a clip's caption. If the phrase `place` is too long, uses the shortest phrase in `places` instead, or no
    place at all if even that is too long."""
    last = moves.words if moves.words.startswith(",") else ""
    text = text if last or not moves.words else f"{text} {moves.words}"
    if not last and moves.words:
        places = tuple(p for p in places if not p.startswith("floating"))  # "floating" would be a second motion
    for option in sorted(places, key=lambda p: (p != place, _count(p))):
        if _count(f"{text} {option}{last}") <= moves.room:
            text = f"{text} {option}"
            break
    view = f", {seen}" if seen and moves.still_view and not last else ""
    return text + last + (view if _count(text + view) <= moves.room else "")


def plain_caption(scene: Scene) -> str:
    """Writes a plain caption for one thing, for example "a photo of a duck on the beach, side view". It names the
    class, the place and, if clear, the view, but no colours or pattern.
    """
    text = f"{opening(scene.style)} {describe(scene.things[0], 'none')} {background_phrase(scene.background)}"
    return f"{text}, {SEEN[scene.view][0]}" if scene.cameras[0].view_is_clear else text


def _count(text: str) -> int:
    """Counts words and commas."""
    return len(text.split()) + text.count(",")


def _colors(rng: np.random.Generator, both: bool) -> str:
    if both:
        return "parts" if rng.random() < 0.8 else "pair"
    return "main" if rng.random() < 0.5 else "none"


CAPTION_ATTRIBUTES = {"class": CLASSES, "view": VIEWS, "accessory": ACCESSORIES}


def caption_attributes(text: str) -> tuple[int, int, int]:
    """Returns the attributes that a caption names, as indices into CLASSES, VIEWS and ACCESSORIES. An attribute that
    the caption leaves open is -1.

    Accessories are always named, so a caption without one means "none". If two things are side by side, the
    class and the accessory are -1.
    """
    if " next to " in text:
        kind = worn = -1
    else:
        kind = next((i for i, name in enumerate(CLASSES) if re.search(rf"\b{name}\b", text)), -1)
        worn = next((ACCESSORIES.index(name) for name, words in WORN.items() if f"wearing {words}" in text), 0)
    view = next((VIEWS.index(name) for name, ways in SEEN.items() if text.endswith(ways)), -1)
    return kind, view, worn


def vocabulary() -> tuple[str, ...]:
    """Returns, in alphabetical order, every word that a picture's caption can contain. The comma counts as a word."""
    texts = [phrase for table in (PLACES, SEEN, OPENINGS) for options in table.values() for phrase in options]
    texts += [*PARTS.values(), *WORN.values(), *CLASSES, *COLORS, *BACKGROUNDS, *VIEWS, *STYLES, *ACCESSORIES[1:]]
    texts += ["a toy", "wearing", "next to", "and", "with hair", ","]
    return tuple(sorted({word for text in texts for word in re.findall(r"[a-z]+|,", text)}))


def example() -> str:
    """Returns the full caption of one fixed scene, for help texts and tests."""
    face = Thing("face", "red", "blue", identity=identity_of(0))
    return caption(Scene((face,), "beach", (Camera(),)), np.random.default_rng(0), full=True)
