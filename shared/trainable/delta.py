"""Changed weights, kept as differences, so that they have a strength and leave without a trace."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from shared.backbones.protocol import Backbone

_count = itertools.count()


class DeltaAdapter:
    """W = W_0 + sum of strength * delta over all delta adapters on W; satisfies `shared.backbones.protocol.Adapter`.

    The original bytes are kept while any delta is there; at strength 0 and after `eject` they are back exactly.
    """

    def __init__(
        self, backbone: Backbone, slot: str, targets: Mapping[str, nn.Parameter], deltas: Mapping[str, Tensor]
    ) -> None:
        self.backbone, self.slot, self.targets = backbone, slot, dict(targets)
        self.deltas = {k: nn.Parameter(v.detach().float().clone(), requires_grad=False) for k, v in deltas.items()}
        self.strength = 0.0
        self.number = next(_count)  # sums keep the order of injection, so that what was switched off comes back exactly

    @classmethod
    def inject(cls, backbone: Backbone, name: str, slot: str, deltas: Mapping[str, Tensor]) -> DeltaAdapter:
        """Register the deltas under a concept's name; they act at once, at that name's strength.

        Args:
            slot: which of the recipe's parts they are; several under one concept stay apart by it
            deltas: "{component}.{path of the parameter}" -> its change, in the parameter's shape

        Raises:
            ValueError: when a parameter does not exist here, or has another shape
        """
        targets = {key: find_parameter(backbone, key) for key in deltas}
        unknown = sorted(k for k, p in targets.items() if p is None)
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(deltas)} changed weights are not in this model, for example {unknown[0]!r}"
            )
        for key, parameter in targets.items():
            if parameter is not None and parameter.shape != deltas[key].shape:
                raise ValueError(
                    f"changed weight {key!r} is {list(deltas[key].shape)}, this model has {list(parameter.shape)}"
                )
        adapter = cls(backbone, slot, {k: p for k, p in targets.items() if p is not None}, deltas)
        backbone.add_adapter(name, adapter)
        return adapter

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self.deltas.values())

    def set_strength(self, strength: float) -> None:
        """Writes the weights anew; 0 restores the original bytes."""
        if strength == self.strength:
            return
        self.strength = strength
        for key, parameter in self.targets.items():
            _write(parameter, self, self.deltas[key], strength)

    def state_dict(self) -> dict[str, Tensor]:
        return {k: v.detach().float().cpu().contiguous().clone() for k, v in self.deltas.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != set(self.deltas):
            missing, extra = len(set(self.deltas) - set(state)), len(set(state) - set(self.deltas))
            raise ValueError(f"changed weights do not fit: {missing} missing, {extra} unknown")
        for key, tensor in state.items():
            if tensor.shape != self.deltas[key].shape:
                raise ValueError(
                    f"changed weight {key!r} is {list(tensor.shape)}, this model has {list(self.deltas[key].shape)}"
                )
        for key, tensor in state.items():
            self.deltas[key].copy_(tensor)
        strength, self.strength = self.strength, 0.0
        self.set_strength(strength)

    def eject(self) -> None:
        self.set_strength(0.0)
        self.targets, self.deltas = {}, {}


class _Stack:
    """The original of one parameter, and the deltas that act on it now. It lives on the parameter."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.original = parameter.detach().clone()
        self.parts: dict[DeltaAdapter, tuple[Tensor, float]] = {}


@torch.no_grad()
def _write(parameter: Any, owner: DeltaAdapter, delta: Tensor, strength: float) -> None:
    """Let `owner` act on the parameter with this strength (0: not any more), beside the others that do."""
    stack: _Stack | None = getattr(parameter, "_delta_stack", None)
    if stack is None:
        stack = parameter._delta_stack = _Stack(parameter)
    if strength:
        stack.parts[owner] = (delta, strength)
    else:
        stack.parts.pop(owner, None)
    original = stack.original.to(parameter.device)
    if not stack.parts:
        del parameter._delta_stack
        parameter.data.copy_(original)
        return
    total = original.float()
    for _, (change, factor) in sorted(stack.parts.items(), key=lambda part: part[0].number):
        total = total + factor * change.to(total.device)
    parameter.data.copy_(total)


def find_parameter(backbone: Backbone, key: str) -> nn.Parameter | None:
    """The parameter that a key names, also where an adapter has wrapped its module since."""
    component, _, path = key.partition(".")
    module = backbone.components.get(component)
    *parents, leaf = path.split(".")
    for part in parents:
        if module is None:
            return None
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        module = module._modules.get(part)
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    found = None if module is None else module._parameters.get(leaf)
    return found if isinstance(found, nn.Parameter) else None
