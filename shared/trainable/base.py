"""The base classes of trainable parts, which select the layers to train, and the parameter groups that parts return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, field_validator, model_validator
from torch import nn

from shared.backbones.module_roles import leaf_names
from shared.backbones.protocol import Backbone, Group
from shared.config import NAME, KindPart, NotNegative, unknown
from shared.trainable.layer_choice import Projection, block_names, of_blocks, of_projections, parse_ranges

MAIN = "main"  # the optimizer group of parts that do not set one


#: A learning rate. A value above the limit would overflow in one step, so it must be a typo.
Rate = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]


class TrainablePart(KindPart):
    """The base class of all parts that inject or unfreeze parameters."""

    lr: Rate = 1e-4  # learning rate
    group: Annotated[str, Field(pattern=NAME)] = MAIN  # the optimizer that trains the part (train.optimizers.GROUP)
    # the name under which the adapters are switched on and off; if empty, the concept's name
    adapter_set: Annotated[str, Field(pattern=f"({NAME})|^$")] = ""
    weight_decay: NotNegative | None = None  # if null, the optimizer's setting
    per_source: bool = False  # whether each picture or clip has its own adapter, which is not saved in the concept
    temporary: bool = False  # whether it is active only in training steps (of this and later phases) and not saved

    @model_validator(mode="after")
    def _one_name(self) -> TrainablePart:
        if self.per_source and self.adapter_set:
            raise ValueError("per_source gives each picture or clip its own adapter set, so leave out adapter_set")
        if self.temporary and not self.adapter_set:
            raise ValueError("a temporary part needs its own adapter set; set adapter_set=NAME")
        return self

    @property
    def places(self) -> tuple[str, ...]:
        """The roles whose modules the part trains. Empty for parts that do not select modules by role."""
        return ()


class OnRoles(TrainablePart):
    """The base class of parts that apply to the modules of `roles`, or to a selection of these modules.

    In models that attend jointly over space and time, no role is specific to motion. In such models, `projections` can
    separate motion from appearance. Queries and keys determine which positions are attended to, while values and
    outputs determine what is read from those positions (TAP+AH, https://arxiv.org/abs/2501.16714).
    """

    roles: Annotated[tuple[str, ...], Field(min_length=1)]
    projections: tuple[Projection, ...] = ()  # only these attention projections; if empty, all modules
    blocks: str = ""  # only modules in these blocks of each network, such as "0-9,12", counted from 0; if empty, all
    networks: tuple[str, ...] = ()  # only these networks, such as Wan 2.2's low-noise "transformer_2"; if empty, all

    @field_validator("blocks")
    @classmethod
    def _ranges(cls, blocks: str) -> str:
        if blocks:
            parse_ranges(blocks)
        return blocks

    @property
    def places(self) -> tuple[str, ...]:
        return self.roles

    def modules(self, backbone: Backbone, slot: str) -> tuple[dict[str, list[str]], tuple[str, ...]]:
        """Returns the sorted dotted names of the selected modules by component, and a note for each port.

        A port is a role for which other layers stand in.

        Raises ValueError when this backbone lacks one of the roles, blocks or networks, or when none of a role's modules is
        selected.
        """
        chosen = []
        for role in self.roles:
            groups = [group for group in backbone.group(role) if self._is_chosen(group.component, backbone, slot)]
            kept = {group: self._chosen(group, backbone, slot) for group in groups}
            if not any(kept.values()):
                said = {k: v for k in ("projections", "blocks", "networks") if (v := getattr(self, k))}
                asked = ", ".join(f"{k}={v if isinstance(v, str) else list(v)}" for k, v in said.items())
                raise ValueError(f"trainable.{slot}: {asked} selects no layers of the role {role!r}")
            chosen += [(group, names) for group, names in kept.items() if names]
        targets: dict[str, set[str]] = {}
        for group, names in chosen:
            targets.setdefault(group.component, set()).update(names)
        ports = dict.fromkeys(f"{group.role}: {group.note}" for group, _ in chosen if group.resolution == "port")
        return {component: sorted(names) for component, names in targets.items()}, tuple(ports)

    def _is_chosen(self, component: str, backbone: Backbone, slot: str) -> bool:
        for name in self.networks:
            if name not in backbone.components:
                raise ValueError(f"trainable.{slot}.networks: {unknown(name, backbone.components, 'network')}")
        return not self.networks or component in self.networks

    def _chosen(self, group: Group, backbone: Backbone, slot: str) -> list[str]:
        names = list(group.modules)
        if self.projections:
            names = of_projections(names, self.projections)
        if self.blocks:
            blocks, numbers = block_names(leaf_names(backbone.components[group.component])), parse_ranges(self.blocks)
            if numbers[-1] >= len(blocks):
                there = f"{group.component} has {len(blocks)} block{'s' if len(blocks) != 1 else ''}, counted from 0"
                raise ValueError(f"trainable.{slot}.blocks = {self.blocks!r}: there is no block {numbers[-1]}; {there}")
            names = of_blocks(names, numbers, blocks)
        return names


@dataclass(frozen=True)
class TrainableGroup:
    """Parameters that a part injected or unfroze, with their training settings."""

    slot: str
    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float | None = None  # if None, the optimizer's setting
    touches_text: bool = False  # whether training changes the text context, so that it cannot be cached
    group: str = MAIN  # the optimizer group
    ports: tuple[str, ...] = ()  # notes on ports (see `OnRoles.modules`); recorded in the concept
