"""One sampler, and what may happen between its steps."""

from __future__ import annotations

from shared.sampling.changes import Change, ChangeBase, Moment, StrengthSchedule
from shared.sampling.sampler import Denoised, denoise, sample
from shared.sampling.schedulers import make_scheduler, scheduler_names

__all__ = [
    "Change",
    "ChangeBase",
    "Denoised",
    "Moment",
    "StrengthSchedule",
    "denoise",
    "make_scheduler",
    "sample",
    "scheduler_names",
]
