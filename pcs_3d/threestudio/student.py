"""Trains the student of variational score distillation alongside a threestudio system. The system's own optimizers do
not include the student."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pcs_3d.guidance.scores import Scores
from pcs_3d.guidance.student import STUDENT
from pcs_3d.recipe import Recipe3D
from pcs_3d.schedules import Moment
from pcs_3d.view_prompts import Views
from shared.backbones.protocol import Backbone
from shared.optimizers import AdamW
from shared.train.loop import generator

_STREAM = 2**47  # separate random stream


class Student:
    """The adapters in a backbone's `student` adapter set. The recipe's optimizer trains them once per step.

    threestudio's checkpoints do not include the student. A resumed run therefore starts with a new student
    and warns about it. Raises ValueError if the recipe trains anything other than the student and the field.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe3D) -> None:
        assert recipe.guidance.student is not None
        self.backbone, self.settings = backbone, recipe.guidance.student
        for slot, part in recipe.trainable.items():
            if part.adapter_set != STUDENT or part.group != self.settings.group:
                raise ValueError(
                    f"trainable.{slot}: threestudio can train only the field and a student; set adapter_set={STUDENT} "
                    f"and group={self.settings.group}"
                )
        groups = [part.inject(backbone, STUDENT, slot, recipe.seed) for slot, part in recipe.trainable.items()]
        how = recipe.train.optimizers.get(self.settings.group, AdamW())
        decay = [how.weight_decay if g.weight_decay is None else g.weight_decay for g in groups]
        self.parameters = [p for group in groups for p in group.parameters]
        self.optimizer = how.build(
            [{"params": g.parameters, "lr": g.lr, "weight_decay": d} for g, d in zip(groups, decay, strict=True)]
        )
        self.limit = how.max_grad_norm
        self.taught = False

    @torch.enable_grad()
    def learn(self, scores: Scores, z: Tensor, views: Views, moment: Moment, seed: int) -> float:
        """Trains the student for one step on the latents `z` (`[B, C, h, w]`). Returns the loss before the step."""
        if moment.step and not self.taught:
            warnings.warn(
                f"the student starts from scratch at step {moment.step}, because threestudio's checkpoints do not "
                "contain it",
                stacklevel=2,
            )
        self.taught = True
        device, dtype = z.device.type, self.backbone.dtype
        with scores.under(STUDENT), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = self.settings.loss(scores, z.detach(), views, moment, generator(seed, _STREAM + moment.step))
            loss.backward()
        if self.limit is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())
