"""The public face of `pcs_video`: personalize, generate, evaluate in clips. Command line and Python are doors to this."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pcs_video.backbones.open_motion import with_motion_adapter
from pcs_video.motion.alternate import Alternate, AlternateTask
from pcs_video.motion.dual_path import DualPath, DualPathTask
from shared.backbones import Backbone
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from shared.io.contact_sheets import stills
from shared.metrics.clips.report import ClipReport
from shared.runner.base import Runner, attached
from shared.runner.clip_scorers import clip_training_scorers
from shared.runner.judging_clips import ClipEvaluationSettings, evaluate_clips_loaded
from shared.types import Subject

__all__ = ["VideoRunner", "attached"]


class VideoRunner(Runner):
    """One backbone and the concepts attached to it; what it makes are clips [N, 3, F, H, W] in [-1, 1]."""

    tasks = {**Runner.tasks, DualPathTask: DualPath, AlternateTask: Alternate}
    scorers = staticmethod(clip_training_scorers)

    @classmethod
    def prepared(cls, backbone: Backbone, motion_adapter: str | Path | None = None) -> Backbone:
        """The backbone as it is where it makes clips; else with a motion module: the folder's, or the toybox's own."""
        return with_motion_adapter(backbone, motion_adapter)

    def evaluate_clips(self, settings: ClipEvaluationSettings = ClipEvaluationSettings()) -> ClipReport:
        """Measure the loaded motion, the loaded subject, or both in clips: what `pcs video evaluate` does.

        Raises:
            ValueError: other concepts are loaded, or their clips or pictures are not to be found
        """
        return evaluate_clips_loaded(self, settings)

    def shown(self, subject: Subject, side: int) -> Tensor:
        """Frames of the clips side by side, or the pictures."""
        if not subject.clips:
            return super().shown(subject, side)
        first = ClipWindow(length=4)
        return torch.cat([stills(read_clip(path, first, side).frames[None]) for path in subject.clips])
