"""Scores clips during training, and warns when training stops a model from generating motion."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from shared.backbones import Backbone
from shared.metrics.clips.scorer import ClipScorer
from shared.metrics.scorer import Scorer
from shared.recipe.phases import expand_phases
from shared.runner.judging import FIRST_SEED, makes_previews, references
from shared.runner.judging_clips import clip_instruments
from shared.runner.plan import Plan
from shared.runner.training_clips import read_motion
from shared.sampling.sampler import sample_all
from shared.types import Subject

ALARM = 0.5  # a warning is issued if at least this fraction of the clips that would otherwise move stand still

Make = Callable[[Sequence[str]], Tensor]  # prompts without the concept's name -> clips [N, 3, F, H, W] in [-1, 1]


@dataclass(frozen=True)
class Watched:
    """A scorer that warns when training causes clips to stand still.

    Small models, including the toybox, generate some still clips even without the concept that is being learned. The
    share of still clips is therefore compared with the share among the clips that `base` generates without this
    concept. `base` is called at most once per list of prompts, and only if so many clips stand still that a warning is
    possible.
    """

    scorer: ClipScorer
    name: str
    base: Make
    _before: dict[tuple[str, ...], float] = field(default_factory=dict)

    def __call__(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Scores clips as `ClipScorer` does. Issues a UserWarning if at least half of the clips that would move without
        the concept stand still."""
        scores = self.scorer(clips, prompts)
        now = scores["frozen"]
        before = self._still_before(prompts) if now >= ALARM else 0.0
        if before < 1 and (now - before) / (1 - before) >= ALARM:
            warnings.warn(
                f"nothing moves in {now:.0%} of the clips generated while {self.name} is being learned, compared with "
                f"only {before:.0%} of those generated without {self.name}; training may be too long, or its "
                "learning rate may be too high",
                stacklevel=2,
            )
        return scores

    def _still_before(self, prompts: Sequence[str]) -> float:
        key = tuple(prompts)
        if key not in self._before:
            self._before[key] = ClipScorer().measure(self.base(key), key).mean("frozen")
        return self._before[key]


def clip_training_scorers(
    planned: Plan, backbone: Backbone, clip: Path | None, dino: Path | None
) -> dict[str, Watched] | None:
    """Returns one scorer per subject or motion for the clips generated during training, or None if no clips are
    generated.

    The scorers use only the clips and pictures that the concepts are learned from, and they do not recognize motions,
    because the best checkpoint must not be chosen by the scores that judge the finished concept.
    """
    if not makes_previews(planned, clip, dino):
        return None
    tools = clip_instruments(backbone, clip, dino)
    side, recipe = backbone.resolution, planned.recipe.model_dump(mode="json")

    def scorer(name: str, subject: Subject) -> ClipScorer:
        if subject.clips:
            clips = [read_motion(path, recipe, side) for path in subject.clips]
            return ClipScorer(tools, clips, same_subject=planned.recipe.kind != "motion")
        if tools.identity is None:
            return ClipScorer(tools)
        return ClipScorer(tools, thing=Scorer(references(subject, side), tools, subject.class_noun, name))

    base = _base(planned, backbone)
    return {name: Watched(scorer(name, subject), name, base) for name, subject in planned.subjects.items()}


def _base(planned: Plan, backbone: Backbone) -> Make:
    """Returns a function that generates clips as during training, but only with the adapters that are attached now."""
    loaded = {name: strength for name, strength in backbone.strengths.items() if name in backbone.adapters}
    phases = [phase for _, phase in expand_phases(planned.recipe)]
    phase = next((phase for phase in phases if phase.train.validation.every), phases[-1])
    side = phase.train.resolution or backbone.resolution
    settings = replace(phase.sampling.settings(), height=side, width=side)

    def make(prompts: Sequence[str]) -> Tensor:
        with backbone.active(loaded):
            seeds = range(FIRST_SEED, FIRST_SEED + len(prompts))
            return sample_all(backbone, prompts, seeds=seeds, settings=settings)

    return make
