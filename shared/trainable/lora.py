"""LoRA and DoRA (https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2402.09353)."""

from __future__ import annotations

from typing import Annotated, Literal

from peft import LoraConfig
from pydantic import Field

from shared.backbones.protocol import Backbone
from shared.trainable.adapter import PeftAdapter
from shared.trainable.base import OnRoles, TrainableGroup, modules_of


class Lora(OnRoles):
    """W' = W + (alpha / rank) B A on the modules of `roles`; B starts at 0, so the start is the identity."""

    kind: Literal["lora"] = "lora"
    roles: tuple[str, ...] = ("cross_attention", "self_attention")
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: float | None = None  # None: equal to rank, that is a scale of 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dora: bool = False  # magnitude and direction apart; the norm is treated as constant in backward

    @property
    def taxonomy(self) -> str:
        return "DoRA" if self.dora else "LoRA"

    def inject(self, backbone: Backbone, name: str, slot: str, seed: int) -> TrainableGroup:
        """Inject into every component that the roles reach and unfreeze the new weights."""
        targets, ports = modules_of(backbone, self.roles)
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
