"""Places subjects in boxes. The attention to a subject's words is raised inside its box and masked outside."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from shared.backbones.attention_edits import At
from shared.backbones.attention_rows import Rows
from shared.backbones.attention_sites import Site, Where
from shared.backbones.protocol import Backbone
from shared.config import NotNegative
from shared.sampling.box_tracks import Box, as_track, box_masks, check_frames, latent_frame_times
from shared.sampling.hooks import DenoisingStep, SamplingHookBase
from shared.sampling.sampler import output_size
from shared.sampling.settings import SamplingSettings

_NEVER = -1e4  # a bias that reduces the attention to zero, even in half precision


class SubjectBoxes(SamplingHookBase):
    """The training-free subject motion control of MotionBooth (https://arxiv.org/abs/2406.17758).

    The cross-attention scores are edited during the first steps, which determine the layout. Between positions in a
    subject's box and the subject's words, the scores are raised before the softmax by `strength` times the fraction of
    the frame that is outside the box. During these steps, positions outside the box do not attend to the subject's
    words at all. Rows for the negative prompt are left unchanged.
    """

    kind: Literal["subject_boxes"] = "subject_boxes"
    boxes: Mapping[str, Mapping[int, Box]]  # for each concept, or for words in the prompt, the boxes by frame
    strength: NotNegative = 7.5
    until: Annotated[float, Field(ge=0, le=1)] = 0.1  # edit this first fraction of the steps; 0.1 is 5 of 50 steps

    @field_validator("boxes", mode="before")
    @classmethod
    def _tracks(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not value:
            raise ValueError("give boxes by name, such as {my-mug: [left, top, right, bottom]}, or by name and frame")
        return {str(name): as_track(track, str(name)) for name, track in value.items()}

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> SubjectBoxes:
        """Returns the hook itself. Raises ValueError if there are boxes for frames that are not generated."""
        frames = output_size(backbone, settings)[:-2]
        check_frames(self.boxes, frames[0] if frames else 1)
        return self

    def during(self, step: DenoisingStep) -> AbstractContextManager[object]:
        """Returns a context manager that edits the attention. Raises ValueError if a prompt does not contain the words
        for one of the boxes, or if the model has no cross-attention."""
        positions = {name: self._positions(step, name) for name in self.boxes} if step.index == 0 else None
        if step.fraction >= self.until or not self.strength:
            return nullcontext()
        found = positions or {name: self._positions(step, name) for name in self.boxes}
        edit = _Boxed(self, step, found)
        return step.backbone.attending(At(edit, Where(kinds=frozenset({"cross"}))))

    def _positions(self, step: DenoisingStep, name: str) -> Tensor:
        """Returns which positions in the prompts belong to the words of the concept `name`, bool [B, L]. If there is no
        such concept, the words are `name` itself."""
        placeholder = step.backbone.placeholders.get(name)
        words = placeholder.words if placeholder is not None else name
        found = step.backbone.word_positions(step.prompts, words)
        for prompt, row in zip(step.prompts, found, strict=True):
            if not bool(row.any()):
                raise ValueError(f"{name!r} has a box, but does not occur in the prompt {prompt!r}")
        return found


@dataclass(frozen=True)
class _Boxed:
    """Edits the attention scores at one step."""

    part: SubjectBoxes
    step: DenoisingStep
    positions: Mapping[str, Tensor]  # bool [B, L]

    def __call__(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        added = sum(self._bias(name, site, q, rows) for name in self.part.boxes)
        assert isinstance(added, Tensor)
        return q, k, v, added if bias is None else bias + added.to(bias.dtype)

    def _bias(self, name: str, site: Site, q: Tensor, rows: Rows) -> Tensor:
        """Returns the bias [entries, 1, Lq, L]. A row's frames are separate entries or consecutive in Lq."""
        *frames, height, width = self.step.noise.shape[2:]
        times = latent_frame_times(frames[0], self.step.backbone.frame_factor) if frames else [0.0]
        inside = box_masks(self.part.boxes[name], times, *site.grid(height, width))
        grown = self.part.strength * (1 - inside.flatten(1).float().mean(1)).view(-1, 1, 1)
        scores = torch.where(inside, grown, torch.full_like(grown, _NEVER)).to(q.device, q.dtype)
        assert scores.numel() == rows.repeat * q.shape[2], f"{site.name}: {q.shape[2]} cells, {scores.shape} in boxes"
        scores = scores.reshape(rows.repeat, q.shape[2]).repeat(len(rows.index), 1)
        words = self.positions[name].to(q.device)[rows.indices(q.device)] & ~rows.negatives(q.device)[:, None]
        return scores[:, None, :, None] * words[:, None, None, :].to(q.dtype)
