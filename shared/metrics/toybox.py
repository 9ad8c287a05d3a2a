"""The toybox's own instruments, and how far they are to be believed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from shared.metrics.encoders import CARD_KEYS, TEXT_AND_LIKENESS, ClipEncoder, InstrumentInfo, Instruments, resize01


class ToyboxIdentity:
    """The toybox's identity encoder behind the common interface."""

    def __init__(self, model: Any, info: InstrumentInfo) -> None:
        self.model, self.info = model, info

    def images(self, pixels: Tensor) -> Tensor:
        return self.model.embed(resize01(pixels, 64))


class ToyboxReader:
    """The toybox's recognizer: class, main, second, background, view, accessory, style."""

    def __init__(self, model: Any, info: InstrumentInfo) -> None:
        self.model, self.info = model, info

    def read(self, pixels: Tensor) -> dict[str, list[str]]:
        return self.model.predict(resize01(pixels, 64))


def load_toybox() -> Instruments:
    """The shipped evaluators. FileNotFoundError says how to make one that is missing."""
    from shared.toybox.evaluators.clip import load_clip as toybox_clip
    from shared.toybox.evaluators.identity import load_identity
    from shared.toybox.evaluators.recognizer import load_recognizer

    card = toybox_accuracy()
    model, processor = toybox_clip()
    # This small CLIP's cosines are larger (of a picture and its caption 0.3 in the mean, up to 0.8): taken as they are.
    text = InstrumentInfo("toybox CLIP", TEXT_AND_LIKENESS, True, card.get("clip", {}), text_weight=1.0)
    who = InstrumentInfo("toybox identity encoder", "which individual thing it is", True, card.get("identity", {}))
    what = InstrumentInfo("toybox recognizer", "background, view, accessory, style", True, card.get("recognizer", {}))
    return Instruments(
        ClipEncoder(model, processor.image_processor, processor.tokenizer, text),
        ToyboxIdentity(load_identity(), who),
        ToyboxReader(load_recognizer(), what),
    )


def toybox_look_alikes(files: Sequence[Path]) -> tuple[dict[str, Tensor] | None, Tensor | None]:
    """The look-alikes of the held-out thing that an album shows, and new renders of it; None twice for other pictures."""
    from shared.toybox import reference_sets

    known = reference_sets.shown_in(files)
    return (reference_sets.gallery(known), reference_sets.fresh(known)) if known else (None, None)


def toybox_accuracy(card: Path | None = None) -> dict[str, dict[str, float]]:
    """`{instrument: {what: accuracy}}` from the toybox's `card.json`, after the VAE's round trip where it was measured
    (generated pictures have made it too); empty where there is no card.
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
