"""Scores clips during training, and warns when a model no longer generates motion."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from shared.backbones import Backbone
from shared.metrics.clips.scorer import ClipScorer
from shared.metrics.scorer import Scorer
from shared.runner.judging import makes_previews, references
from shared.runner.judging_clips import clip_instruments, read_motion
from shared.runner.plan import Plan
from shared.types import Subject

ALARM = 0.5  # the fraction of still clips that triggers the warning


@dataclass(frozen=True)
class Watched:
    """A scorer that warns when at least half of the clips show no motion."""

    scorer: ClipScorer
    name: str

    def __call__(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Scores clips as `ClipScorer` does, with a UserWarning if `frozen` is 0.5 or more."""
        scores = self.scorer(clips, prompts)
        if scores["frozen"] >= ALARM:
            warnings.warn(
                f"nothing moves in {scores['frozen']:.0%} of the clips generated while {self.name} is learned: training may "
                "be too long or its learning rate too high, or the model may not be a clip model",
                stacklevel=2,
            )
        return scores


def clip_training_scorers(
    planned: Plan, backbone: Backbone, clip: Path | None, dino: Path | None
) -> dict[str, Watched] | None:
    """Returns one scorer per subject or motion for the clips generated during training; None if there are none.

    The scorers use only the clips and pictures that are learned from, and do not recognise motions: the best checkpoint must
    not be chosen by the scores that judge the finished concept.
    """
    if not makes_previews(planned, clip, dino):
        return None
    tools = clip_instruments(backbone, clip, dino)
    side, recipe = backbone.resolution, planned.recipe.model_dump(mode="json")

    def scorer(name: str, subject: Subject) -> ClipScorer:
        if subject.clips:
            return ClipScorer(tools, [read_motion(path, recipe, side) for path in subject.clips])
        if tools.identity is None:
            return ClipScorer(tools)
        return ClipScorer(tools, thing=Scorer(references(subject, side), tools, subject.class_noun, name))

    return {name: Watched(scorer(name, subject), name) for name, subject in planned.subjects.items()}
