"""Titles and explanations of the headline scores."""

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
        "One number for three competing goals: the harmonic mean of identity, prompt following and freedom. It is low if "
        "any of the three is low.",
        "score",
    ),
    "identity": About(
        "Identity",
        "How often a picture shows this exact subject, relative to how often true renders of the subject pass the same "
        "test. A picture passes if it is recognized among look-alikes, is not a copy of a reference, and reaches the "
        "similarity to the references that 95% of the true renders reach.",
    ),
    "text": About(
        "Prompt followed",
        "The share of the prompt's attributes (background, view, accessory, style) that the picture shows.",
    ),
    "freedom": About(
        "Freedom",
        "How much of the subject's true pose variation is preserved among pictures from the same prompt: 0 means one pose "
        "for every seed, and 1 means as many poses as true renders from random views. It is measured on crops of pictures "
        "that show the subject.",
        "score",
    ),
    "recognised": About(
        "Recognized", "How often a picture is more similar to the references than to any of the look-alikes."
    ),
    "no_face": About(
        "No face",
        "How many pictures show no face (only hair, as seen from behind or above). They count as identity failures "
        "unless the prompt asks for that view.",
        better="lower",
    ),
    "place": About(
        "Position spread",
        "How much the subject's position varies among pictures from the same prompt: the standard deviation of its "
        "centre, as a fraction of half the picture's side length.",
        "count",
    ),
    "size": About(
        "Size spread",
        "How much the subject's size varies among pictures from the same prompt: the standard deviation of half the "
        "length of its longer side, as a fraction of half the picture's side length.",
        "count",
    ),
    "views": About(
        "Effective views",
        "The number of sides from which the subject is seen when the prompt leaves the view open: exp(entropy) of the "
        "views that the recognizer finds in the verified pictures.",
        "count",
    ),
    "background": About("Background", "How often the background matches the prompt."),
    "view": About("View", "How often the subject is seen from the viewpoint that the prompt asks for."),
    "accessory": About("Accessory", "How often the subject wears the accessory that the prompt asks for."),
    "style": About("Style", "How often the picture is in the style that the prompt asks for."),
    "copied": About(
        "Copies",
        "How many pictures repeat a reference instead of showing the subject in a new way. They count as identity failures.",
        better="lower",
    ),
    "clip_t": About(
        "CLIP-T", "Cosine between picture and prompt (with the class noun in place of the name) in CLIP.", "cosine"
    ),
    "clip_i": About(
        "CLIP-I",
        "Mean cosine between picture and references in CLIP. A copy scores highest, so read it together with Copies.",
        "cosine",
    ),
    "dino_i": About(
        "DINO-I",
        "Mean cosine between picture and references in DINO, which is stricter about details than CLIP.",
        "cosine",
    ),
    "identity_i": About("Likeness", "Mean cosine between picture and references in the identity encoder.", "cosine"),
    "diversity": About(
        "Diversity",
        "How different pictures from the same prompt are: 1 minus their mean cosine. "
        "Zero means that every seed gives the same picture.",
        "score",
    ),
    "drift": About(
        "Drift",
        "How much pictures of other things change when the concept is loaded: 1 minus the cosine between the pictures with "
        "and without it.",
        "score",
        "lower",
    ),
}
WITHOUT_GALLERY = "Likeness to the references, with copies counted as 0 (no gallery of look-alikes was given)."
WITHOUT_TRUTH = (
    "How often a picture is recognized among look-alikes and is not a copy of a reference. Whether it shows this exact "
    "subject is not verified, because there are no true renders of the subject from which to set a threshold."
)
TWO_TERMS = (
    "One number for two competing goals: the harmonic mean of identity and prompt following. Freedom is not included, "
    "because the subject's true variation in pose is unknown."
)
TEXT_BY_CLIP = (
    "Cosine between picture and prompt in CLIP, scaled to 0–1 as in CLIPScore (unscaled for the toybox's own CLIP)."
)
NOT_MEASURED = (
    "Not measured, because there are too few pairs of pictures that both show the subject. The trade-off is then 0."
)


def explained(key: str, scorer: Scorer, read: bool) -> dict[str, object]:
    """Returns the title, unit and explanation of a score in this run, if they differ from `ABOUT`.

    read: whether a recognizer checked that the pictures show what the prompts ask for
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
