"""Trains with a chosen peft method, such as OFT, LoKr, LoHa, IA3 or BOFT (https://github.com/huggingface/peft)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from shared.backbones.protocol import Backbone
from shared.config import Real, unknown
from shared.trainable.adapter import PeftAdapter, config_from_dict
from shared.trainable.base import OnRoles, TrainableGroup
from shared.trainable.peft_types import ADAPTER_TYPES, UNSUPPORTED, unsuited, why_not

Number = Annotated[int, Field(ge=-(2**31), le=2**31)] | Real  # integers may be large because some settings are seeds
Plain = bool | Number | str | dict[str, Number]


class Peft(OnRoles):
    """Trains the modules of `roles` with the peft method named `type`, using peft's own `settings`.

    The adapter starts as the exact identity, except for DEFT and HRA. These multiply reflections, so they start with
    rounding errors of about 1e-6. If a method cannot be trained, saved or removed again, the error gives the reason.
    """

    kind: Literal["peft"] = "peft"
    type: str  # the method's name in peft's spelling, such as "OFT"
    roles: tuple[str, ...] = ("cross_attention", "self_attention")
    settings: dict[str, Plain] = {}

    @property
    def taxonomy(self) -> str:
        return self.type

    @model_validator(mode="after")
    def _known(self) -> Peft:
        if self.type not in ADAPTER_TYPES:
            known = self.type in UNSUPPORTED
            raise ValueError(why_not(self.type) if known else unknown(self.type, ADAPTER_TYPES, "adapter type"))
        config = type(config_from_dict({"peft_type": self.type, **ADAPTER_TYPES[self.type].fixed}))
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        for key, value in self.settings.items():
            if key not in ADAPTER_TYPES[self.type].settings:
                raise ValueError(f"settings of {self.type}: {unknown(key, ADAPTER_TYPES[self.type].settings)}")
            _check_value(f"settings.{key}", value, defaults[key])
        if self.type == "HRA" and self.settings.get("r", 8) % 2:  # type: ignore[operator]
            raise ValueError(f"settings.r = {self.settings['r']}: HRA starts as the identity only if r is even")
        return self

    def inject(self, backbone: Backbone, name: str, slot: str, seed: int) -> TrainableGroup:
        """Injects trainable adapters into every component in which the roles have modules.

        Raises ValueError when the roles include layers that this method cannot adapt, or when its settings are
        unsuitable.
        """
        targets, ports = self.modules(backbone, slot)
        for component, modules in targets.items():
            network = backbone.components[component]
            bad = unsuited(self.type, {m: _kernel(network.get_submodule(m)) for m in modules})
            if bad:
                raise ValueError(
                    f"trainable.{slot}: {self.type} adapts only {ADAPTER_TYPES[self.type].layers} layers, which excludes "
                    f"{len(bad)} of the {len(modules)} layers that roles={list(self.roles)} selects in {component}, "
                    f"for example {bad[0]}; choose other roles or another type"
                )
        adapters = []
        try:
            for component, modules in targets.items():
                config = config_from_dict({**self._plain_config(), "target_modules": modules})
                adapters.append(PeftAdapter.inject(backbone, name, slot, component, config, seed))
        except ValueError as error:
            for adapter in adapters:
                backbone.adapters[name].remove(adapter)
                adapter.eject()
            raise ValueError(f"trainable.{slot}: {error}") from None
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

    def _plain_config(self) -> dict[str, Any]:
        return {"peft_type": self.type, **ADAPTER_TYPES[self.type].fixed, **self.settings}


def _kernel(module: nn.Module) -> tuple[int, ...]:
    """Returns the kernel size of a convolution, or () for a linear layer. Looks inside adapters that wrap the layer."""
    base: Any = getattr(module, "base_layer", module)
    while hasattr(base, "base_layer"):
        base = base.base_layer
    return tuple(getattr(base, "kernel_size", ()))


def _check_value(key: str, value: Plain, default: Any) -> None:
    """Raises ValueError if peft's default is a bool, int, float or str, and the value has a different type."""
    for kind in (bool, int, float, str):
        if type(default) is kind:
            fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
            if not fits or (kind is not bool and isinstance(value, bool)):
                raise ValueError(f"{key} = {value!r} must be of the same type as peft's default, {default!r}")
