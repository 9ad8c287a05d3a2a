"""Trains existing weights of the network.

These can be all weights (DreamBooth, https://arxiv.org/abs/2208.12242) or, for example, only those of the keys and
values of cross-attention (Custom Diffusion, https://arxiv.org/abs/2212.04488).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from shared.backbones.protocol import Backbone
from shared.trainable.base import OnRoles, Rate, TrainableGroup
from shared.trainable.delta import DeltaAdapter, find_parameter
from shared.trainable.stack import Training, stack_of
from shared.trainable.wrapped_layers import is_wrapped


class Weights(OnRoles):
    """Trains the weights and biases of the modules of `roles` in fp32, and saves their changes.

    Besides gradients and optimizer state, this needs memory for the original weights, which are kept in the precision
    that the network was loaded in. Nothing is copied when the part is switched off, for example for a penalty's base
    prediction. At a strength between 0 and 1, one sum is computed for each weight.
    """

    taxonomy: ClassVar[str] = "weights"
    kind: Literal["weights"] = "weights"
    roles: tuple[str, ...] = ("cross_attention.kv",)  # "denoiser.all" for full fine-tuning
    lr: Rate = 5e-6  # learning rate

    def inject(self, backbone: Backbone, name: str, slot: str, seed: int) -> TrainableGroup:
        """Unfreezes the parameters of the roles' modules. Training starts from their current values.

        Raises ValueError if a role is unknown, if its modules have no parameters, or if another slot already trains them.
        """
        targets, ports = self.modules(backbone, slot)
        keys = weights_of(backbone, targets)
        if not keys:
            raise ValueError(f"roles={list(self.roles)}: these modules have no parameters to train")
        adapter = TrainedWeights.inject_training(backbone, name, slot, keys)
        adapter.requires_grad_(True)
        return TrainableGroup(
            slot=slot,
            parameters=list(adapter.parameters()),
            lr=self.lr,
            weight_decay=self.weight_decay,
            touches_text=any(key.startswith("text_encoder") for key in keys),
            ports=ports,
        )


def weights_of(backbone: Backbone, targets: Mapping[str, Sequence[str]]) -> list[str]:
    """Lists the parameters of these modules, without those of their submodules, as `{component}.{path}`."""
    keys = []
    for component, paths in targets.items():
        for path in paths:
            module: Any = backbone.components[component].get_submodule(path)
            while is_wrapped(module):
                module = module.get_base_layer()
            keys += [
                ".".join(p for p in (component, path, leaf) if p) for leaf, _ in module.named_parameters(recurse=False)
            ]
    return keys


class TrainedWeights(DeltaAdapter):
    """An adapter whose parameters are the network's own weights, and whose state is their change since training began.

    It computes W = W_0 + strength * delta. W has a gradient at strength 1; strength 0 restores the original bytes.
    """

    def __init__(self, backbone: Backbone, name: str, slot: str, targets: Mapping[str, nn.Parameter]) -> None:
        super().__init__(backbone, slot, targets, {})
        self.name = name
        self.training: dict[str, Training] = {}
        for key, parameter in self.targets.items():
            stack = stack_of(parameter)
            self.training[key] = stack.training = Training(stack, self)
        roots = {key.partition(".")[0] for key in targets}
        self._hooks = [backbone.components[c].register_forward_pre_hook(self._settle) for c in sorted(roots)]

    @classmethod
    def inject_training(cls, backbone: Backbone, name: str, slot: str, keys: list[str]) -> TrainedWeights:
        """Registers the weights with these keys. If another concept is still training some of them, ends that training.

        Raises ValueError if another slot of this concept trains one of the weights.
        """
        targets = {key: parameter for key in keys if (parameter := find_parameter(backbone, key)) is not None}
        assert len(targets) == len(keys)
        others = {id(o): o for p in targets.values() if (o := _trainer(p)) is not None}.values()
        for other in others:
            if other.name == name:
                raise ValueError(
                    f"trainable.{slot} and trainable.{other.slot} train the same weights; keep them in only one of the two"
                )
        for other in others:
            other.finish()
        adapter = cls(backbone, name, slot, targets)
        backbone.add_adapter(name, adapter)
        return adapter

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self.targets.values())

    def requires_grad_(self, on: bool) -> None:
        for parameter in self.targets.values():
            parameter.requires_grad_(on)

    def train(self, mode: bool) -> None:
        """Switches to training mode or back.

        In training mode, the weights are fp32, whatever the network's precision. Otherwise, they have the values that
        they would have after the concept is saved and loaded again.
        """
        for training in self.training.values():
            training.train(mode)

    def set_strength(self, strength: float) -> None:
        """Sets the strength. Strength 0 restores the original bytes."""
        if not self.training:
            return super().set_strength(strength)
        self.strength = strength
        for training in self.training.values():
            training.strength = strength
            training.stack.show()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Returns the changes in fp32 on the CPU, computed one weight at a time to avoid a full copy on the device."""
        if not self.training:
            return super().state_dict()
        return {key: t.delta().cpu().contiguous() for key, t in self.training.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if not self.training:
            return super().load_state_dict(state)
        self.check(state, {key: p.shape for key, p in self.targets.items()})
        for key, training in self.training.items():
            training.load(state[key])

    def finish(self) -> None:
        """Ends training. The adapter becomes an ordinary saved change, on which another change can build."""
        strength, self.strength = self.strength, 0.0
        self.deltas = {k: nn.Parameter(t.delta(), requires_grad=False) for k, t in self.training.items()}
        self._leave()
        self.set_strength(strength)

    def eject(self) -> None:
        if self.training:
            self._leave()
            self.strength = 0.0
        super().eject()

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for training in self.training.values():
            training.leave()
            training.stack.training = training.stack.parameter.grad = None
            training.stack.show()
        self.training, self._hooks = {}, []

    def _settle(self, _module: nn.Module, _args: Any) -> None:
        for training in self.training.values():  # some optimizers do not update the version counter
            training.settle(again=torch.is_grad_enabled())


def _trainer(parameter: nn.Parameter) -> TrainedWeights | None:
    stack = getattr(parameter, "_delta_stack", None)
    return stack.training.owner if stack is not None and stack.training is not None else None
