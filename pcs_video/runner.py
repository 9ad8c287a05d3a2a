"""The public interface of `pcs_video`, for the command line and for Python code. Its runner learns, generates and
evaluates."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcs_video.backbones.frame_grid import frame_check
from pcs_video.backbones.open_motion import with_motion_adapter
from pcs_video.backbones.picture_clips import PictureClipsBackbone
from pcs_video.hooks_of_motions import (
    MOTION_MODULES,
    HookOfMotion,
    follows,
    hooks_for_prompt,
    hooks_of_motions,
    is_of_motion,
    is_trajectory,
)
from pcs_video.motion.alternate import Alternate, AlternateTask
from pcs_video.motion.clip_source import Clips
from pcs_video.motion.dual_path import DualPath, DualPathTask
from pcs_video.motion.follow_trajectory import ByFrame, FollowTrajectory
from pcs_video.motion.motion_embeddings import MotionEmbeddings
from pcs_video.motion.trajectory import measure, one_motion
from pcs_video.recipe import check_lengths, clip_sources
from shared.backbones import Backbone
from shared.concept import Concept
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from shared.io.contact_sheets import stills
from shared.io.denoising_progress import Steps, part_of
from shared.io.trajectory_settings import Trajectory
from shared.metrics.clips.report import ClipReport
from shared.recipe.phases import expand_phases
from shared.recipe.schema import Recipe
from shared.runner.base import Runner, attached
from shared.runner.clip_scorers import clip_training_scorers
from shared.runner.judging_clips import ClipEvaluationSettings, evaluate_clips_loaded
from shared.runner.loaded_concepts import Loaded
from shared.runner.plan import Plan
from shared.sampling.settings import SamplingSettings
from shared.trainable.base import OnRoles
from shared.types import Subject

__all__ = ["VideoRunner", "attached"]


class VideoRunner(Runner):
    """A backbone and the concepts attached to it. It generates clips [N, 3, F, H, W] in [-1, 1]."""

    tasks = {**Runner.tasks, DualPathTask: DualPath, AlternateTask: Alternate}
    scorers = staticmethod(clip_training_scorers)
    makes = "clips"
    uses_motions = True
    families = (frozenset({"animatediff", "stable_diffusion"}), frozenset({"wan"}), frozenset({"ltx"}))

    @classmethod
    def prepared(
        cls, backbone: Backbone, motion_adapter: str | Path | None = None, fps: float | None = None
    ) -> Backbone:
        """Returns a backbone that generates clips. If `backbone` generates only pictures, adds the motion module from
        the folder `motion_adapter`, or the toybox's.

        Args:
            fps: the clips' frame rate, for a network that is conditioned on it. If None, the network's own rate is used
        """
        made = with_motion_adapter(backbone, motion_adapter)
        if fps is not None and made.frame_rate is not None:
            made.frame_rate = fps
        return made

    @classmethod
    def check_frames(
        cls, backbone: str | Path | None, motion_adapter: str | Path | None, frames: int | None, key: str = "--frames"
    ) -> None:
        """Raises ValueError, naming `key`, if the model does not support this frame count. Does not load the model."""
        check = None if frames is None else frame_check(backbone, motion_adapter)
        if check is not None and frames is not None:
            try:
                check(frames)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None

    @classmethod
    def check_plan(cls, planned: Plan, backbone: str | Path | None) -> None:
        """Raises ValueError if the model does not support a frame count that the recipe sets, if a trajectory must be
        measured but the clips are not those of exactly one motion, or if there is a noise prior but no clips. Does not
        load the model."""
        recipe: Any = planned.recipe
        check = frame_check(backbone, recipe.motion_adapter)
        if check is not None:
            check_lengths(planned.recipe, check)
        if _asks_for_trajectory(recipe):
            one_motion(planned.subjects)
            _clips_of(recipe)
        if recipe.sampling.noise_prior is not None and not any(s.clips for s in planned.subjects.values()):
            raise ValueError("sampling.noise_prior takes noise from the motion's own clips; give subject.clips=FOLDER")

    def load(self, concept: Concept, strength: float = 1.0) -> None:
        """Attaches a concept as `Runner.load` does. If the concept is only a trajectory, the strength scales its path."""
        alone = is_trajectory(concept)
        if alone and not math.isfinite(strength):
            raise ValueError(f"the strength of {concept.meta.name!r} must be a finite number, not {strength}")
        super().load(concept, 1.0 if alone else strength)
        if alone:
            self.loaded[concept.meta.name] = Loaded(concept, reach=strength)

    def personalize(
        self, subjects: Mapping[str, Subject], recipe: Recipe, workdir: Path, **more: Any
    ) -> dict[str, Concept]:
        """Learns as `Runner.personalize` does. If the recipe asks for a trajectory, it is measured first.

        Also raises ValueError if the model does not support a frame count or a frame size that the recipe sets, if a
        trajectory cannot be measured (see `trajectory.measure`), or if the trajectory skips layers that the recipe trains.
        """
        side = self.backbone.resolution
        check_lengths(recipe, lambda frames: self.backbone.latent_shape(side, side, frames))
        for source in clip_sources(recipe):
            if source.size is not None:
                try:
                    self.backbone.latent_shape(*source.size)
                except ValueError as error:
                    raise ValueError(f"sources.clips.size = {list(source.size)}: {error}") from None
        self._check_layers(recipe)
        return super().personalize(subjects, self.measured(subjects, recipe), workdir, **more)

    def _check_layers(self, recipe: Recipe) -> None:
        path: Trajectory | None = getattr(recipe.sampling, "trajectory", None)
        if path is None or path.layers == "all" or not self.backbone.frames_apart:
            return
        for _, phase in expand_phases(recipe):
            for slot, part in phase.trainable.items():
                names = part.modules(self.backbone, slot)[0].values() if isinstance(part, OnRoles) else ()
                moves = isinstance(part, MotionEmbeddings) or any(
                    MOTION_MODULES in name for some in names for name in some
                )
                if moves and not part.temporary:
                    raise ValueError(
                        "sampling.trajectory.layers: 'image' skips the motion layers, which "
                        f"trainable.{slot} trains; use 'all'"
                    )

    def measured(self, subjects: Mapping[str, Subject], recipe: Recipe) -> Recipe:
        """Returns the recipe with the points of `sampling.trajectory` measured on the clips, unless they are already
        set."""
        if not _asks_for_trajectory(recipe):
            return recipe
        how: Any = recipe.sampling
        side = recipe.train.resolution or self.backbone.resolution
        points = measure(one_motion(subjects), _clips_of(recipe), side)
        path = how.trajectory.model_copy(update={"points": points})
        return recipe.model_copy(update={"sampling": how.model_copy(update={"trajectory": path})})

    def generate_each(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings = SamplingSettings(),
        *,
        base: bool = False,
        progress: Steps | None = None,
        **more: Any,
    ) -> Generator[tuple[Sequence[int], Tensor], None, None]:
        """Generates as `Runner.generate_each` does. Clips follow the trajectory of a loaded motion, or start from the noise of
        its clip, only if their prompts name the motion. Without motion modules (`PictureClipsBackbone`), nothing moves in
        clips that follow no trajectory.

        Also raises ValueError if a prompt names several motions with trajectories, or several with noise priors.
        """
        hooks = settings.hooks if base else self.with_own_sampling(settings).hooks
        named = [hook for hook in hooks if is_of_motion(hook)]
        groups: dict[tuple[HookOfMotion, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(hooks_for_prompt(self, prompt, named, base), []).append(row)
        alone = isinstance(self.backbone, PictureClipsBackbone)
        if not (named or alone) or len(prompts) != len(seeds):
            yield from super().generate_each(prompts, seeds, settings, base=base, progress=progress, **more)
            return
        # trajectories come first, so that frames and regions that other hooks keep are not moved
        others = tuple(hook for hook in settings.hooks if not is_of_motion(hook))
        done = 0
        for own, rows in groups.items():
            part = part_of(progress, done, len(rows), len(prompts))
            still = (ByFrame(),) if alone and not follows(own) else ()
            some = [prompts[i] for i in rows], [seeds[i] for i in rows]
            how = replace(settings, hooks=(*still, *own, *others))
            for inside, clips in super().generate_each(*some, how, base=base, progress=part, **more):
                yield [rows[i] for i in inside], clips
            done += len(rows)

    def follows(self, prompt: str, settings: SamplingSettings) -> bool:
        """Whether a clip with this prompt follows a trajectory. Raises ValueError as `generate` does."""
        paths = [hook for hook in self.with_own_sampling(settings).hooks if isinstance(hook, FollowTrajectory)]
        return follows(hooks_for_prompt(self, prompt, paths, base=False))

    def with_own_sampling(self, settings: SamplingSettings) -> SamplingSettings:
        """Does what `Runner.with_own_sampling` does, and adds the trajectories and noise priors of loaded motions.
        Warns and raises ValueError as `hooks_of_motions` does."""
        settings = super().with_own_sampling(settings)
        return replace(settings, hooks=(*settings.hooks, *hooks_of_motions(self, settings)))

    def _as_trained(self, recipe: Recipe) -> SamplingSettings:
        settings = super()._as_trained(recipe)
        path: Trajectory | None = getattr(recipe.sampling, "trajectory", None)
        if path is None or not path.points:
            return settings
        new = [name for name in self.backbone.placeholders if name not in self.loaded]
        return replace(settings, hooks=(*settings.hooks, *(FollowTrajectory(name=n, trajectory=path) for n in new)))

    def evaluate_clips(self, settings: ClipEvaluationSettings = ClipEvaluationSettings()) -> ClipReport:
        """Measures the loaded motion, the loaded subject, or both in clips, as `pcs video evaluate` does.

        Raises:
            ValueError: when neither a motion nor a subject is loaded, or their clips or pictures cannot be found
        """
        return evaluate_clips_loaded(self, settings)

    def shown(self, subject: Subject, side: int) -> Tensor:
        """Returns the pictures of a subject. For clips, returns one picture per clip, with its first frames side by
        side."""
        if not subject.clips:
            return super().shown(subject, side)
        first = ClipWindow(length=4)
        return torch.cat([stills(read_clip(path, first, side).frames[None]) for path in subject.clips])


def _asks_for_trajectory(recipe: Recipe) -> bool:
    """Whether the recipe has a trajectory that must be measured."""
    path: Trajectory | None = getattr(recipe.sampling, "trajectory", None)
    return path is not None and not path.points


def _clips_of(recipe: Recipe) -> Clips:
    """Returns the first source of clips, on which trajectories are measured. Raises ValueError if there is none."""
    sources = clip_sources(recipe)
    if not sources:
        raise ValueError(
            "sampling.trajectory is measured on clips, but no source in the recipe reads any (kind: clips)"
        )
    return sources[0]


def opening(motion_adapter: str | Path | None, fps: float | None) -> dict[str, Any]:
    """Returns the options that are set, as arguments that `open_runner` passes to `VideoRunner.prepared`."""
    return {k: v for k, v in {"motion_adapter": motion_adapter, "fps": fps}.items() if v is not None}


def clip_rate(runner: VideoRunner, fps: float | None) -> float:
    """Returns the frame rate of written files. It is the requested rate, or else the network's own rate, or else 8."""
    return fps or runner.backbone.frame_rate or 8.0
