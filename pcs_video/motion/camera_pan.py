"""Moves the camera by shifting latents from frame to frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.sampling.box_tracks import Box, as_track, box_masks, check_frames, latent_frame_times
from shared.sampling.hooks import DenoisingStep, SamplingHookBase
from shared.sampling.sampler import output_size
from shared.sampling.settings import SamplingSettings

Fraction = Annotated[float, Field(ge=0, le=1)]
Distance = Annotated[float, Field(ge=-1, le=1)]
_STREAM = 2**40  # random stream for cells that come into view, separate from the noise's


class CameraPan(SamplingHookBase):
    """MotionBooth's camera control (https://arxiv.org/abs/2406.17758), which needs no training.

    The camera moves at constant speed, by `right` times the picture's width and `down` times its height over the whole
    clip. The content therefore moves in the opposite direction. The latents of each frame are shifted by whole cells, a
    little in each of the steps between `start` and `end`. Cells that come into view are filled with values drawn from
    the same row (or column, for a vertical shift) outside the subjects' `boxes`, so that the spread of the values
    matches the noise level.
    """

    kind: Literal["camera_pan"] = "camera_pan"
    right: Distance = 0.0
    down: Distance = 0.0
    start: Fraction = 0.1  # the shifts begin at this fraction of the steps, by default at step 5 of 50
    end: Fraction = 0.3  # the shifts end at this fraction of the steps, by default at step 15 of 50
    boxes: Mapping[str, Mapping[int, Box]] = {}

    @field_validator("boxes", mode="before")
    @classmethod
    def _tracks(cls, value: Any) -> Any:
        return {str(name): as_track(track, str(name)) for name, track in dict(value).items()}

    @model_validator(mode="after")
    def _ordered(self) -> CameraPan:
        if self.start >= self.end:
            raise ValueError(f"start = {self.start} must be below end = {self.end}")
        return self

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> CameraPan:
        """Returns the hook itself. Raises ValueError if a picture is generated, if there are boxes for frames that are not
        generated, or if the camera moves by less than a latent cell."""
        *frames, height, width = output_size(backbone, settings)
        if not frames:
            raise ValueError("a camera can move only in a clip, not in a picture")
        check_frames(self.boxes, frames[0])
        _, _, rows, columns = backbone.latent_shape(height, width, *frames)
        if (self.right or self.down) and not (round(self.right * columns) or round(self.down * rows)):
            raise ValueError(
                f"a pan by {self.right:g} of the width and {self.down:g} of the height moves by less than one of the "
                f"{columns}x{rows} latent cells; use {max(1 / columns, 1 / rows):.2g} or more"
            )
        return self

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        steps = self._steps(step)
        if step.index not in steps:
            return latents
        turn, frames = steps.index(step.index), latents.shape[2]
        out = latents.clone()
        source = self._source(step, latents)
        for frame in range(1, frames):
            for axis, way in ((4, self.right), (3, self.down)):
                total = way * latents.shape[axis] * frame / (frames - 1)
                cells = round(total * (turn + 1) / len(steps)) - round(total * turn / len(steps))
                if cells:
                    for row, seed in enumerate(step.seeds):
                        draw = torch.Generator().manual_seed((seed + _STREAM * (1 + 1000 * step.index + frame)) % 2**63)
                        plane = out[row, :, frame]
                        out[row, :, frame] = shifted(plane, cells, axis - 2, source[frame], draw)
        return out

    def jumps(self, step: DenoisingStep) -> bool:
        return step.index in self._steps(step)

    def _steps(self, step: DenoisingStep) -> list[int]:
        """Returns the scheduler calls before which latents are shifted. Each is the first call of a step."""
        begin = range(0, step.steps, step.order)
        steps = [i for i in begin if self.start <= i / step.steps < self.end]
        return steps or [max(i for i in begin if i <= self.start * step.steps)]  # used if no step is in the range

    def _source(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        """Returns a bool mask [f, h, w] of the cells from which values for new cells may be drawn."""
        frames, height, width = latents.shape[2:]
        times = latent_frame_times(frames, step.backbone.frame_factor)
        free = torch.ones(frames, height, width, dtype=torch.bool)
        for track in self.boxes.values():
            free &= ~box_masks(track, times, height, width)
        return free


def shifted(plane: Tensor, cells: int, axis: int, source: Tensor, draw: torch.Generator) -> Tensor:
    """Shifts a plane [C, h, w] as if the camera had moved by `cells` along an axis (1 for down, 2 for right).

    Each cell that comes into view takes the values of a cell drawn from the same row (axis 2) or column (axis 1) of
    `plane`. Only cells that the mask `source` ([h, w]) allows are drawn, unless it allows none in that row or
    column.
    """
    size = plane.shape[axis]
    cells = max(-size, min(size, cells))
    lines = source if axis == 2 else source.T
    lines = torch.where(lines.any(1, keepdim=True), lines, True).float()
    chosen = torch.multinomial(lines, abs(cells), replacement=True, generator=draw).to(plane.device)
    index = (chosen if axis == 2 else chosen.T).expand(len(plane), -1, -1)
    fill = plane.gather(axis, index)
    kept = plane.narrow(axis, max(cells, 0), size - abs(cells))
    return torch.cat([kept, fill] if cells > 0 else [fill, kept], dim=axis)
