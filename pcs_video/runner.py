"""The public interface of `pcs_video`: personalize, generate, evaluate clips. The command line and Python code both use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcs_video.backbones.frame_grid import frame_check
from pcs_video.backbones.open_motion import with_motion_adapter
from pcs_video.motion.alternate import Alternate, AlternateTask
from pcs_video.motion.dual_path import DualPath, DualPathTask
from pcs_video.recipe import check_lengths
from shared.backbones import Backbone
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from shared.io.contact_sheets import stills
from shared.metrics.clips.report import ClipReport
from shared.runner.base import Runner, attached
from shared.runner.clip_scorers import clip_training_scorers
from shared.runner.judging_clips import ClipEvaluationSettings, evaluate_clips_loaded
from shared.runner.plan import Plan
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
