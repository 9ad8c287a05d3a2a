"""Describes what is evaluated in clips, and what a report states besides scores: instruments, costs, and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shared.evaluation.clips.prompt_sets import ClipTexts
from shared.metrics.clips.report import ClipCosts
from shared.metrics.clips.scorer import ClipScorer
from shared.metrics.report import Instrument
from shared.train.costs import peak_memory


@dataclass(frozen=True)
class ClipCase:
    """The motion, subject, or both, to evaluate. The name of the motion or subject is "" if it is not evaluated."""

    motion: str = ""
    subject: str = ""
    class_noun: str = ""
    recipes: Mapping[str, str] = field(default_factory=dict)  # concept -> the recipe it was learned with
    backbone: str = ""
    toy: bool = False  # whether a model of a toy world generates the clips
    acts_unnamed: bool = False  # whether the motion has no words, so leaving its name out of a prompt changes nothing
    still_named: bool = False  # whether prompts name the motion even in clips generated with the motion switched off
    ceiling: float | None = None  # the share of true clips of the motion that are recognised
    concepts: Sequence[Path] = ()  # the concepts' folders, for their size on disk
    training_seconds: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def unnamed_texts(self, texts: ClipTexts) -> list[str]:
        return texts.named if self.still_named else texts.unnamed


def costs(case: ClipCase, seconds: float, base_seconds: float) -> ClipCosts:
    """Returns the costs of a clip and of the concepts. `seconds` and `base_seconds` are per clip."""
    gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    peak, of = peak_memory(torch.device("cuda" if gpu else "cpu"))
    files = [f for folder in case.concepts for f in ([folder] if folder.is_file() else folder.rglob("*"))]
    return ClipCosts(
        seconds_per_clip=seconds,
        base_seconds_per_clip=base_seconds,
        training_seconds=case.training_seconds,
        peak_memory=peak,
        peak_memory_of=of,
        concept_bytes=sum(f.stat().st_size for f in files if f.is_file()) or None,
    )


def instruments(scorer: ClipScorer) -> list[Instrument]:
    """Returns the instruments that were used."""
    infos = {i.name: i for i in (*scorer.instruments.infos(), scorer.whole.info)}  # one encoder may measure two scores
    out = [
        Instrument(name=i.name, measures=i.measures, toybox=i.toybox, accuracy=dict(i.accuracy)) for i in infos.values()
    ]
    return [*out, Instrument(name="DIS optical flow (OpenCV)", measures="point tracks, dynamic degree")]


def notes(case: ClipCase, scorer: ClipScorer, texts: ClipTexts, seeds: Sequence[int]) -> list[str]:
    """Returns the caveats that a reader needs to interpret the scores."""
    tools = scorer.instruments
    out = [
        f"Frames are compared with {scorer.whole.info.name}, whose cosines give temporal consistency, leakage and spread."
    ]
    if case.motion and not scorer.motion_clips:
        out.append("The motion's clips were not given, so motion fidelity and leakage are not measured.")
    if case.motion and (scorer.known is None or scorer.reader is None):
        why = "the motion is not one of the toybox's" if scorer.known is None else "there is no path reader"
        out.append(f"Whether the motion is recognised among its look-alikes is not measured, because {why}.")
    if case.acts_unnamed:
        out.append(
            "The motion has no words of its own and acts in every clip while it is loaded, so false motion is measured on "
            "the clips generated with it."
        )
    if len(scorer.motion_clips) == 1:
        out.append("Only one clip of the motion was given, so it is unknown how similar its clips are to each other.")
    if case.subject and scorer.thing is None:
        out.append("Neither CLIP nor DINO was given, so whether clips show the subject is not measured.")
    if case.subject and scorer.thing is not None and tools.locator is None:
        out.append(
            "No instrument locates the subject in a frame, so likeness is measured on whole frames, including the surroundings."
        )
    if tools.text_image is None:
        out.append("No CLIP was given, so how well the prompt was followed is not measured.")
    if tools.attributes is None and any(texts.expects):
        out.append(
            "No recognizer was given, so whether clips show the prompts' classes and backgrounds is not checked."
        )
    if len(seeds) < 2:
        out.append("With one seed per prompt, the spread over seeds is not measured.")
    return out
