"""Writes captions for clips. They are picture captions with words added for the motion, as in "a red car spinning on
the grass".

There are no words for held-out motions, so clips of these motions get picture captions.
"""

from __future__ import annotations

import numpy as np

from shared.toybox.captions import MAX_WORDS, Moves, background_phrase, caption, describe, opening
from shared.toybox.motions.captioned import MOTIONS, captioned_motion
from shared.toybox.motions.clips import MovingScene
from shared.toybox.tokenizer import MAX_LENGTH

# The first phrase of each motion is the canonical one. Phrases that begin with a comma go at the end of a caption and
# replace the view.
PHRASES: dict[str, tuple[str, ...]] = {
    "spin": ("spinning", "turning around", "spinning around"),
    "slide left": ("moving to the left", "sliding to the left", "moving left"),
    "slide right": ("moving to the right", "sliding to the right", "moving right"),
    "bounce": ("bouncing", "bouncing up and down", "jumping up and down"),
    "rise": ("rising", "moving up", "floating up"),
    "fall": ("falling", "falling down", "moving down"),
    "wobble": ("wobbling", "rocking from side to side"),
    "approach": ("moving closer", "coming closer"),
    "recede": ("moving away", "going away"),
    "orbit": (", moving camera", ", the camera moving around it", ", the camera turning around it"),
}
# The toybox's tokenizer was built for picture captions. It splits each of these words into several tokens, whose
# number is given here.
_PIECES = {
    "sliding": 3,
    "down": 2,
    "rising": 4,
    "falling": 4,
    "wobbling": 4,
    "rocking": 3,
    "closer": 3,
    "coming": 3,
    "going": 3,
    "away": 3,
    "camera": 5,
}


def motion_phrase(name: str) -> str:
    """Returns the canonical words for a captioned motion, for example "spinning". Raises ValueError, listing the
    choices, for any other motion."""
    return PHRASES[captioned_motion(name).name][0]


def _room(words: str) -> int:
    """Returns how many words and commas a caption that contains `words` may have without being truncated."""
    extra = sum(_PIECES.get(word, 1) - 1 for word in words.replace(",", "").split())
    return MAX_LENGTH - 2 - extra


def clip_caption(moving: MovingScene, rng: np.random.Generator, full: bool = False) -> str:
    """Writes one caption for a clip. The toybox's tokenizer splits it into at most 30 tokens.

    Captioned motions are always named, and other motions never are. The view may be named if it is clear and does
    not change.

    full: whether to use the canonical form, as in picture captions
    """
    words = ""
    if moving.motion.name in MOTIONS:
        options = PHRASES[moving.motion.name]
        words = options[0] if full or rng.random() < 0.6 else options[int(rng.integers(len(options)))]
    cameras = [scene.cameras[0] for scene in moving.scenes()]
    still = all(camera.view_is_clear and camera.view == moving.scene.view for camera in cameras)
    return caption(moving.scene, rng, full, Moves(words, min(_room(words), MAX_WORDS + 4), still))


def plain_clip_caption(moving: MovingScene) -> str:
    """Writes a plain caption for a clip, for example "a photo of a duck on the beach". It does not mention the
    motion."""
    scene = moving.scene
    return f"{opening(scene.style)} {describe(scene.things[0], 'none')} {background_phrase(scene.background)}"
