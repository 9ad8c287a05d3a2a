"""Defines the schema of a recipe, whose slots are typed fields. `shared.recipe.resolve` finds and resolves recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from shared.attention import Attention
from shared.augment import Augment
from shared.backbones.protocol import Backbone
from shared.config import (
    NAME,
    BatchSize,
    GuidanceScale,
    Many,
    NameOrPath,
    Part,
    PathText,
    Seed,
    Side,
    Slot,
    Steps,
    default_kind,
    parts_of,
)
from shared.io.read_subject import read_subject
from shared.masks import Mask
from shared.modifiers import Modifier
from shared.modifiers.words import RareToken
from shared.noise import Noise
from shared.noise.times import Uniform
from shared.objective import Objective
from shared.optimizers import AdamW, Optimizer
from shared.prompts import Prompts, Templates
from shared.recipe.catalog import Taxonomy
from shared.recipe.tasks import TaskPart, TuneTask
from shared.regularize import Regularizer
from shared.sampling.hooks import check_points
from shared.sampling.settings import SamplingSettings
from shared.sources import Source
from shared.trainable import Trainable
from shared.trainable.base import MAIN
from shared.types import Subject

Group = Annotated[str, Field(pattern=NAME)]


def _nothing(value: Any) -> Any:
    return {} if value is None else value


MOST_PIXELS = 2**30  # in all pictures together (4096 pictures of 512x512), which take 12 GiB


def check_pixels(count_key: str, count: int, side_key: str, side: int | None) -> None:
    """Raises ValueError, naming both keys, if `count` square pictures of `side` pixels are too large together."""
    if side is not None and count * side**2 > MOST_PIXELS:
        raise ValueError(
            f"{count_key} = {count} with {side_key} = {side} needs {count * side**2:,} pixels at once, above the limit of "
            f"{MOST_PIXELS:,}; lower one of them"
        )


Overlay = Annotated[dict[str, Any], BeforeValidator(_nothing)]  # part of a recipe, applied on top of the rest


class SubjectSettings(Part):
    """The user's pictures of one subject."""

    images: PathText | tuple[PathText, ...]
    class_noun: str = ""
    masks: PathText | None = None  # a folder of masks with the same names as the pictures
    captions: PathText | None = None  # a folder of captions with the same names as the pictures

    def read(self) -> Subject:
        """Finds the files on disk. Raises ValueError in the same cases as `shared.io.read_subject.read_subject`."""
        images = self.images if isinstance(self.images, Path) else list(self.images)
        return read_subject(images, self.class_noun, self.masks, self.captions)


class Validation(Part):
    """Pictures or clips that are generated and scored during training to find the best state."""

    every: Steps = 0  # steps between validations; 0: no validation
    # prompts to generate from; {concept} stands for the concept's words
    prompts: tuple[str, ...] = ("a photo of a {concept}",)
    num: Many = 2  # pictures or clips per prompt
    keep_best: bool = True  # keep the state with the best score; false: keep the last state


class Train(Part):
    """The settings of the training loop."""

    steps: Steps = 500  # optimizer steps
    batch_size: BatchSize = 1  # examples per micro-batch
    gradient_accumulation: Many = 1  # micro-batches per step
    # whether to recompute activations in the backward pass, which saves memory at the cost of time
    gradient_checkpointing: bool = False
    # auto: bf16 if it is fast on the device; otherwise, fp16 on a GPU and "no" on a CPU
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    resolution: Side | None = None  # pixels; null: the backbone's default
    cache: bool = True  # whether to cache latents and text embeddings that do not vary
    # augmented versions of each picture, computed once and cached; 0: a new version at each step
    variants: Annotated[int, Field(ge=0, le=10_000)] = 0
    checkpoint_every: Steps = 200  # steps between checkpoints; 0: only at the end and on interruption
    optimizers: Annotated[dict[Group, Optimizer], parts_of("adamw")] = {MAIN: AdamW()}  # by group of trainable parts
    validation: Validation = Validation()

    @model_validator(mode="after")
    def _fits_in_memory(self) -> Train:
        check_pixels("train.batch_size", self.batch_size, "train.resolution", self.resolution)
        return self


class Sampling(Part):
    """Settings for generating pictures and clips, both during training and by default afterwards. null stands for the
    backbone's default."""

    steps: Many | None = None  # denoising steps
    guidance: GuidanceScale | None = None  # classifier-free guidance scale
    scheduler: str | None = None  # ddim, dpm++, euler, unipc …
    # the concept's strength by step, such as "0@0,1@0.2"; if empty, it is constant
    strength: Annotated[str, AfterValidator(check_points)] = ""

    def settings(self) -> SamplingSettings:
        """Returns the sampler's settings, without the strength schedule, which needs the concept's name."""
        return SamplingSettings("", self.guidance, self.steps, self.scheduler)

    def port(self, backbone: Backbone) -> str:
        """Describes how sampling on this model differs from the recipe, for the concept's record. Returns "" if
        there is no difference."""
        return ""


class PreviewSettings(Part):
    """The new pictures in a concept's `preview.png`, generated after the last step."""

    num: Annotated[int, Field(ge=0, le=1000)] = 4  # 0: no preview
    resolution: Side | None = None  # pixels; null: train.resolution, or else the backbone's default
    steps: Many | None = None  # denoising steps; null: sampling.steps, or else the backbone's default
    prompt: str = "a photo of a {concept}"  # {concept} stands for the concept's words

    @model_validator(mode="after")
    def _fits_in_memory(self) -> PreviewSettings:
        check_pixels("preview.num", self.num, "preview.resolution", self.resolution)
        return self


class Recipe(Part):
    """The resolved, typed description of how a concept is learned."""

    method: str = ""  # the recipe's name
    title: str = ""  # the method's name
    papers: tuple[str, ...] = ()  # links
    taxonomy: Taxonomy = Taxonomy()
    kind: Literal["subject", "style", "motion", "identity"] = "subject"  # what is learned

    subject: SubjectSettings | None = None  # the pictures to learn from
    subjects: dict[Annotated[str, Field(pattern=NAME)], SubjectSettings] = {}  # several subjects, by name
    backbone: NameOrPath = "toybox"  # the model: a folder, a file, a hub id or toybox
    output: PathText | None = None  # the concept's folder; for several subjects, the folder that contains all concepts
    name: Annotated[str, Field(pattern=NAME)] | None = None  # the concept's name; null: its folder's name
    seed: Seed = 0  # seed of all random numbers in the run

    sources: Slot[Source] = {"references": {"kind": "references"}}  # type: ignore[assignment]
    masks: Slot[Mask] = {}  # how masks are made or changed, by name
    augment: Slot[Augment] = {}  # how pictures are varied, by name
    prompts: Prompts = Templates()
    modifier: Annotated[Modifier, default_kind("rare_token")] = RareToken()
    trainable: Slot[Trainable] = {}  # what is trained, by name
    attention: Slot[Attention] = {}  # changes to the model's attention; the same in all phases
    noise: Annotated[Noise, default_kind("uniform")] = Uniform()
    objective: Objective = Objective()
    regularize: Slot[Regularizer] = {}  # penalties, by name
    train: Train = Train()
    sampling: Sampling = Sampling()
    preview: PreviewSettings = PreviewSettings()
    task: TaskPart = TuneTask()  # what a run, or each of its phases, does
    phases: Annotated[dict[str, Overlay], BeforeValidator(_nothing)] = {}  # by name, run in order

    def opening(self) -> dict[str, Any]:
        """Returns the arguments that a runner needs, besides the backbone's name, to open the backbone."""
        return {}

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Recipe:
        if self.subject is not None and self.subjects:
            raise ValueError("set either subject.* or subjects.NAME.*, not both")
        needs = [k for k, r in self.regularize.items() if r.needs_class_examples]
        if needs and not any(source.gives == "prior" for source in self.sources.values()):
            raise ValueError(
                f"regularize.{needs[0]} needs class pictures: add sources.class_pictures.kind=generated "
                "(generated by the base model) or =folder (your own)"
            )
        return self


def dump(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe as plain data; `validate(type(recipe), dump(recipe))` restores it."""
    return recipe.model_dump(mode="json", by_alias=True)
