"""Combines several hooks into one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.sampling.hooks import DenoisingStep, SamplingHook
from shared.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class InTurn:
    """A hook that applies several hooks in order, each to the result of the previous one."""

    hooks: tuple[SamplingHook, ...]

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> InTurn:
        return InTurn(tuple(hook.ready(backbone, settings) for hook in self.hooks))

    def initial_noise(self, backbone: Backbone, noise: Tensor) -> Tensor:
        for hook in self.hooks:
            noise = hook.initial_noise(backbone, noise)
        return noise

    def prompts(self, step: DenoisingStep, prompts: Sequence[str]) -> Sequence[str]:
        for hook in self.hooks:
            prompts = hook.prompts(step, prompts)
        return prompts

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        for hook in self.hooks:
            latents = hook.latents(step, latents)
        return latents

    def jumps(self, step: DenoisingStep) -> bool:
        return any(hook.jumps(step) for hook in self.hooks)

    def told(self, step: DenoisingStep, t: Tensor) -> Tensor:
        for hook in self.hooks:
            t = hook.told(step, t)
        return t

    @contextmanager
    def during(self, step: DenoisingStep) -> Iterator[None]:
        with ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hook.during(step))
            yield

    def after(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        for hook in self.hooks:
            latents = hook.after(step, latents)
        return latents
