"""Adds branches (small trainable functions) alongside a network's layers, and removes them without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shared.backbones.protocol import Backbone
from shared.io.branch_settings import BottleneckForm, BranchForm, BranchSettings
from shared.trainable.branch_forms import Bottleneck, Branch, FrameEmbeddings, Grid
from shared.trainable.wrapped_layers import is_wrapped

#: How the name of the first linear layer ends, in an attention layer and in a feed-forward network.
FIRST = (".to_q", ".net.0.proj")


class BranchAdapter:
    """An adapter (`shared.backbones.protocol.Adapter`) that consists of branches in one component.

    Each branch is attached to an attention layer or a feed-forward network, called the branch's place. A place is
    identified by the name of its first linear layer (`….attn2.to_q`). Branches are hooks rather than submodules, so the
    network's module names, repr and state dict do not change. If a branch adds something to a layer's input, only the
    layer's own weights receive the sum. Other adapters on that layer receive the original input.
    """

    def __init__(self, backbone: Backbone, component: str, slot: str, form: BranchForm) -> None:
        self.component, self.slot, self.form = component, slot, form
        self.model = backbone.components[component]
        self.branches: dict[str, Branch] = {}
        self._grid = Grid({site.name: site for site in backbone.sites()})
        self._handles: list[RemovableHandle] = []

    @classmethod
    def inject(
        cls,
        backbone: Backbone,
        name: str,
        slot: str,
        component: str,
        form: BranchForm,
        tensors: Mapping[str, Mapping[str, Tensor]],
    ) -> BranchAdapter:
        """Attaches the branches and registers the adapter under a concept's name.

        The adapter starts frozen, at strength 1 unless the name already has another strength.

        Args:
            tensors: the first layer of each place -> the initial tensors of its branch, under the form's own keys

        Raises:
            ValueError: when this model lacks one of the places, or when tensors do not match their place
        """
        adapter = cls(backbone, component, slot, form)
        make = Bottleneck if isinstance(form, BottleneckForm) else FrameEmbeddings
        for first, state in tensors.items():
            place, layer = place_of(adapter.model, first)
            if layer is None:
                raise ValueError(f"{slot}.{component}: this model has no place {first!r} for a branch")
            branch = make(form, place, adapter._grid)  # type: ignore[arg-type]
            branch.start(state, layer.in_features, layer.weight.device, f"{slot}.{component}.{first}")
            adapter.branches[first] = branch
        watched = adapter.model.register_forward_pre_hook(adapter._grid.look)
        adapter._handles = [watched, *(h for first, b in adapter.branches.items() for h in adapter._hook(first, b))]
        backbone.add_adapter(name, adapter)
        return adapter

    def _hook(self, first: str, branch: Branch) -> Iterator[RemovableHandle]:
        place = self.model.get_submodule(branch.place)
        yield from branch.hook(place, unwrapped)

    @property
    def settings(self) -> BranchSettings:
        """The settings that are saved along with the tensors."""
        return BranchSettings(form=self.form, layers=tuple(self.branches))

    def parameters(self) -> Iterator[nn.Parameter]:
        for branch in self.branches.values():
            yield from branch.parameters.values()

    def requires_grad_(self, on: bool) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(on)

    def train(self, mode: bool) -> None:
        for branch in self.branches.values():
            branch.training = mode

    def set_strength(self, strength: float) -> None:
        for branch in self.branches.values():
            branch.strength = strength

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{self.component}.{first}.{key}": parameter.detach().float().cpu().contiguous().clone()
            for first, branch in self.branches.items()
            for key, parameter in branch.parameters.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        mine = {
            f"{self.component}.{first}.{key}": parameter
            for first, branch in self.branches.items()
            for key, parameter in branch.parameters.items()
        }
        missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        if missing or extra:
            raise ValueError(
                f"the branches do not fit {self.component}: {len(missing)} tensors missing, {len(extra)} unknown, "
                f"for example {(missing + extra)[0]!r}"
            )
        for key, tensor in state.items():
            if tensor.shape != mine[key].shape:
                raise ValueError(
                    f"branch tensor {key!r} has shape {list(tensor.shape)}, but this model needs "
                    f"{list(mine[key].shape)}"
                )
            mine[key].copy_(tensor)

    def eject(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.branches = [], {}


class HasInput(Protocol):
    """A linear layer."""

    in_features: int
    weight: Tensor


def unwrapped(layer: Any) -> Any:
    """Returns the layer itself, without the adapters that wrap it."""
    while is_wrapped(layer):
        layer = layer.get_base_layer()
    return layer


def place_of(model: nn.Module, first: str) -> tuple[str, Any]:
    """Returns the name and the first layer of the place that `first` identifies, or ("", None) if there is none."""
    end = next((end for end in FIRST if first.endswith(end)), None)
    if end is None:
        return "", None
    try:
        layer = unwrapped(model.get_submodule(first))
    except AttributeError:
        return "", None
    return (first.removesuffix(end), layer) if isinstance(layer, nn.Linear) else ("", None)


def places_among(layers: Sequence[str]) -> list[str]:
    """Returns only those layers that are the first layer of a place."""
    return [name for name in layers if name.endswith(FIRST)]
