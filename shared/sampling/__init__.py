"""The sampler, and the hooks that it calls between denoising steps."""

from __future__ import annotations

from shared.sampling.hooks import DenoisingStep, SamplingHook, SamplingHookBase, StrengthSchedule
from shared.sampling.sampler import Denoised, denoise, sample
from shared.sampling.schedulers import make_scheduler, scheduler_names
from shared.sampling.settings import SamplingSettings, Start

__all__ = [
    "Denoised",
    "DenoisingStep",
    "SamplingHook",
    "SamplingHookBase",
    "SamplingSettings",
    "Start",
    "StrengthSchedule",
    "denoise",
    "make_scheduler",
    "sample",
    "scheduler_names",
]
