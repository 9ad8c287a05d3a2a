"""Stores changed weights as differences, so that they can be scaled by a strength and removed exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from shared.backbones.protocol import Backbone
from shared.trainable.stack import stack_of
from shared.trainable.wrapped_layers import is_wrapped

_count = itertools.count()


class DeltaAdapter:
    """An adapter (`shared.backbones.protocol.Adapter`) that adds strength * delta to the network's weights W_0.

    The deltas of several such adapters on one weight add up. The original bytes are kept while any delta exists. They
    are restored, bit for bit, once every adapter on the weight is at strength 0 or has been ejected.
    """

    def __init__(
        self, backbone: Backbone, slot: str, targets: Mapping[str, nn.Parameter], deltas: Mapping[str, Tensor]
    ) -> None:
        self.backbone, self.slot, self.targets = backbone, slot, dict(targets)
        self.deltas = {k: nn.Parameter(v.detach().float().clone(), requires_grad=False) for k, v in deltas.items()}
        self.strength = 0.0
        # changes are summed in order of injection, so that switching one off and on again restores the exact values
        self.number = next(_count)

    @classmethod
    def inject(cls, backbone: Backbone, name: str, slot: str, deltas: Mapping[str, Tensor]) -> DeltaAdapter:
        """Registers the deltas under a concept's name. They take effect immediately, at that name's strength.

        Args:
            slot: the recipe slot that the deltas come from, which distinguishes the parts of one concept
            deltas: the change to each parameter, in the parameter's shape, by `{component}.{path of the parameter}`

        Raises:
            ValueError: if the model lacks one of the parameters, or has one with a different shape
        """
        targets = {key: find_parameter(backbone, key) for key in deltas}
        unknown = sorted(k for k, p in targets.items() if p is None)
        if unknown:
            raise ValueError(
                f"this model lacks {len(unknown)} of the {len(deltas)} changed weights, for example {unknown[0]!r}"
            )
        for key, parameter in targets.items():
            if parameter is not None and parameter.shape != deltas[key].shape:
                raise ValueError(
                    f"changed weight {key!r} has shape {list(deltas[key].shape)}, but this model needs "
                    f"{list(parameter.shape)}"
                )
        adapter = cls(backbone, slot, {k: p for k, p in targets.items() if p is not None}, deltas)
        backbone.add_adapter(name, adapter)
        return adapter

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self.deltas.values())

    def train(self, mode: bool) -> None:
        """Does nothing, because the weights are the same in training and outside it."""

    def set_strength(self, strength: float) -> None:
        """Rewrites the weights for this strength. Strength 0 removes the change exactly."""
        if strength == self.strength:
            return
        self.strength = strength
        for key, parameter in self.targets.items():
            stack_of(parameter).put(self, self.deltas[key].data, strength)

    def state_dict(self) -> dict[str, Tensor]:
        return {k: v.detach().float().cpu().contiguous().clone() for k, v in self.deltas.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.check(state, {k: d.shape for k, d in self.deltas.items()})
        for key, tensor in state.items():
            delta = self.deltas[key]
            delta.data = tensor.detach().to(delta.device, torch.float32, copy=True)
        strength, self.strength = self.strength, 0.0
        self.set_strength(strength)

    @staticmethod
    def check(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        """Raises ValueError unless the state has exactly these keys and shapes."""
        if set(state) != set(shapes):
            missing, extra = len(set(shapes) - set(state)), len(set(state) - set(shapes))
            raise ValueError(f"the changed weights do not fit this model: {missing} missing, {extra} unknown")
        for key, tensor in state.items():
            if tensor.shape != shapes[key]:
                raise ValueError(
                    f"changed weight {key!r} has shape {list(tensor.shape)}, but this model needs {list(shapes[key])}"
                )

    def eject(self) -> None:
        self.set_strength(0.0)
        self.targets, self.deltas = {}, {}


def find_parameter(backbone: Backbone, key: str) -> nn.Parameter | None:
    """Returns the parameter with this key, even if adapters have wrapped its module, or None if there is none."""
    component, _, path = key.partition(".")
    module = backbone.components.get(component)
    *parents, leaf = path.split(".")
    for part in parents:
        if module is None:
            return None
        if is_wrapped(module):
            module = module.get_base_layer()
        module = module._modules.get(part)
    if is_wrapped(module):
        module = module.get_base_layer()
    parameter = None if module is None else module._parameters.get(leaf)
    return parameter if isinstance(parameter, nn.Parameter) else None
