"""The public interface of `pcs_video`: personalize, generate, evaluate clips. The command line and Python code both use it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcs_video.backbones.frame_grid import frame_check
from pcs_video.backbones.open_motion import with_motion_adapter
from pcs_video.motion.alternate import Alternate, AlternateTask
from pcs_video.motion.dual_path import DualPath, DualPathTask
from pcs_video.motion.trajectory import FollowTrajectory, Trajectory, measure
from pcs_video.recipe import check_lengths, clip_sources
from shared.backbones import Backbone
from shared.concept import Concept
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from shared.io.contact_sheets import stills
from shared.io.denoising_progress import Steps
from shared.metrics.clips.report import ClipReport
from shared.recipe.schema import Recipe
from shared.runner.base import Runner, attached
from shared.runner.clip_scorers import clip_training_scorers
from shared.runner.judging_clips import ClipEvaluationSettings, evaluate_clips_loaded
from shared.runner.loaded_concepts import Loaded
from shared.runner.plan import Plan
from shared.sampling.settings import SamplingSettings
from shared.types import Subject

__all__ = ["VideoRunner", "attached"]


class VideoRunner(Runner):
    """One backbone and the concepts attached to it; makes clips [N, 3, F, H, W] in [-1, 1]."""

    tasks = {**Runner.tasks, DualPathTask: DualPath, AlternateTask: Alternate}
    scorers = staticmethod(clip_training_scorers)

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
        """Raises ValueError for windows and clips whose length the model cannot make. The model is not loaded for this."""
        recipe: Any = planned.recipe
        check = frame_check(backbone, recipe.motion_adapter)
        if check is not None:
            check_lengths(planned.recipe, check)

    def load(self, concept: Concept, strength: float = 1.0) -> None:
        """Attaches a concept as `Runner.load` does; if it consists of a trajectory alone, the strength scales that."""
        path = concept.meta.learned_with.sampling.trajectory
        alone = path is not None and bool(path.points) and not any(concept.tensors.values())
        if alone and not math.isfinite(strength):
            raise ValueError(f"the strength of {concept.meta.name!r} must be a finite number, not {strength}")
        super().load(concept, 1.0 if alone else strength)
        if alone:
            self.loaded[concept.meta.name] = Loaded(concept, reach=strength)

    def personalize(
        self, subjects: Mapping[str, Subject], recipe: Recipe, workdir: Path, **more: Any
    ) -> dict[str, Concept]:
        """Learns as `Runner.personalize` does, after measuring the trajectory of a motion if the recipe asks for one.

        Raises ValueError also if a trajectory cannot be measured; see `trajectory.measure`.
        """
        return super().personalize(subjects, self.measured(subjects, recipe), workdir, **more)

    def measured(self, subjects: Mapping[str, Subject], recipe: Recipe) -> Recipe:
        """Returns the recipe with the points of `sampling.trajectory`, if they are not set, measured on the clips."""
        how: Any = recipe.sampling
        asked: Trajectory | None = getattr(how, "trajectory", None)
        if asked is None or asked.points:
            return recipe
        sources, moving = clip_sources(recipe), [s for s in subjects.values() if s.clips]
        if len(moving) != 1 or not sources:
            raise ValueError(
                "sampling.trajectory: measured on the clips of exactly one motion: give subject.clips=FOLDER"
            )
        side = recipe.train.resolution or self.backbone.resolution
        found = asked.model_copy(update={"points": measure(moving[0], sources[0], side)})
        return recipe.model_copy(update={"sampling": how.model_copy(update={"trajectory": found})})

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings = SamplingSettings(),
        *,
        base: bool = False,
        must_name: bool = True,
        progress: Steps | None = None,
    ) -> Tensor:
        """Generates as `Runner.generate` does. A trajectory is followed only by clips whose prompts name its motion.

        Raises ValueError also for a prompt that names several motions with trajectories.
        """

        def made(rows: Sequence[int], how: SamplingSettings) -> Tensor:
            some = [prompts[i] for i in rows], [seeds[i] for i in rows]
            return super(VideoRunner, self).generate(*some, how, base=base, must_name=must_name, progress=progress)

        paths = [] if base else [h for h in self.with_own_sampling(settings).hooks if isinstance(h, FollowTrajectory)]
        if not paths or len(prompts) != len(seeds):
            return super().generate(prompts, seeds, settings, base=base, must_name=must_name, progress=progress)
        groups: dict[tuple[FollowTrajectory, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            own = tuple(h.resting() if h.name in self.loaded and f"<{h.name}>" not in prompt else h for h in paths)
            followed = [f"<{h.name}>" for h in own if h.trajectory.points]
            if len(followed) > 1:
                raise ValueError(
                    f"{prompt!r} names {' and '.join(followed)}, but a clip can follow only one trajectory"
                )
            groups.setdefault(own, []).append(row)
        others = tuple(h for h in settings.hooks if not isinstance(h, FollowTrajectory))
        parts = {tuple(rows): made(rows, replace(settings, hooks=(*others, *own))) for own, rows in groups.items()}
        order = [row for rows in parts for row in rows]
        return torch.cat(list(parts.values()))[torch.tensor(order).argsort()]

    def with_own_sampling(self, settings: SamplingSettings) -> SamplingSettings:
        """Also adds the trajectory of each loaded motion, scaled by its strength."""
        settings = super().with_own_sampling(settings)
        said = {hook.name for hook in settings.hooks if isinstance(hook, FollowTrajectory)}
        own = []
        for name, loaded in self.loaded.items():
            learned = loaded.concept.meta.learned_with.sampling.trajectory
            strength = self.backbone.strengths.get(name, loaded.reach)
            if learned is not None and learned.points and strength and name not in said:
                path = Trajectory(start=learned.start, points=learned.points).scaled(strength)
                own.append(FollowTrajectory(name=name, trajectory=path))
        return replace(settings, hooks=(*settings.hooks, *own))

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


def opening(motion_adapter: str | Path | None, fps: float | None) -> dict[str, Any]:
    """Returns the options that are set, as `open_runner` passes them to `VideoRunner.prepared`."""
    return {k: v for k, v in {"motion_adapter": motion_adapter, "fps": fps}.items() if v is not None}


def clip_rate(runner: VideoRunner, fps: float | None) -> float:
    """Returns the frames per second for files: as requested, else the network's own, else 8."""
    return fps or runner.backbone.frame_rate or 8.0
