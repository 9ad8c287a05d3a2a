"""Learns a motion as vectors that are added where frames attend to each other."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.backbones.attention_sites import Site
from shared.backbones.protocol import Backbone
from shared.config import Side
from shared.io.branch_settings import FrameEmbeddingsForm, Values
from shared.trainable.base import Rate, TrainableGroup, TrainablePart
from shared.trainable.branch import BranchAdapter, place_of


class MotionEmbeddings(TrainablePart):
    """Motion Inversion's embeddings (https://arxiv.org/abs/2403.20193) at temporal attention: one per frame for queries and
    keys, one per frame and position for values; all start at 0.

    They are made for clips of `frames` frames and `resolution` pixels, and resized for others. The values' embeddings depend
    on position and could therefore store appearance; outside training, only their differences from frame to frame take effect.
    """

    taxonomy: ClassVar[str] = "motion embeddings"
    kind: Literal["motion_embeddings"] = "motion_embeddings"
    lr: Rate = 2e-2  # learning rate
    coarsest: Annotated[int, Field(ge=1, le=64)] | None = 2  # number of grids used, from the coarsest; null: all
    frames: Annotated[int, Field(ge=2, le=4096)] | None = None  # null: the backbone's own
    resolution: Side | None = None  # pixels; null: the backbone's own
    values: Values = "differences"  # what the values' embeddings add outside training

    @property
    def places(self) -> tuple[str, ...]:
        return ("temporal_attention",)

    def inject(self, backbone: Backbone, name: str, slot: str, seed: int) -> TrainableGroup:
        """Hooks the temporal attention layers and unfreezes the embeddings.

        Raises ValueError if no layer attends only between frames, or the number of frames or the size does not fit.
        """
        side, frames = self.resolution or backbone.resolution, self.frames or backbone.frames
        sites = [site for site in backbone.sites() if site.kind == "temporal"]
        if not sites or not frames:
            raise ValueError(
                f"trainable.{slot}: motion embeddings need layers that attend only between frames, and "
                f"{backbone.family} has none; learn the motion as a LoRA on queries and keys instead (motion_director_joint)"
            )
        *_, length, height, width = backbone.latent_shape(side, side, frames)
        scales = sorted({site.scale for site in sites}, reverse=True)[: self.coarsest]
        (component,) = backbone.noise_ranges
        network = backbone.components[component]
        tensors: dict[str, dict[str, Tensor]] = {}
        for site in (s for s in sites if s.scale in scales):
            first = f"{site.name}.to_q"
            channels = place_of(network, first)[1].in_features
            tensors[first] = _zeros(site, (height, width), length, channels)
        form = FrameEmbeddingsForm(values=self.values)
        adapter = BranchAdapter.inject(backbone, name, slot, component, form, tensors)
        adapter.requires_grad_(True)
        adapter.train(True)
        return TrainableGroup(slot, list(adapter.parameters()), self.lr, self.weight_decay)


def _zeros(site: Site, latent: tuple[int, int], frames: int, channels: int) -> dict[str, Tensor]:
    return {"qk": torch.zeros(frames, channels), "v": torch.zeros(*site.grid(*latent), frames, channels)}
