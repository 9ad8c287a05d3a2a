"""LoRA and DoRA (https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2402.09353)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch.nn.init import orthogonal_

from shared.backbones.protocol import Backbone
from shared.config import Real
from shared.trainable.adapter import PeftAdapter
from shared.trainable.base import OnRoles, TrainableGroup


class Lora(OnRoles):
    """Adds (alpha / rank) B A to the weights W of the modules of `roles`. B starts at 0, so W is unchanged at first.

    With `min_rank`, this is T-LoRA (https://arxiv.org/abs/2507.05964, section 3), W' = W + (alpha / rank) B M_t A,
    where the mask M_t keeps the first r(t) directions. Without noise, all directions are kept. At full noise, where
    training on a few pictures overfits most strongly to their poses and layouts, only the first `min_rank` are kept.
    The mask is also applied during sampling.
    """

    kind: Literal["lora"] = "lora"
    roles: tuple[str, ...] = ("cross_attention", "self_attention")
    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    alpha: Real | None = None  # if null, equal to rank, so that the scale is 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # the probability that an input of A is set to 0 in training
    min_rank: Annotated[int, Field(ge=0, le=4096)] | None = None  # rank at full noise; if null, always the full rank
    orthogonal: bool = False  # whether A starts with orthonormal rows, so that no two directions overlap
    dora: bool = False  # whether to train magnitude and direction separately (DoRA); no gradient flows through the norm

    @property
    def taxonomy(self) -> str:
        name = "DoRA" if self.dora else "LoRA"
        return f"{name} with noise-dependent rank" if self.min_rank is not None else name

    @model_validator(mode="after")
    def _rank_can_fall(self) -> Lora:
        if self.min_rank is not None and self.min_rank > self.rank:
            raise ValueError(f"min_rank = {self.min_rank} must not exceed rank = {self.rank}")
        if self.min_rank is not None and self.dora:
            raise ValueError(
                "min_rank does not work with dora, whose magnitude belongs to the full rank; leave out one of the two"
            )
        return self

    def inject(self, backbone: Backbone, name: str, slot: str, seed: int) -> TrainableGroup:
        """Injects trainable LoRA layers into every component in which the roles have modules."""
        from peft import LoraConfig

        targets, ports = self.modules(backbone, slot)
        text = sorted(c for c in targets if c.startswith("text_encoder"))
        if self.min_rank is not None and text:
            raise ValueError(
                f"trainable.{slot}.min_rank: {text[0]} has no noise level; train it with another part, without min_rank"
            )
        adapters = []
        for component, modules in targets.items():
            config = LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha if self.alpha is not None else self.rank,  # type: ignore[arg-type]
                lora_dropout=self.dropout,
                use_dora=self.dora,
                target_modules=modules,
            )
            adapters.append(PeftAdapter.inject(backbone, name, slot, component, config, seed))
        for adapter in adapters:
            if self.orthogonal:
                _orthonormal(adapter, seed)
            if self.min_rank is not None:
                adapter.let_rank_fall(backbone, self.min_rank)
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


def _orthonormal(adapter: PeftAdapter, seed: int) -> None:
    """Makes the rows of A ([r, in, …]) orthonormal in every layer, or its columns if A has more rows than columns."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter.layers:
        weight = layer.lora_A[adapter.peft_name].weight
        weight.data = orthogonal_(torch.empty(weight.shape), generator=generator).to(weight.device)
