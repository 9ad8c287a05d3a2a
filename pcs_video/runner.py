"""The public interface of `pcs_video`: personalize, generate, evaluate clips. The command line and Python code both use it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pcs_video.backbones.frame_grid import frame_check
from pcs_video.backbones.open_motion import with_motion_adapter
from pcs_video.backbones.picture_clips import PictureClipsBackbone
from pcs_video.motion.alternate import Alternate, AlternateTask
from pcs_video.motion.clip_source import Clips
from pcs_video.motion.dual_path import DualPath, DualPathTask
from pcs_video.motion.follow_trajectory import ByFrame, FollowTrajectory
from pcs_video.motion.motion_embeddings import MotionEmbeddings
from pcs_video.motion.trajectory import measure, one_motion
from pcs_video.recipe import check_lengths, clip_sources
from shared.backbones import Backbone
from shared.concept import Concept
from shared.io.clips.open_frames import open_frames
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
from shared.runner.judging_clips import ClipEvaluationSettings, evaluate_clips_loaded, motion_clips
from shared.runner.loaded_concepts import Loaded
from shared.runner.plan import Plan
from shared.sampling.hooks import SamplingHook, StrengthSchedule
from shared.sampling.inversion import NoisePrior
from shared.sampling.settings import SamplingSettings
from shared.trainable.base import OnRoles
from shared.types import Subject

__all__ = ["VideoRunner", "attached"]

_OfConcept = FollowTrajectory | NoisePrior
_MOTION = "motion_modules"  # in the names of AnimateDiff's layers for motion


class VideoRunner(Runner):
    """One backbone and the concepts attached to it; makes clips [N, 3, F, H, W] in [-1, 1]."""

    tasks = {**Runner.tasks, DualPathTask: DualPath, AlternateTask: Alternate}
    scorers = staticmethod(clip_training_scorers)
    makes = "clips"
    families = (frozenset({"animatediff", "stable_diffusion"}), frozenset({"wan"}), frozenset({"ltx"}))

    @classmethod
    def prepared(
        cls, backbone: Backbone, motion_adapter: str | Path | None = None, fps: float | None = None
    ) -> Backbone:
        """Returns the backbone, unchanged if it makes clips, otherwise with the folder's or the toybox's motion module added.

        `fps`: frames per second of the clips, for a network conditioned on it; None: its own rate.
        """
        made = with_motion_adapter(backbone, motion_adapter)
        if fps is not None and made.frame_rate is not None:
            made.frame_rate = fps
        return made

    @classmethod
    def check_frames(
        cls, backbone: str | Path | None, motion_adapter: str | Path | None, frames: int | None, key: str = "--frames"
    ) -> None:
        """Raises ValueError, naming the key, if the model cannot make this many frames. The model is not loaded for this."""
        check = None if frames is None else frame_check(backbone, motion_adapter)
        if check is not None and frames is not None:
            try:
                check(frames)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None

    @classmethod
    def check_plan(cls, planned: Plan, backbone: str | Path | None) -> None:
        """Raises ValueError for windows and clips whose length the model cannot make, for a trajectory that would have to be
        measured on anything but the clips of one motion, and for a noise prior without clips. The model is not loaded for
        this."""
        recipe: Any = planned.recipe
        check = frame_check(backbone, recipe.motion_adapter)
        if check is not None:
            check_lengths(planned.recipe, check)
        if _asks_for_trajectory(recipe):
            one_motion(planned.subjects)
            _clips_of(recipe)
        if recipe.sampling.noise_prior is not None and not any(s.clips for s in planned.subjects.values()):
            raise ValueError("sampling.noise_prior: takes noise from the motion's own clips: give subject.clips=FOLDER")

    def load(self, concept: Concept, strength: float = 1.0) -> None:
        """Attaches a concept as `Runner.load` does; if it consists of a trajectory alone, the strength scales that."""
        alone = _is_trajectory(concept)
        if alone and not math.isfinite(strength):
            raise ValueError(f"the strength of {concept.meta.name!r} must be a finite number, not {strength}")
        super().load(concept, 1.0 if alone else strength)
        if alone:
            self.loaded[concept.meta.name] = Loaded(concept, reach=strength)

    def personalize(
        self, subjects: Mapping[str, Subject], recipe: Recipe, workdir: Path, **more: Any
    ) -> dict[str, Concept]:
        """Learns as `Runner.personalize` does, after measuring the trajectory of a motion if the recipe asks for one.

        Raises ValueError also for frames of a size that the model cannot take, if a trajectory cannot be measured (see
        `trajectory.measure`), or if clips that follow it would leave out layers that the recipe trains.
        """
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
                moves = isinstance(part, MotionEmbeddings) or any(_MOTION in name for some in names for name in some)
                if moves and not part.temporary:
                    raise ValueError(
                        "sampling.trajectory.layers: 'image' leaves out the layers for motion, which "
                        f"trainable.{slot} trains; use 'all'"
                    )

    def measured(self, subjects: Mapping[str, Subject], recipe: Recipe) -> Recipe:
        """Returns the recipe with the points of `sampling.trajectory`, if they are not set, measured on the clips."""
        if not _asks_for_trajectory(recipe):
            return recipe
        how: Any = recipe.sampling
        side = recipe.train.resolution or self.backbone.resolution
        points = measure(one_motion(subjects), _clips_of(recipe), side)
        path = how.trajectory.model_copy(update={"points": points})
        return recipe.model_copy(update={"sampling": how.model_copy(update={"trajectory": path})})

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings = SamplingSettings(),
        *,
        base: bool = False,
        progress: Steps | None = None,
        **more: Any,
    ) -> Tensor:
        """Generates as `Runner.generate` does. Only clips whose prompts name a loaded motion follow its trajectory, or start
        from its clips' noise. Without motion modules (`PictureClipsBackbone`), nothing moves in the others.

        Raises ValueError also for a prompt that names several motions with trajectories, or several with noise priors.
        """
        hooks = settings.hooks if base else self.with_own_sampling(settings).hooks
        named = [hook for hook in hooks if _of_concept(hook)]
        groups: dict[tuple[_OfConcept, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(self._of_prompt(prompt, named, base), []).append(row)
        alone = isinstance(self.backbone, PictureClipsBackbone)
        if not (named or alone) or len(prompts) != len(seeds):
            return super().generate(prompts, seeds, settings, base=base, progress=progress, **more)
        # Paths come first: what hooks keep or give (frames, regions) is not moved.
        others = tuple(hook for hook in settings.hooks if not _of_concept(hook))
        made, order = [], [row for rows in groups.values() for row in rows]
        for own, rows in groups.items():
            part = part_of(progress, sum(map(len, made)), len(rows), len(prompts))
            follows = any(isinstance(hook, FollowTrajectory) and hook.trajectory.points for hook in own)
            still = (ByFrame(),) if alone and not follows else ()
            some = [prompts[i] for i in rows], [seeds[i] for i in rows]
            how = replace(settings, hooks=(*still, *own, *others))
            made.append(super().generate(*some, how, base=base, progress=part, **more))
        return torch.cat(made)[torch.tensor(order).argsort()]

    def follows(self, prompt: str, settings: SamplingSettings) -> bool:
        """Whether a clip with this prompt follows a trajectory. ValueError as in `generate`."""
        paths = [hook for hook in self.with_own_sampling(settings).hooks if isinstance(hook, FollowTrajectory)]
        own = self._of_prompt(prompt, paths, base=False)
        return any(isinstance(hook, FollowTrajectory) and hook.trajectory.points for hook in own)

    def _of_prompt(self, prompt: str, hooks: Sequence[_OfConcept], base: bool) -> tuple[_OfConcept, ...]:
        """Returns the hooks for one prompt: those of loaded motions that it does not name rest; if `base`, all do."""
        named = set() if base else {name for name in self.loaded if f"<{name}>" in prompt}
        own = tuple(hook.resting() if hook.name in self.loaded.keys() - named else hook for hook in hooks)
        followed = [hook for hook in own if isinstance(hook, FollowTrajectory) and hook.trajectory.points]
        started = [hook for hook in own if isinstance(hook, NoisePrior) and hook.share]
        for some, only in ((followed, "follow only one trajectory"), (started, "start from the noise of only one")):
            if len(some) > 1:
                said = " and ".join(f"<{hook.name}>" for hook in some)
                raise ValueError(f"{prompt!r} names {said}, but a clip can {only}")
        others = sorted(named - {hook.name for hook in followed})
        idle = [f"<{name}>" for name in others if _moves(self.loaded[name].concept)]
        if idle and self.backbone.frames_apart and any(hook.trajectory.layers == "image" for hook in followed):
            raise ValueError(
                f"{prompt!r} names {' and '.join(idle)}, but <{followed[0].name}> leaves out the layers for motion: learn it "
                "with sampling.trajectory.layers=all"
            )
        return own

    def with_own_sampling(self, settings: SamplingSettings) -> SamplingSettings:
        """Also adds the trajectory of each loaded motion, scaled by its strength, and its noise prior, from the first of its
        clips. Warns if that clip is not found or too short.

        Raises ValueError for strengths by step of a concept that consists of a trajectory alone.
        """
        settings = super().with_own_sampling(settings)
        said = {hook.name for hook in settings.hooks if isinstance(hook, FollowTrajectory)}
        stepwise = {name for hook in settings.hooks if isinstance(hook, StrengthSchedule) for name in hook.strengths}
        own = []
        for name, loaded in self.loaded.items():
            if name in stepwise and _is_trajectory(loaded.concept):
                raise ValueError(
                    f"{name!r} is a trajectory, which has one strength for the whole clip: give PATH:STRENGTH"
                )
            path = loaded.concept.meta.learned_with.sampling.trajectory
            strength = self.backbone.strengths.get(name, loaded.reach)
            if path is not None and path.points and strength and name not in said:
                own.append(FollowTrajectory(name=name, trajectory=path.scaled(strength)))
        own += self._noise_priors(settings)
        return replace(settings, hooks=(*settings.hooks, *own))

    def _noise_priors(self, settings: SamplingSettings) -> list[NoisePrior]:
        said = {hook.name for hook in settings.hooks if isinstance(hook, NoisePrior)}
        frames = self.backbone.frames if settings.frames is None else settings.frames
        own = []
        for name, loaded in self.loaded.items():
            how = loaded.concept.meta.learned_with.sampling.noise_prior
            strength = self.backbone.strengths.get(name, loaded.reach)
            if how is None or not how.share or not strength or not frames or said & {name, ""}:
                continue
            clip, why = _first_clip(loaded, frames)
            if clip is not None:
                own.append(NoisePrior(path=clip, name=name, **how.model_dump()))
                continue
            warnings.warn(
                f"{name!r} was learned to start from the noise of its first clip, but {why}: clips start from random noise "
                "unless you give --invert CLIP",
                stacklevel=3,
            )
        return own

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
            ValueError: neither a motion nor a subject is loaded, or its clips or pictures cannot be found
        """
        return evaluate_clips_loaded(self, settings)

    def shown(self, subject: Subject, side: int) -> Tensor:
        """Returns frames of the clips side by side, or the pictures."""
        if not subject.clips:
            return super().shown(subject, side)
        first = ClipWindow(length=4)
        return torch.cat([stills(read_clip(path, first, side).frames[None]) for path in subject.clips])


def _first_clip(loaded: Loaded, frames: int) -> tuple[Path | None, str]:
    """Returns the first clip that a motion was learned from, or why it cannot be used for clips of this many frames."""
    try:
        clip = motion_clips(loaded, None)[0]
    except ValueError:
        return None, "that was not found next to the concept"
    there = open_frames(clip).count
    return (clip, "") if there >= frames else (None, f"{clip.name} has only {there} of {frames} frames")


def _of_concept(hook: SamplingHook) -> TypeGuard[_OfConcept]:
    """Whether a hook acts only where the prompt names its concept."""
    return isinstance(hook, FollowTrajectory) or (isinstance(hook, NoisePrior) and bool(hook.name))


def _is_trajectory(concept: Concept) -> bool:
    """Whether a concept consists of a trajectory alone."""
    path = concept.meta.learned_with.sampling.trajectory
    return path is not None and bool(path.points) and not any(concept.tensors.values())


def _moves(concept: Concept) -> bool:
    """Whether a concept is a motion that acts on motion modules."""
    return concept.meta.kind == "motion" and any(
        _MOTION in key for tensors in concept.tensors.values() for key in tensors
    )


def _asks_for_trajectory(recipe: Recipe) -> bool:
    """Whether a trajectory has to be measured."""
    path: Trajectory | None = getattr(recipe.sampling, "trajectory", None)
    return path is not None and not path.points


def _clips_of(recipe: Recipe) -> Clips:
    """Returns the source whose windows a trajectory is measured on, the first. ValueError if there is none."""
    sources = clip_sources(recipe)
    if not sources:
        raise ValueError("sampling.trajectory: measured on clips, but no source of the recipe reads any (kind: clips)")
    return sources[0]


def opening(motion_adapter: str | Path | None, fps: float | None) -> dict[str, Any]:
    """Returns the options that are set, as `open_runner` passes them to `VideoRunner.prepared`."""
    return {k: v for k, v in {"motion_adapter": motion_adapter, "fps": fps}.items() if v is not None}


def clip_rate(runner: VideoRunner, fps: float | None) -> float:
    """Returns the frames per second for files: as requested, else the network's own, else 8."""
    return fps or runner.backbone.frame_rate or 8.0
