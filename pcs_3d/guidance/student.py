"""VSD's student: learns, alongside the field, what renders currently look like (ProlificDreamer,
https://arxiv.org/abs/2305.16213)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from pcs_3d.guidance.scores import Ask, Scores
from pcs_3d.guidance.times import Times
from pcs_3d.schedules import Moment
from pcs_3d.view_prompts import Views
from shared.config import NAME, Part

STUDENT = "student"  # the adapter set that only the student uses


class StudentSettings(Part):
    """L = |eps_student(z_t', t', c) - eps|² on the renders (eq. 9), in the model's own parametrisation. The student is the
    teacher plus the adapters of the set `student`, which recipes train (`trainable.*.adapter_set: student`)."""

    times: Times = Times(low=0.0, high=1.0)
    told: Literal["prompt", "plain_prompt"] = "plain_prompt"  # prompt: with the words for views
    camera_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1  # how often the student is not given the cameras
    group: Annotated[str, Field(pattern=NAME)] = STUDENT  # its optimizer group

    def loss(self, scores: Scores, z: Tensor, views: Views, moment: Moment, generator: Generator) -> Tensor:
        """The scalar loss on z [B, C, h, w], without gradients in z. Call it and its backward pass inside
        `scores.under("student")`."""
        t = self.times.draw(len(z), moment, generator, scores.discrete_time).to(z.device)
        noise = torch.randn(z.shape, generator=generator).to(z.device, z.dtype)
        blind = float(torch.rand((), generator=generator)) < self.camera_dropout
        return scores.prediction_loss(Ask(self.told, STUDENT), z.detach(), noise, t, replace(views, blind=blind))
