"""The public face of `pcs_image`: personalize, generate, evaluate. Command line, Python and web page are doors to this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shared.io.denoising_progress import Steps, part_of
from shared.runner.base import Runner, attached
from shared.sampling.sampler import SAMPLE_PIXELS, images_per_batch, sample
from shared.sampling.settings import SamplingSettings

__all__ = ["ImageRunner", "attached"]


class ImageRunner(Runner):
    """One backbone and the concepts attached to it; what it makes are pictures [N, 3, H, W] in [-1, 1]."""

    def make(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings, progress: Steps | None = None
    ) -> Tensor:
        """Pictures on the CPU of expanded prompts, as many at once as memory surely holds."""
        height, width = settings.height or self.backbone.resolution, settings.width or self.backbone.resolution
        settings = replace(settings, height=height, width=width)
        at_once = images_per_batch(height * width, SAMPLE_PIXELS)
        parts = []
        for start in range(0, max(1, len(prompts)), at_once):
            some = slice(start, start + at_once)
            on_progress = part_of(progress, start, len(prompts[some]), len(prompts))
            parts.append(
                sample(self.backbone, prompts[some], seeds=seeds[some], settings=settings, progress=on_progress).cpu()
            )
        return torch.cat(parts)
