"""What the headline scores are called and what each says, in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.metrics.scorer import Scorer


@dataclass(frozen=True)
class About:
    title: str
    explanation: str
    unit: Literal["rate", "score", "cosine", "count", "share"] = "rate"
    better: Literal["higher", "lower"] = "higher"


ABOUT = {
    "trade_off": About(
        "Trade-off",
        "One number for the three that pull against each other: the harmonic mean of identity, prompt following and "
        "freedom. It is low when any of them is.",
        "score",
    ),
    "identity": About(
        "Identity",
        "How often the picture shows this very thing, as often as true pictures of it pass: recognised among similar "
        "things, no copy of a reference, and at least as like the references as 95 % of true pictures are.",
    ),
    "text": About(
        "Prompt followed",
        "Of the things a prompt asks for (background, view, accessory, style), how many the picture shows.",
    ),
    "freedom": About(
        "Freedom",
        "How much of the thing's own change of pose the pictures of one prompt keep: 0 is one pose for every seed, 1 as "
        "many as true pictures from random views show. Only pictures that show the thing count, cut to it.",
        "score",
    ),
    "recognised": About(
        "Recognised", "How often the picture is more like the references than like any of the similar things."
    ),
    "no_face": About(
        "No face",
        "How many pictures show no face (only hair, from behind or from above). They count as failures of identity "
        "unless the prompt asks for that view.",
        better="lower",
    ),
    "place": About(
        "Spread of place",
        "How much the place of the thing varies within a prompt: the standard deviation of its middle, in half-pictures.",
        "count",
    ),
    "size": About("Spread of size", "The same of the size of the thing: of half its larger side.", "count"),
    "views": About(
        "Effective views",
        "From how many sides the thing is seen where the prompt leaves it open: exp(entropy) of the views that the "
        "recognizer reads off the verified pictures.",
        "count",
    ),
    "background": About("Background", "How often the background is the one asked for."),
    "view": About("View", "How often the thing is seen from the side asked for."),
    "accessory": About("Accessory", "How often the thing wears what was asked for."),
    "style": About("Style", "How often the picture is in the style asked for."),
    "copied": About(
        "Copies",
        "How many pictures repeat a reference instead of showing the subject anew. They count as failures of identity.",
        better="lower",
    ),
    "clip_t": About(
        "CLIP-T", "Cosine of the picture and its prompt (with the class noun for the name) in CLIP.", "cosine"
    ),
    "clip_i": About(
        "CLIP-I",
        "Mean cosine of the picture and the references in CLIP. A copy has the highest, so read it with Copies.",
        "cosine",
    ),
    "dino_i": About(
        "DINO-I", "Mean cosine of the picture and the references in DINO: stricter on details than CLIP-I.", "cosine"
    ),
    "identity_i": About("Likeness", "Mean cosine of the picture and the references in the identity encoder.", "cosine"),
    "diversity": About(
        "Diversity",
        "How different the pictures of one prompt are: 1 minus their mean cosine. "
        "Zero means every seed gives the same picture.",
        "score",
    ),
    "drift": About(
        "Drift",
        "How much pictures of other things change when the concept is loaded: 1 minus the cosine with and without it.",
        "score",
        "lower",
    ),
}
WITHOUT_GALLERY = "Likeness to the references, with copies counted as 0 (no gallery of similar things was given)."
WITHOUT_TRUTH = (
    "How often the picture is recognised among similar things and is no copy of a reference. That it is the very thing is "
    "not verified: there are no true pictures of it to set a bar."
)
TWO_TERMS = (
    "One number for two that pull against each other: the harmonic mean of identity and prompt following. Freedom is not "
    "in it, for nothing says how freely this thing could be shown."
)
TEXT_BY_CLIP = "Cosine of picture and prompt in CLIP, stretched to 0–1 as CLIPScore does (the toybox's own as it is)."
NOT_MEASURED = "Not measured: in too few pairs of pictures do both show the thing. The trade-off is 0 with it."


def explained(key: str, scorer: Scorer, read: bool) -> dict[str, object]:
    """What title, unit and explanation of a score are in this run, where they differ from `ABOUT`.

    read: whether a recognizer read what the prompts ask for
    """
    figures = scorer.figures
    if key == "trade_off" and (figures is None or figures.range is None):
        return {"explanation": TWO_TERMS}
    if key == "identity" and scorer.chance is None:
        return {"title": "Identity (likeness)", "explanation": WITHOUT_GALLERY, "unit": "score"}
    if key == "identity" and figures is None:
        return {"explanation": WITHOUT_TRUTH}
    if key == "text" and not read:
        return {"explanation": TEXT_BY_CLIP, "unit": "score"}
    return {}
