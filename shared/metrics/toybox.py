"""Loads the toybox's own instruments and their measured accuracy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.metrics.encoders import (
    CARD_KEYS,
    TEXT_AND_LIKENESS,
    ClipEncoder,
    CropSettings,
    ImageEncoder,
    InstrumentInfo,
    Instruments,
    Typical,
    resize01,
)
from shared.metrics.true_thing import Known

CALIBRATION = "calibration.json"  # in the weights folder


class ToyboxIdentity:
    """The toybox's identity encoder as an `ImageEncoder`."""

    def __init__(self, model: Any, info: InstrumentInfo) -> None:
        self.model, self.info = model, info

    def images(self, pixels: Tensor) -> Tensor:
        return self.model.embed(resize01(pixels, 64))


class ToyboxFeatures:
    """An `ImageEncoder` whose embeddings are the features that the recognizer computes before its heads."""

    def __init__(self, model: Any, info: InstrumentInfo) -> None:
        self.model, self.info = model, info

    def images(self, pixels: Tensor) -> Tensor:
        return self.model.embed(resize01(pixels, 64))


class ToyboxReader:
    """The toybox's recognizer, which reads `class`, `main`, `second`, `background`, `view`, `accessory` and `style`."""

    def __init__(self, model: Any, info: InstrumentInfo) -> None:
        self.model, self.info = model, info

    def read(self, pixels: Tensor) -> dict[str, list[str]]:
        return self.model.predict(resize01(pixels, 64))

    def chances(self, pixels: Tensor, asked: Sequence[Mapping[str, str]]) -> list[dict[str, float]]:
        found, values = self.model.probabilities(resize01(pixels, 64)), self.model.config.values
        return [{k: float(found[k][i, values[k].index(v)]) for k, v in of.items()} for i, of in enumerate(asked)]

    def where(self, pixels: Tensor) -> Tensor:
        return self.model.where(resize01(pixels, 64))

    def faces(self, pixels: Tensor) -> Tensor:
        """Returns whether each picture is a front or side view. From behind and from above, only hair is visible."""
        from shared.toybox.evaluators.recognizer import FACE_VIEWS

        return torch.tensor([view in FACE_VIEWS for view in self.read(pixels)["view"]], dtype=torch.bool)


def load_toybox() -> Instruments:
    """Loads the shipped evaluators. If one is missing, raises FileNotFoundError with the command to train it."""
    from shared.toybox.evaluators.clip import load_clip as toybox_clip
    from shared.toybox.evaluators.identity import load_identity
    from shared.toybox.evaluators.recognizer import load_recognizer

    card = toybox_accuracy()
    model, processor = toybox_clip()

    def info(name: str, title: str, measures: str, **more: Any) -> InstrumentInfo:
        return InstrumentInfo(title, measures, True, card.get(name, {}), fingerprint=_fingerprint(name), **more)

    # Between a picture and its caption, this small CLIP's cosines (up to 0.8) are larger than those of OpenAI's CLIP
    # (0.3 on average), so they need no factor.
    text = info("clip", "toybox CLIP", TEXT_AND_LIKENESS, text_weight=1.0)
    who = info("identity", "toybox identity encoder", "which individual thing it is")
    what = info("recognizer", "toybox recognizer", "background, view, accessory, style")
    clip = ClipEncoder(model, processor.image_processor, processor.tokenizer, text)
    reader = ToyboxReader(load_recognizer(), what)
    identity = ToyboxIdentity(load_identity(), who)
    found = Instruments(clip, identity, reader, locator=reader, face_finder=reader)
    measured = calibration()
    if not measured:
        return found
    return replace(
        found,
        pose=pose_encoders(found)[measured["encoder"]],
        crops=CropSettings(**measured["crops"]),
        typical=Typical(**measured["typical"]),
    )


def pose_encoders(found: Instruments) -> dict[str, ImageEncoder]:
    """Returns the candidate encoders for telling poses apart in crops, by name. `pcs toybox calibrate` tries each."""
    assert isinstance(found.attributes, ToyboxReader) and found.text_image is not None and found.identity is not None
    seen = ToyboxFeatures(found.attributes.model, found.attributes.info)
    return {"clip": found.text_image, "identity": found.identity, "recognizer": seen}


def calibration() -> dict[str, Any]:
    """Reads the output of `pcs toybox calibrate`: the `encoder` that compares poses, the `crops` it uses, and the
    `typical` readings. Returns an empty dictionary if the command has not been run."""
    from shared.toybox.evaluators.convnet import WEIGHTS

    path = WEIGHTS / CALIBRATION
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _fingerprint(name: str) -> str:
    from shared.toybox.evaluators.convnet import WEIGHTS, WEIGHTS_FILE

    return hashlib.sha256((WEIGHTS / name / WEIGHTS_FILE).read_bytes()).hexdigest()


class ToyboxThing:
    """A `TrueThing` drawn by the toybox."""

    def __init__(self, thing: Any, split: str) -> None:
        from shared.toybox.true_renders import drawing_code

        self.thing, self.split = thing, split
        self.key = f"{thing!r} {split} {drawing_code()}"

    def pictures(self, asked: Sequence[Mapping[str, str]], seed: int, pose: int | None = None) -> Tensor:
        from shared.toybox.true_renders import asked_pictures

        return asked_pictures(self.thing, asked, seed, pose, self.split)


def toybox_known(files: Sequence[Path]) -> Known | None:
    """Returns what the toybox knows about the held-out thing whose reference pictures are `files`. Returns None if
    `files` are not the reference pictures of any held-out thing."""
    from shared.toybox import reference_sets

    held = reference_sets.shown_in(files)
    if held is None:
        return None
    true = ToyboxThing(held.thing, held.name.split("-")[0])
    return Known(reference_sets.gallery(held), reference_sets.fresh(held), true)


def toybox_accuracy(card: Path | None = None) -> dict[str, dict[str, float]]:
    """Reads `{instrument: {what: accuracy}}` from the toybox's `card.json`. Returns an empty dictionary if there is no
    such file. Accuracies on VAE reconstructions are preferred where they were measured, because generated pictures are
    also decoded by the VAE.
    """
    from shared.toybox.evaluators.convnet import WEIGHTS

    path = card or WEIGHTS / "card.json"
    if not path.is_file():
        return {}
    measured = json.loads(path.read_text("utf-8")).get("accuracies", {})
    accuracies: dict[str, dict[str, float]] = {}
    for name, keys in CARD_KEYS.items():
        ways = measured.get(name, {})
        values = ways.get("vae") or ways.get("clean") or {}
        by_label = {label.removesuffix("_shown"): float(values[k]) for k, label in keys.items() if k in values}
        accuracies[name.removesuffix("_reporting")] = by_label
    return accuracies
