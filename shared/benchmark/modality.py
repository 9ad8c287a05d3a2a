"""What a package makes of a concept in `pcs concept evaluate`, and what it is asked for.

A package offers its part by an entry point `pcs.cross_modal`, named by the modality, whose value is a module with two
functions: `check(asked)`, which refuses a concept that the modality cannot carry, and `make(asked, bars)`, which makes
`Made`. It makes and does not judge: what identity is, is decided once (`cross_modal_scores`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from shared.backbones.load import WORLDS
from shared.concept import Concept, read
from shared.evaluation.prompt_sets import REAL, PromptSet, load_prompts
from shared.evaluation.report_facts import Case
from shared.runner.bars import Bars
from shared.runner.judging import EvaluationSettings, find_references
from shared.runner.open_runner import model_asked_for, parse_concept
from shared.types import Subject


@dataclass(frozen=True)
class Asked:
    """What is made, and how; `out` is the folder of the report."""

    concept: str  # PATH or PATH:STRENGTH
    out: Path
    prompts: str = ""  # a prompt set or a file; "": the first plain prompts of the model's own set
    limit: int = 4  # prompts
    seeds: tuple[int, ...] = (0, 1)
    steps: int | None = None  # denoising steps; None: as the concept was learned
    motion: str | None = None  # a motion's concept for the clips, PATH or PATH:STRENGTH
    motion_adapter: Path | None = None
    asset_recipe: str = "texture_refinement"
    asset_settings: tuple[str, ...] = ()  # key=value laid on it
    floor: bool = False  # make everything without the concept, too
    judged: EvaluationSettings = field(default_factory=EvaluationSettings)  # references, gallery, clip, dino
    backbone: str | None = None
    device: str | None = None
    download: bool = False

    @cached_property
    def read(self) -> Concept:
        return read(parse_concept(self.concept)[0])

    def inside(self, folder: str) -> Asked:
        """The same, into a new folder of the report's."""
        (self.out / folder).mkdir()
        return replace(self, out=self.out / folder)

    @property
    def name(self) -> str:
        return self.read.meta.name

    @property
    def class_noun(self) -> str:
        return self.read.meta.class_noun

    @cached_property
    def world(self) -> Any:
        """What the model has of a world of its own; None where it has none."""
        return WORLDS.get(str(model_asked_for(self.backbone, [self.concept])))

    @cached_property
    def subject(self) -> Subject:
        """Its pictures. ValueError when they are not to be found."""
        return find_references(self.read, parse_concept(self.concept)[0], self.judged.references)

    @cached_property
    def standard(self) -> PromptSet:
        """The prompts of pictures and clips: of the model's own set those that say only where the thing is. How free poses
        are is not asked here."""
        found = load_prompts(self.prompts or (self.world.prompts if self.world else REAL), self.class_noun)
        plain = [p for p in found.prompts if self.prompts or (p.free and set(p.expects) <= {"background"})]
        chosen = tuple(p.model_copy(update={"pose_open": False}) for p in plain[: self.limit])
        return found.model_copy(update={"prompts": chosen, "drift": ()})


@dataclass(frozen=True)
class Shot:
    """One thing that was made: a picture, a clip, an asset from several sides."""

    text: str  # as the model was told
    plain: str  # in plain words
    seed: int
    frames: Tensor  # [F, 3, H, W] in [-1, 1]
    expects: Mapping[str, str] = field(default_factory=dict)  # what the prompt itself asks for
    file: Path | None = None  # a PNG or an animated WebP in the report's folder
    more: Mapping[str, Path] = field(default_factory=dict)  # what a link says -> where it leads


@dataclass(frozen=True)
class Made:
    """All that a modality made. case: what its frames are compared with; true: renders of the true thing as this modality
    shows it, [N, 3, H, W] that set the bar and [M, 3, H, W] that are held against it (None: pictures under the shots'
    prompts, where a world can draw them)."""

    case: Case
    shots: Sequence[Shot]
    floor: Sequence[Shot] = ()  # without the concept
    true: tuple[Tensor, Tensor] | None = None
    seconds: float | None = None  # that one took


class Modality(Protocol):
    """What a package's module offers."""

    def check(self, asked: Asked) -> None:
        """ValueError for what this modality cannot make of the concept, and for settings of it that are wrong."""
        ...

    def make(self, asked: Asked, bars: Bars) -> Made:
        """Makes it."""
        ...
