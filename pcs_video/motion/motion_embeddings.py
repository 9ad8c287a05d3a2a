"""Learns a motion as vectors that are added to the inputs of temporal attention."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Motion Inversion's embeddings (https://arxiv.org/abs/2403.20193) for temporal attention layers. Queries and keys get one
    embedding per frame, and values get one per frame and position. All start at 0.

    The embeddings are made for clips of `frames` frames and `resolution` pixels, and are resized for other clips. The
    value embeddings depend on the position and could therefore store appearance. By default, only their differences
    from frame to frame take effect outside training.
    """

    taxonomy: ClassVar[str] = "motion embeddings"
    kind: Literal["motion_embeddings"] = "motion_embeddings"
    lr: Rate = 2e-2  # learning rate
    # train only the layers at this many grid sizes, starting with the coarsest; null for all layers
    coarsest: Annotated[int, Field(ge=1, le=64)] | None = 2
    frames: Annotated[int, Field(ge=2, le=4096)] | None = None  # frames per clip; null for the backbone's own
    resolution: Side | None = None  # pixels; null for the backbone's own
    values: Values = "differences"  # what the value embeddings add outside training

    @property
    def places(self) -> tuple[str, ...]:
        return ("temporal_attention",)

    @property
    def frame_counts(self) -> Mapping[str, int]:
        return {} if self.frames is None else {"frames": self.frames}

    def inject(self, backbone: Backbone, name: str, slot: str, seed: int) -> TrainableGroup:
        """Adds trainable embeddings to the temporal attention layers.

        Raises ValueError if no layer attends only between frames, or if the model does not support the frame count or the
        size.
        """
        side, frames = self.resolution or backbone.resolution, self.frames or backbone.frames
        sites = [site for site in backbone.sites() if site.kind == "temporal"]
        if not sites or not frames:
            raise ValueError(
                f"trainable.{slot}: motion embeddings need layers that attend only between frames, but "
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
