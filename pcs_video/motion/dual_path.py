"""Learns the motion and the appearance of clips separately, on two paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.recipe.tasks import TuneTask
from shared.train.loop import generator
from shared.train.phase_context import PhaseContext
from shared.train.task import Update, Updates
from shared.train.tune import Tune
from shared.types import Batch

_PATHS = 2**44  # a separate random stream


class DualPathTask(TuneTask):
    """Runs MotionDirector's two paths (https://arxiv.org/abs/2310.08465, section 4.2) one after the other at each step.

    On the spatial path, the parts in the optimizer group `spatial` learn a random frame of the clip as a picture, with
    all other trained parts off. If a latent frame spans several frames, the first frame is always learned, because it
    is the only frame with a latent frame to itself. On the temporal path, the parts in the group `temporal` learn the
    whole clip, while the clip's own spatial adapters stay fixed and provide its appearance. With probability `skip`, a
    step has no spatial path, and the spatial adapters are off. If a penalty needs class examples (the base model's own
    clips), the temporal path also learns from these, with all spatial adapters off.
    """

    kind: Literal["dual_path"] = "dual_path"  # pyright: ignore[reportIncompatibleVariableOverride]
    skip: Annotated[float, Field(ge=0, le=1)] = 0.2
    spatial: str = "spatial"  # optimizer group of the spatial path
    temporal: str = "temporal"  # optimizer group of the temporal path


class DualPath(Tune):
    """Runs a `DualPathTask`. Raises ValueError if a path has nothing to train, or if clips share a spatial part."""

    def __init__(self, context: PhaseContext) -> None:
        super().__init__(context)
        task: Any = self.recipe.task
        self.task: DualPathTask = task
        groups = self.groups()
        for path in (task.spatial, task.temporal):
            if path not in groups:
                there = ", ".join(sorted(groups)) or "none"
                raise ValueError(f"task.kind=dual_path: no part has the optimizer group {path!r}. Groups: {there}.")
        parts = {slot: part for slot, part in self.recipe.trainable.items() if part.group == task.spatial}
        shared = next((slot for slot, part in parts.items() if not part.per_source), None)
        if shared is not None:
            raise ValueError(f"trainable.{shared}: dual_path needs a spatial part for each clip; set per_source=true")

    def updates(self, step: int, micro: int) -> Updates:
        """Yields a loss on one frame, a loss on the whole clip and, if a penalty needs class examples, a loss on class
        examples."""
        batch = self.data.batch(step, micro, "instance")
        if batch.latents.ndim != 5:
            raise ValueError("task.kind=dual_path learns from clips; give subject.clips=FOLDER")
        draw = generator(self.recipe.seed, _PATHS + step, micro)
        rests = float(torch.rand((), generator=draw)) < self.task.skip
        if not rests:
            with self._only(batch):
                loss = self._of_one_frame(batch, step, micro, draw)
                yield Update(loss, (self.task.spatial,), {"spatial": loss.detach()})
        temporal = (self.task.temporal,)
        yield from self.of_one_role(step, micro, batch, 0.0 if rests else 1.0, groups=temporal)
        if self.data.with_priors:
            yield from self.of_one_role(step, micro, self.data.batch(step, micro, "prior"), groups=temporal)

    @contextmanager
    def _only(self, batch: Batch) -> Iterator[None]:
        """Inside the context, all trained adapters are off except the clip's own."""
        with self.backbone.active(self.context.loaded_strengths), self.learning_from(batch.sources):
            yield

    def _of_one_frame(self, batch: Batch, step: int, micro: int, draw: torch.Generator) -> Tensor:
        pictures = batch.latents.shape[2] if self.backbone.frame_factor == 1 else 1
        chosen = torch.randint(pictures, (), generator=draw)
        state = self._predict(one_frame(batch, int(chosen)), step, micro)
        return self._example_loss(state).mean()


def one_frame(batch: Batch, frame: int) -> Batch:
    """Returns one frame of every clip, as pictures."""

    def cut(planes: Tensor | None) -> Tensor | None:
        return None if planes is None else planes[:, :, frame]

    return replace(
        batch,
        latents=batch.latents[:, :, frame],
        owner_masks={owner: mask[:, :, frame] for owner, mask in batch.owner_masks.items()},
        mask=cut(batch.mask),
        valid=cut(batch.valid),
        pixels=cut(batch.pixels),
    )
