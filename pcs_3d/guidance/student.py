"""The student of variational score distillation, which is trained alongside the field to model its current renders
(ProlificDreamer, https://arxiv.org/abs/2305.16213)."""

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
    """The student's loss on the renders, L = |eps_student(z_t', t', c) - eps|² (eq. 9), in the model's own
    parametrisation. The student is the teacher with additional adapters, which form the `student` set. Recipes train
    them with `trainable.*.adapter_set: student`."""

    times: Times = Times(low=0.0, high=1.0)
    told: Literal["prompt", "plain_prompt"] = "plain_prompt"  # conditioning; only `prompt` has words for the view
    camera_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of steps at which the student is given no cameras
    group: Annotated[str, Field(pattern=NAME)] = STUDENT  # the student's optimizer group

    def loss(self, scores: Scores, z: Tensor, views: Views, moment: Moment, generator: Generator) -> Tensor:
        """Returns the scalar loss on the latents `z` (`[B, C, h, w]`), without a gradient with respect to `z`. Call
        this method and run the backward pass inside `scores.under("student")`."""
        t = self.times.draw(len(z), moment, generator, scores.discrete_time).to(z.device)
        noise = torch.randn(z.shape, generator=generator).to(z.device, z.dtype)
        blind = float(torch.rand((), generator=generator)) < self.camera_dropout
        return scores.prediction_loss(Ask(self.told, STUDENT), z.detach(), noise, t, replace(views, blind=blind))
