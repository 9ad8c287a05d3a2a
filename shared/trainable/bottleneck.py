"""Trains small networks alongside attention layers and feed-forward networks."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.io.branch_settings import BottleneckForm
from shared.trainable.base import OnRoles, Rate, TrainableGroup
from shared.trainable.branch import BranchAdapter, place_of, places_among


class Bottleneck(OnRoles):
    """Adds up(gelu(down(input))) to the output of the attention layers and feed-forward networks of `roles` (Houlsby et
    al., https://arxiv.org/abs/1902.00751; DreamVideo, https://arxiv.org/abs/2312.04433, section 3.2). `up` starts at 0,
    so the outputs do not change at first.

    Each bottleneck runs in parallel with a whole attention layer or feed-forward network. Such a layer or network is
    selected if a role contains its first linear layer (`to_q` or `net.0.proj`). Therefore, `cross_attention` and
    `cross_attention.q` are equivalent.
    """

    taxonomy: ClassVar[str] = "bottleneck adapters"
    kind: Literal["bottleneck"] = "bottleneck"
    roles: tuple[str, ...] = ("cross_attention",)
    width: Annotated[int, Field(ge=1, le=8192)] = 64  # hidden width of the bottleneck
    lr: Rate = 1e-5  # learning rate

    def inject(self, backbone: Backbone, name: str, slot: str, seed: int) -> TrainableGroup:
        """Adds a trainable bottleneck to every attention layer and feed-forward network that the roles select.

        Raises ValueError if the roles select only other kinds of layers in a component.
        """
        targets, ports = self.modules(backbone, slot)
        adapters = []
        draw = torch.Generator().manual_seed(seed)
        for component, layers in targets.items():
            places = places_among(layers)
            if not places:
                asked = f"roles={list(self.roles)}"
                raise ValueError(f"trainable.{slot}: {asked} selects no to_q or net.0.proj layer in {component}")
            network = backbone.components[component]
            tensors = {first: self._start(place_of(network, first)[1].in_features, draw) for first in places}
            adapters.append(BranchAdapter.inject(backbone, name, slot, component, BottleneckForm(), tensors))
        for adapter in adapters:
            adapter.requires_grad_(True)
            adapter.train(True)
        return TrainableGroup(
            slot=slot,
            parameters=[p for a in adapters for p in a.parameters()],
            lr=self.lr,
            weight_decay=self.weight_decay,
            touches_text=any(c.startswith("text_encoder") for c in targets),
            ports=ports,
        )

    def _start(self, width: int, draw: torch.Generator) -> dict[str, Tensor]:
        return {
            "down": torch.randn(self.width, width, generator=draw) * width**-0.5,
            "down_bias": torch.zeros(self.width),
            "up": torch.zeros(width, self.width),
            "up_bias": torch.zeros(width),
        }
