"""The recipe for clips, which extends the recipe for pictures with clip sources and motion parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pcs_video.motion.alternate import AlternateTask
from pcs_video.motion.appearance_debias import AppearanceDebias
from pcs_video.motion.clip_source import Clips
from pcs_video.motion.dual_path import DualPathTask
from pcs_video.motion.frozen_clips import FrozenClips
from pcs_video.motion.generated_clips import GeneratedClips
from pcs_video.motion.motion_embeddings import MotionEmbeddings
from shared.backbones.protocol import Backbone
from shared.config import NAME, NameOrPath, PathText, Slot, default_kind, slots
from shared.io.clips.find_clips import find_clips
from shared.io.noise_prior_settings import NoisePriorSettings
from shared.io.read_subject import plain_noun
from shared.io.trajectory_settings import Trajectory
from shared.recipe.phases import expand_phases
from shared.recipe.schema import Recipe, Sampling, SubjectSettings
from shared.recipe.tasks import GenerateTask, TuneTask, named
from shared.regularize import Regularizer
from shared.sampling.settings import SamplingSettings
from shared.sources import Source
from shared.trainable import Trainable
from shared.types import Subject

ClipSource = Annotated[Source | Clips | FrozenClips | GeneratedClips, Field(discriminator="kind")]
ClipRegularizer = Annotated[Regularizer | AppearanceDebias, Field(discriminator="kind")]
ClipTrainable = Annotated[Trainable | MotionEmbeddings, Field(discriminator="kind")]
ClipTask = Annotated[
    TuneTask | GenerateTask | DualPathTask | AlternateTask,
    Field(discriminator="kind"),
    default_kind("tune"),
    BeforeValidator(named),
]


class ClipSubject(SubjectSettings):
    """The user's clips of a motion, or the user's pictures of a subject."""

    images: PathText | tuple[PathText, ...] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    clips: PathText | tuple[PathText, ...] | None = None

    @model_validator(mode="after")
    def _one_medium(self) -> ClipSubject:
        if (self.images is None) == (self.clips is None):
            raise ValueError("give either clips (of a motion) or images (of a subject)")
        return self

    def read(self) -> Subject:
        """Finds the files on disk. Raises ValueError under the same conditions as `find_clips` and `read_subject`."""
        if self.clips is None:
            return super().read()
        found = find_clips(self.clips, self.masks, self.captions)
        return Subject((), plain_noun(self.class_noun), found.captions, found.masks, found.clips)


class ClipSampling(Sampling):
    """How clips are generated, during training and by default afterwards. null means the backbone's own setting."""

    frames: Annotated[int, Field(ge=0, le=4096)] | None = None  # frames per clip while learning; 0 for pictures
    trajectory: Trajectory | None = None  # the path of clips whose prompts name the motion; null for none
    # after training, clips whose prompts name the motion start from noise that is taken in part from the motion's first
    # training clip, if that clip is found; clips generated during training start from random noise
    noise_prior: NoisePriorSettings | None = None

    def settings(self) -> SamplingSettings:
        """Returns the sampler's settings, without the strength schedule."""
        return replace(super().settings(), frames=self.frames)

    def port(self, backbone: Backbone) -> str:
        path = self.trajectory
        if path is None or path.layers == "all" or backbone.frames_apart:
            return ""
        return (
            f"sampling.trajectory.layers: {backbone.family} has no separate motion layers, so all its layers are used"
        )


class VideoRecipe(Recipe):
    """The resolved, typed description of how a motion, or a subject for clips, is learned."""

    subject: ClipSubject | None = None  # the clips or pictures to learn from
    subjects: dict[Annotated[str, Field(pattern=NAME)], ClipSubject] = {}  # several subjects, by name
    # a folder with a diffusers `MotionAdapter`; null for the backbone's own; "none" for no motion modules, in which
    # case subjects move only along trajectories
    motion_adapter: NameOrPath | None = None
    sources: Slot[ClipSource] = {"clips": {"kind": "clips"}}  # type: ignore[assignment]
    trainable: Slot[ClipTrainable] = {}  # the trained parts, by name
    regularize: Slot[ClipRegularizer] = {}  # penalties, by name
    sampling: ClipSampling = ClipSampling()
    task: ClipTask = TuneTask()

    def opening(self) -> dict[str, Any]:
        """Returns the options for opening the backbone, except for its name. Warns if clips have different frame rates,
        because a network that is conditioned on the frame rate then uses its default rate."""
        rates = {part.window.fps / part.window.stride for part in clip_sources(self) if part.window.fps is not None}
        how = {} if self.motion_adapter is None else {"motion_adapter": self.motion_adapter}
        if len(rates) > 1:
            listed = ", ".join(f"{rate:g}" for rate in sorted(rates))
            warnings.warn(
                f"clips have different frame rates ({listed} per second), so a model conditioned on the rate "
                "uses its default",
                stacklevel=2,
            )
        return {**how, "fps": rates.pop()} if len(rates) == 1 else how


def clip_sources(recipe: Recipe) -> list[Clips]:
    """Returns the sources that read clips, in all phases of a recipe."""
    return [part for _, phase in expand_phases(recipe) for part in phase.sources.values() if isinstance(part, Clips)]


def check_lengths(recipe: Recipe, check: Callable[[int], object]) -> None:
    """Raises ValueError, naming the setting, if `check` rejects a frame count that the recipe or one of its parts sets."""
    for _, phase in expand_phases(recipe):
        for key, frames in _frame_counts(phase).items():
            try:
                check(frames)
            except ValueError as error:
                raise ValueError(f"{key} = {frames}: {error}") from None


def _frame_counts(recipe: Recipe) -> dict[str, int]:
    parts = {f"{slot}.{name}": part for slot in slots(type(recipe)) for name, part in getattr(recipe, slot).items()}
    found = {f"{where}.{key}": frames for where, part in parts.items() for key, frames in part.frame_counts.items()}
    if isinstance(recipe.sampling, ClipSampling) and recipe.sampling.frames:
        found["sampling.frames"] = recipe.sampling.frames
    return found
