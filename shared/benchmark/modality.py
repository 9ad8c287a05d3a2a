"""The interface between `pcs concept evaluate` and the packages that generate pictures, clips or assets for it.

A package registers an entry point in the `pcs.cross_modal` group. The entry point is named after the modality, and its value
is a module with two functions: `check(asked)` rejects a concept that the modality cannot show, and `make(asked, bars)`
returns `Made`. Packages generate but do not score, so that identity is defined in only one place (`cross_modal_scores`).
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
    """A request for an evaluation across modalities. `out` is the report's folder."""

    concept: str  # PATH or PATH:STRENGTH
    out: Path
    prompts: str = ""  # a prompt set or a file; if empty, the first prompts of the model's default set
    limit: int = 4  # number of prompts
    seeds: tuple[int, ...] = (0, 1)
    steps: int | None = None  # denoising steps; if None, as in the concept's recipe
    motion: str | None = None  # a motion concept for the clips, PATH or PATH:STRENGTH
    motion_adapter: Path | None = None
    asset_recipe: str = "texture_refinement"
    asset_settings: tuple[str, ...] = ()  # key=value applied on top of `asset_recipe`
    floor: bool = False  # also generate everything without the concept
    judged: EvaluationSettings = field(default_factory=EvaluationSettings)  # references, gallery, clip, dino
    backbone: str | None = None
    device: str | None = None
    download: bool = False

    @cached_property
    def read(self) -> Concept:
        return read(parse_concept(self.concept)[0])

    def inside(self, folder: str) -> Asked:
        """Returns a copy whose `out` is a new folder inside the report's."""
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
        """The synthetic world that the model was trained on, or None for the real world."""
        return WORLDS.get(str(model_asked_for(self.backbone, [self.concept])))

    @cached_property
    def subject(self) -> Subject:
        """The concept's reference pictures. Raises ValueError if they are missing."""
        return find_references(self.read, parse_concept(self.concept)[0], self.judged.references)

    @cached_property
    def standard(self) -> PromptSet:
        """The first `limit` prompts for pictures and clips. By default, they come from the model's own prompt set, without
        the prompts that specify anything besides the background. No prompt leaves the pose open, because freedom is not
        measured across modalities."""
        found = load_prompts(self.prompts or (self.world.prompts if self.world else REAL), self.class_noun)
        plain = [p for p in found.prompts if self.prompts or (p.free and set(p.expects) <= {"background"})]
        chosen = tuple(p.model_copy(update={"pose_open": False}) for p in plain[: self.limit])
        return found.model_copy(update={"prompts": chosen, "drift": ()})


@dataclass(frozen=True)
class Shot:
    """One output: a picture, a clip, or an asset viewed from several angles."""

    text: str  # the prompt as passed to the model
    plain: str  # the prompt with the class noun instead of the concept
    seed: int
    frames: Tensor  # [F, 3, H, W] in [-1, 1]
    expects: Mapping[str, str] = field(default_factory=dict)  # attributes that the prompt itself asks for
    file: Path | None = None  # a PNG or an animated WebP in the report's folder
    more: Mapping[str, Path] = field(default_factory=dict)  # link text -> file


@dataclass(frozen=True)
class Made:
    """Everything that a modality generated.

    case: the references and look-alikes with which the frames are compared
    true: two sets of renders of the real subject, shown as this modality shows it. The first, [N, 3, H, W], sets the
        threshold, and the second, [M, 3, H, W], is compared with it. If None, true pictures are drawn for the shots'
        prompts, provided that the model's world can draw them
    """

    case: Case
    shots: Sequence[Shot]
    floor: Sequence[Shot] = ()  # shots generated without the concept
    true: tuple[Tensor, Tensor] | None = None
    seconds: float | None = None  # per shot


class Modality(Protocol):
    """The interface of the module that a package registers."""

    def check(self, asked: Asked) -> None:
        """Raises ValueError if this modality cannot show the concept, or if its settings are wrong."""
        ...

    def make(self, asked: Asked, bars: Bars) -> Made:
        """Generates the modality's shots."""
        ...
