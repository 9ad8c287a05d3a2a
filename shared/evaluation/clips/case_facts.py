"""What is judged in clips, and what a report says beside its scores: instruments, costs, and what a reader must know."""

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
    """What is judged: a motion, a subject, or both; "" for what there is not."""

    motion: str = ""
    subject: str = ""
    class_noun: str = ""
    recipes: Mapping[str, str] = field(default_factory=dict)  # concept -> the recipe that it was learned by
    backbone: str = ""
    toy: bool = False  # made by a model of a world of its own
    acts_unnamed: bool = False  # the motion has no words: a clip that does not name it is the very same clip
    still_named: bool = False  # clips "with the motion not asked for" are told its name, and it is off
    ceiling: float | None = None  # how many true clips of the motion are recognised
    concepts: Sequence[Path] = ()  # their folders, for the size on disk
    training_seconds: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def unnamed_texts(self, texts: ClipTexts) -> list[str]:
        return texts.named if self.still_named else texts.unnamed


def costs(case: ClipCase, seconds: float, base_seconds: float) -> ClipCosts:
    """What a clip cost, and what the concepts take; seconds are of one clip."""
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
    """What was measured with."""
    infos = {i.name: i for i in (*scorer.instruments.infos(), scorer.whole.info)}  # one may serve for two things
    out = [
        Instrument(name=i.name, measures=i.measures, toybox=i.toybox, accuracy=dict(i.accuracy)) for i in infos.values()
    ]
    return [*out, Instrument(name="DIS optical flow (OpenCV)", measures="point tracks, dynamic degree")]


def notes(case: ClipCase, scorer: ClipScorer, texts: ClipTexts, seeds: Sequence[int]) -> list[str]:
    """What a reader must know to read the scores rightly."""
    tools = scorer.instruments
    out = [
        f"Frames are compared by {scorer.whole.info.name}: temporal consistency, leakage and spread are in its cosines."
    ]
    if case.motion and not scorer.motion_clips:
        out.append("The motion's clips were not given: fidelity to them and leakage are not measured.")
    if case.motion and (scorer.known is None or scorer.reader is None):
        why = "these are no clips of a motion of the toybox" if scorer.known is None else "nothing here reads paths"
        out.append(f"Whether the motion is recognised among its look-alikes is not measured: {why}.")
    if case.acts_unnamed:
        out.append(
            "The motion has no words of its own: it acts in every clip as long as it is loaded, named or not, so false "
            "motion is that of the clips with it."
        )
    if len(scorer.motion_clips) == 1:
        out.append("With one clip of the motion there is nothing to say how alike its clips are among each other.")
    if case.subject and scorer.thing is None:
        out.append("No CLIP and no DINO was given: whether the thing is the subject is not measured.")
    if tools.text_image is None:
        out.append("No CLIP was given: how well the prompt was followed is not measured.")
    if tools.attributes is None and any(texts.expects):
        out.append("No recognizer was given: the classes and backgrounds that the prompts ask for are not checked.")
    if len(seeds) < 2:
        out.append("With one seed per prompt, the spread over seeds is not measured.")
    return out
