"""The headline scores of a report. They are means over views, shown next to those of the real object and a sphere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pcs_3d.evaluation.asset_report import Curve
from pcs_3d.evaluation.looks import Looks
from pcs_3d.evaluation.shape_scores import BEST_DB, Geometry
from shared.metrics.html import formatted
from shared.metrics.report import Score, number

Unit = Literal["rate", "score", "cosine", "count", "share"]


@dataclass(frozen=True)
class Arm:
    """All measurements of one object.

    looks: the measurements of each view, including those of shape.
    psnr: the PSNR over all views. It is NaN if there is nothing to compare.
    """

    looks: Looks
    psnr: float = math.nan

    def mean(self, key: str) -> float | None:
        """Returns the mean over views, or None if the score was not measured."""
        values = [v for v in self.looks.scores.get(key, []) if not math.isnan(v)]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Arms:
    """The measurements of the asset and, if the real object is known, of that object and of a sphere in its mean
    colour."""

    asset: Arm
    truth: Arm | None = None
    sphere: Arm | None = None
    chance: float | None = None  # probability of a correct guess among look-alikes


@dataclass(frozen=True)
class Measure:
    """A score that is measured for each view."""

    title: str
    unit: Unit
    better: Literal["higher", "lower"] = "higher"
    explanation: str = ""


_ALIGNED = (
    "Overlap of the silhouettes with those of the real object, after aligning scale and translation but not rotation."
)
_COLORS = (
    "Computed over the pixels that lie in either silhouette, in all views, after the same alignment; the maximum is "
    f"{BEST_DB:.0f}. The asset's colours are unlit; the toybox's real objects are lit."
)
_VERIFIED = (
    "Share of views that are recognized among look-alikes and reach the similarity to the references that 95% of the "
    "true renders reach."
)
_RETRIEVED = (
    "Share of views that are closer to the object than to any other object of the same class and colours. Even a "
    "sphere may pass, so consider identity as well."
)
_JANUS = (
    "Janus score: share of views in which the pose estimator sees the side that the camera looks at (front, side, "
    "back). Always guessing “front” scores 31%, and always guessing “side” scores 62%."
)
_ERROR = "Difference between the camera's azimuth and the pose estimator's reading."
_FRONTS = "Number of quarters around the object in which most views look like its front; 1 is correct."

MEASURES: Mapping[str, Measure] = {
    "iou": Measure("Silhouette IoU", "score", explanation=_ALIGNED),
    "psnr": Measure("Colour PSNR (dB)", "count", explanation=_COLORS),
    "verified": Measure("Identity", "rate", explanation=_VERIFIED),
    "recognised": Measure("Recognized among look-alikes", "rate", explanation=_RETRIEVED),
    "likeness": Measure(
        "Likeness to references", "cosine", explanation="Mean cosine similarity to the two closest pictures."
    ),
    "likeness_true": Measure("Likeness to the truth from the same side", "cosine"),
    "clip_t": Measure(
        "Prompt (CLIP-T)",
        "cosine",
        explanation="Cosine similarity of a render to the prompt, which has the class noun in place of the concept.",
    ),
    "clip_i": Measure("References (CLIP-I)", "cosine"),
    "dino_i": Measure("References (DINO-I)", "cosine"),
    "identity_i": Measure("References (identity encoder)", "cosine"),
    "view": Measure("View agreement", "rate", explanation=_JANUS),
    "view_recognizer": Measure("View agreement (recognizer)", "rate"),
    "azimuth_error": Measure("Azimuth error (degrees)", "count", "lower", _ERROR),
}


def headline(arms: Arms, shape: Geometry | None = None) -> list[Score]:
    """Returns every score that was measured. In each, `base` is the sphere's score, and `truth` is the real object's.
    `shape` is None if there is no mesh."""
    scores = []
    for key, measure in MEASURES.items():
        if (value := _of(arms.asset, key)) is None:
            continue
        scores.append(_score(key, measure, value, _of(arms.truth, key), _of(arms.sphere, key)))
        if key == "recognised":
            scores[-1] = scores[-1].model_copy(update={"chance": arms.chance})
        if key == "verified":
            scores.append(_relative(scores[-1]))
    if arms.asset.looks.fronts is not None:
        both = [arm and arm.looks.fronts for arm in (arms.truth, arms.sphere)]
        fronts = Measure("Fronts", "count", "lower", _FRONTS)
        scores.append(_score("fronts", fronts, arms.asset.looks.fronts, *both))
    return [*scores, *(_geometry(shape) if shape else ())]


def _of(arm: Arm | None, key: str) -> float | None:
    if arm is None:
        return None
    return number(arm.psnr) if key == "psnr" else arm.mean(key)


def _score(key: str, what: Measure, value: float, truth: float | None = None, sphere: float | None = None) -> Score:
    more: dict[str, Any] = {"unit": what.unit, "better": what.better, "explanation": what.explanation}
    return Score(key=key, title=what.title, value=number(value), truth=truth, base=sphere, **more)


def _relative(identity: Score) -> Score:
    passed = identity.truth
    title, explanation = (
        "Identity, relative",
        "Identity divided by the share of true renders from the same cameras that are verified.",
    )
    value, sphere = (None if not passed or v is None else min(1.0, v / passed) for v in (identity.value, identity.base))
    more: dict[str, Any] = {"unit": "rate", "explanation": explanation}
    return Score(key="identity_relative", title=title, value=value, base=sphere, **more)


def _geometry(shape: Geometry) -> list[Score]:
    rows: list[tuple[str, str, float | None, Unit]] = [
        ("faces", "Triangles", shape.faces, "count"),
        ("watertight", "Watertight", float(shape.watertight), "rate"),
        ("components", "Connected parts", shape.components, "count"),
        ("volume", "Volume (radii³)", shape.volume, "count"),
        ("share_of_box", "Share of the bounding box", shape.share_of_box, "share"),
    ]
    return [Score(key=key, title=title, value=value, unit=unit) for key, title, value, unit in rows]


def curves(arms: Arms, azimuths: Sequence[float]) -> list[Curve]:
    """Returns every score by azimuth, for each arm in which it was measured."""
    found = []
    for key, measure in MEASURES.items():
        if key not in arms.asset.looks.scores:
            continue
        of = {n: arm and arm.looks.scores.get(key) for n, arm in vars(arms).items() if isinstance(arm, Arm)}
        values = {name: [number(v) for v in column] for name, column in of.items() if column}
        found.append(Curve(key=key, title=measure.title, azimuth_deg=list(azimuths), **values))
    return found


def said(score: Score, value: float | None) -> str:
    """Formats a score's value."""
    if value is not None and score.key == "watertight":
        return "yes" if value else "no"
    if value is not None and score.unit == "count" and float(value).is_integer():
        return f"{value:.0f}"
    return formatted(value, score.unit)


def line(score: Score) -> str:
    """Formats a headline score as one line, with the scores of the real object, the sphere and chance if they are
    known."""
    beside = {"real object": score.truth, "sphere": score.base, "chance": score.chance}
    figures = [said(score, score.value), *(f"{n} {said(score, v)}" for n, v in beside.items() if v is not None)]
    return "   ".join([*figures, "lower is better"] if score.better == "lower" else figures)
