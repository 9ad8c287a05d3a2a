"""Turns a diffusion model and its attached concepts into the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.guidance.camera_embedding import CameraAdapter
from pcs_3d.guidance.joint_views import SELF, JointViews
from pcs_3d.guidance.perp_neg import PerpNeg
from pcs_3d.guidance.prompt_cache import PromptCache
from pcs_3d.guidance.scores import Adapters, Ask, Told
from pcs_3d.guidance.student import STUDENT
from pcs_3d.view_prompts import Mix, ScenePrompts, Views
from shared.backbones.attention_edits import At
from shared.backbones.protocol import Backbone
from shared.prompts import without
from shared.trainable.merged_forward import merged_layers
from shared.types import Conditioning


class BackboneScores:
    """The `Scores` of a backbone.

    Adapters are switched on and off in sets. The teacher is the backbone with `concepts` at their strengths. The
    student also uses the `student` set. The base uses no adapters, and its prompts contain class nouns instead of
    concept names. Asks can also name the sets to use; the prompts then contain all concept names.

    Args:
        concepts: the strength of each concept's adapters and learned words, by name
        resolution: the length, in pixels, to which the shorter side of each view is scaled before encoding. If
            None, the backbone's own resolution is used.
        joint_views: the number of consecutive views that attend to each other
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: ScenePrompts,
        concepts: Mapping[str, float],
        perp_neg: PerpNeg | None = None,
        resolution: int | None = None,
        text_on_device: Callable[[], AbstractContextManager[Any]] = nullcontext,
        joint_views: int = 1,
    ) -> None:
        self.backbone, self.prompts, self.perp_neg = backbone, prompts, perp_neg
        self.joint_views = joint_views
        self.resolution = backbone.resolution if resolution is None else resolution
        self.concepts = dict(concepts)
        self.texts = PromptCache(backbone, text_on_device)
        self.discrete_time = backbone.discrete_time

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.backbone.alpha_sigma(t)

    @contextmanager
    def under(self, adapters: Adapters) -> Iterator[None]:
        """Switches on exactly these adapters within the context, in which views attend to each other as set."""
        with ExitStack() as stack:
            stack.enter_context(self.backbone.active(self._strengths(adapters)))
            if self.joint_views > 1:
                stack.enter_context(self.backbone.attending(At(JointViews(self.joint_views), SELF)))
            yield

    def _strengths(self, adapters: Adapters) -> dict[str, float]:
        """Returns the strength of each adapter set that is on."""
        if adapters == "base":
            return {}
        if adapters == "student":
            if STUDENT not in self.backbone.adapters:
                raise ValueError(
                    "guidance.student has no adapters: set trainable.student_lora.kind=lora "
                    "trainable.student_lora.adapter_set=student trainable.student_lora.group=student"
                )
            return {**self.concepts, STUDENT: 1.0}
        return {name: self.concepts[name] for name in (self.concepts if adapters == "teacher" else adapters)}

    def eps(self, asks: Sequence[Ask], z_t: Tensor, t: Tensor, views: Views) -> list[Tensor]:
        """Predicts the noise for each ask. Asks with the same adapters share one pass through the network."""
        known: dict[Ask, Tensor] = {}
        used: list[Adapters] = list(dict.fromkeys(ask.adapters for ask in asks))
        for adapters in used:
            mine = [ask for ask in asks if ask.adapters == adapters]
            with torch.no_grad(), merged_layers(), self.under(adapters):
                many, times = torch.cat([z_t] * len(mine)), torch.cat([t] * len(mine))
                prediction = self._predict(mine, many, times, views)
                eps = self.backbone.to_eps(prediction.to(z_t), many, times)
            known.update(zip(mine, eps.chunk(len(mine)), strict=True))
        return [known[ask] for ask in asks]

    def _predict(self, asks: Sequence[Ask], z_t: Tensor, t: Tensor, views: Views) -> Tensor:
        """Returns the network's outputs, `[A * B, C, h, w]`. The outputs of the first ask for all B views come first,
        followed by those of the second ask, and so on."""
        rows = [row for ask in asks for row in self._rows(ask, views)]
        with ExitStack() as stack:
            for adapter in self.backbone.adapters.get(STUDENT, []):
                if isinstance(adapter, CameraAdapter):
                    stack.enter_context(adapter.seeing(views.cameras, views.blind))
            conditioning = self._conditioning(rows, t)
            return self.backbone.predict(z_t.to(self.backbone.dtype), t, conditioning)

    def _rows(self, ask: Ask, views: Views) -> list[Mix]:
        told: Told = ask.told
        by_perp_neg = self.perp_neg is not None and told in ("prompt", "away_near", "away_far")
        source: Any = self.perp_neg.rows(told, self.prompts, views) if self.perp_neg and by_perp_neg else None
        rows = source or self.prompts.rows(told, views)
        if ask.adapters != "base":
            return rows
        nouns = self.prompts.class_nouns or {}
        return [tuple((weight, without(text, nouns)) for weight, text in row) for row in rows]

    def _conditioning(self, rows: Sequence[Mix], t: Tensor) -> Conditioning:
        return self.texts.mixed(rows, t)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encodes views in the autoencoder's precision. Returns float32 latents. Raises ValueError if the backbone does
        not accept views of this size."""
        factor = self.resolution / min(pixels.shape[-2:])
        if factor != 1:
            size = [round(side * factor) for side in pixels.shape[-2:]]
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.backbone.encode_pixels(2 * pixels.float() - 1).float()

    def decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return (self.backbone.decode(latents).float() + 1) / 2

    def prediction_loss(self, ask: Ask, z: Tensor, noise: Tensor, t: Tensor, views: Views) -> Tensor:
        z_t = self.backbone.add_noise(z, noise, t)
        prediction = self._predict([ask], z_t, t, views)
        return F.mse_loss(prediction.float(), self.backbone.target(z, noise, t).float())
