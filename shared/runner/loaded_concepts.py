"""Concepts attached to a backbone, and the protocol that a runner must satisfy to judge them."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shared.backbones import Backbone
from shared.concept import Concept
from shared.io.denoising_progress import Steps
from shared.sampling.settings import SamplingSettings
from shared.types import Subject


@dataclass(frozen=True)
class Loaded:
    """A concept attached to a backbone. The backbone manages the strength of the concept's adapters and words."""

    concept: Concept
    subject: Subject | None = None  # what the concept was learned from, if this runner learned it
    reach: float = 1.0  # the strength of a concept with neither adapters nor words


class Painter(Protocol):
    """A backbone with loaded concepts, which generates pictures or clips from prompts."""

    backbone: Backbone

    @property
    def loaded(self) -> MutableMapping[str, Loaded]: ...

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings = ...,
        *,
        base: bool = ...,
        must_name: bool = ...,
        progress: Steps | None = ...,
    ) -> Tensor:
        """Returns pictures [N, 3, H, W] or clips [N, 3, F, H, W] in [-1, 1], on the CPU; see `Runner.generate`."""
        ...
