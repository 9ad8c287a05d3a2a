"""Measures each render of an asset separately, with instruments for pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.evaluation.janus import agreeing, fronts, read_views, sectors, turned_by
from pcs_3d.evaluation.truths import TrueToy
from pcs_3d.evaluation.views import Views, as_model_pixels
from shared.metrics.encoders import DinoEncoder, Instruments
from shared.metrics.scores import clip_i, clip_t
from shared.metrics.verification import PASSING, Verifier
from shared.toybox import reference_sets

_ELEVATIONS_DEG = (8.0, 15.0, 22.0)  # elevations of the true renders that determine the threshold for verification


@dataclass(frozen=True)
class Looks:
    """Measurements of B views of one object.

    scores: B values by name, NaN where a score does not apply.
    seen: for each view, what the instruments estimate from it, by name.
    fronts: the number of fronts found. It is None if no instrument estimates directions.
    """

    scores: Mapping[str, list[float]]
    seen: list[dict[str, str]] = field(default_factory=list)
    fronts: int | None = None


class Judge:
    """Measures renders of several objects with the same instruments.

    Args:
        instruments: the available instruments
        around: the cameras of all renders
        prompt: the prompt with the class noun in place of the concept, or "" if unknown
        references: the reference pictures ([R, 3, H, W] in [-1, 1]), or None
        toy: the real object, if it is a toybox subject; it determines the look-alikes used to verify identity
    """

    def __init__(
        self, instruments: Instruments, around: Cameras, prompt: str = "", references: Tensor | None = None,
        toy: TrueToy | None = None,
    ) -> None:  # fmt: skip
        self.tools, self.around, self.prompt, self.references = instruments, around, prompt, references
        self.true: Tensor | None = None  # embeddings of the true renders, for likeness from the same side
        self.verifier, self.least = None, math.nan
        if toy is not None and instruments.identity is not None:
            self._know(toy)

    def _know(self, toy: TrueToy) -> None:
        """Prepares the look-alikes and the threshold for verification. The threshold is the similarity to the
        references that 95% of the true renders reach."""
        held = toy.held
        shown = reference_sets.pictures(held.thing, split=held.name.split("-")[0])
        shown = shown if self.references is None else self.references
        self.verifier = Verifier(
            shown, self.tools, toy.class_noun, reference_sets.gallery(held), reference_sets.fresh(held)
        )
        likeness = [self.verifier.look(as_model_pixels(views)).likeness for views in raised(toy, self.around)]
        self.least = float(torch.quantile(torch.cat(likeness), 1 - PASSING))

    def look(self, views: Views, true: Views | None = None) -> Looks:
        """Measures all scores for which there are instruments and references. `true` shows the real object from the
        same cameras."""
        pixels, scores = as_model_pixels(views), dict[str, list[float]]()
        tools = self.tools
        if tools.text_image is not None:
            whole = tools.text_image.images(pixels)
            if self.prompt:
                texts = tools.text_image.texts([self.prompt] * len(pixels))
                scores["clip_t"] = clip_t(whole, texts).tolist()
            if self.references is not None:
                scores["clip_i"] = clip_i(whole, tools.text_image.images(self.references)).tolist()
        if tools.identity is not None and tools.identity is not tools.text_image:
            key = "dino_i" if isinstance(tools.identity, DinoEncoder) else "identity_i"
            if self.references is not None:
                who = tools.identity.images(pixels)
                scores[key] = clip_i(who, tools.identity.images(self.references)).tolist()
        if tools.identity is not None and true is not None:
            both = tools.identity.images(pixels), tools.identity.images(as_model_pixels(true))
            scores["likeness_true"] = clip_t(*both).tolist()
        self._identity(pixels, scores)
        return self._views(pixels, scores)

    def _identity(self, pixels: Tensor, scores: dict[str, list[float]]) -> None:
        if self.verifier is None:
            return
        look = self.verifier.look(pixels)
        assert look.retrieved is not None
        scores["verified"] = look.passes([self.least] * len(pixels)).double().tolist()
        scores["recognised"] = look.retrieved.hits.double().tolist()
        scores["likeness"] = look.likeness.tolist()

    def _views(self, pixels: Tensor, scores: dict[str, list[float]]) -> Looks:
        if self.tools.attributes is None:  # only the toybox's own instruments estimate directions
            return Looks(scores)
        azimuths = self.around.azimuth_deg
        read = read_views(pixels)
        named = [sectors(a) for a in read.azimuths.tolist()]
        scores["view"] = [float(v) for v in agreeing(named, azimuths.tolist())]
        scores["view_recognizer"] = [float(v) for v in agreeing([{n} for n in read.names], azimuths.tolist())]
        scores["azimuth_error"] = turned_by(read.azimuths, azimuths).tolist()
        degrees = [str(round(a % 360)) for a in read.azimuths.tolist()]
        seen = [{"azimuth_deg": a, "view": n} for a, n in zip(degrees, read.names, strict=True)]
        return Looks(scores, seen, fronts(named, azimuths.tolist()))


def raised(toy: TrueToy, around: Cameras) -> list[Views]:
    """Renders the real object, to determine the threshold for similarity to the references. The renders use the
    azimuths of `around` at several elevations, each under different light."""
    found = []
    for number, elevation in enumerate(_ELEVATIONS_DEG, 1):
        higher = Cameras.of(around.azimuth_deg, elevation)
        found.append(toy.lit(higher, [number] * len(higher)))
    return found
