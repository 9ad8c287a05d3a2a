"""Decides where a model's networks are: on the device, or in main memory until they are used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

#: The share of a GPU's free memory for networks; the rest is for activations, gradients and pictures.
SHARE = 0.7


def to_evict(
    present: Sequence[str], sizes: Mapping[str, int], needed: str, budget: int, pinned: Collection[str] = ()
) -> list[str]:
    """Returns the networks that must leave the device so that `needed` fits alongside the others.

    Args:
        present: the networks on the device, least recently used first
        sizes: bytes of each network
        budget: bytes for all networks on the device
        pinned: the networks that must stay

    Returns:
        just enough networks from `present`, in its order, or all that may leave if even these are not enough
    """
    total = sum(sizes[n] for n in {*present, needed})
    out = []
    for name in present:
        if total <= budget:
            break
        if name != needed and name not in pinned:
            out.append(name)
            total -= sizes[name]
    return out


def check_budget(sizes: Mapping[str, int], free: int, device: str) -> None:
    """Raises ValueError when even the largest network does not fit into the free memory (bytes)."""
    name = max(sizes, key=lambda n: sizes[n])
    if sizes[name] > free:
        raise ValueError(
            f"the {name} takes {sizes[name] / 2**30:.1f} GiB, but {device} has only {free / 2**30:.1f} GiB free: "
            "choose a smaller model, a lower precision (--precision bf16), or --device cpu"
        )


def size_of(network: nn.Module) -> int:
    """Returns the total bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


class Placement:
    """Moves networks to the device when they are used, and the least recently used ones away when memory is short.

    A network with parameters being trained never leaves: the backward pass needs them where the forward pass had them, and
    their optimizer moments are on the same device.

    Args:
        networks: by name
        device: the device used for computation
        budget: bytes for all networks on the device; None: no limit
    """

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device, budget: int | None = None) -> None:
        self.networks, self.device, self.budget = dict(networks), device, budget
        self.present: list[str] = [] if budget is not None else list(networks)  # least recently used first
        self._handles: list[Any] = []

    def watch(self) -> None:
        """Registers hooks that bring each network to the device before it is called."""
        for name, network in self.networks.items():
            self._handles.append(network.register_forward_pre_hook(_Use(self, name)))

    def close(self) -> None:
        """Removes the hooks, so that calls no longer move networks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def use(self, name: str) -> None:
        """Brings this network to the device; others leave if there is not enough room."""
        if name in self.present:
            if self.present[-1] != name:
                self.present.remove(name)
                self.present.append(name)
            return
        if self.budget is not None:
            sizes = {n: size_of(self.networks[n]) for n in {*self.present, name}}
            self.send_away(*to_evict(self.present, sizes, name, self.budget, self._pinned()))
        self._move(name, self.device)
        self.present.append(name)

    def send_away(self, *names: str) -> None:
        """Moves these networks to main memory."""
        away = [n for n in names if n in self.present]
        for name in away:
            self._move(name, torch.device("cpu"))
            self.present.remove(name)
        if away and self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def away(self) -> set[str]:
        """The networks that are currently in main memory."""
        return self.networks.keys() - set(self.present)

    def _pinned(self) -> set[str]:
        return {n for n in self.present if any(p.requires_grad for p in self.networks[n].parameters())}

    def _move(self, name: str, device: torch.device) -> None:
        self.networks[name].to(device)

    def __deepcopy__(self, memo: Any) -> Placement:
        return self  # a copied network shares its weights with one that is placed here, or has none to place


class _Use:
    """A network's forward pre-hook, which brings it to the device."""

    def __init__(self, placement: Placement, name: str) -> None:
        self.placement, self.name = placement, name

    def __call__(self, module: nn.Module, _args: Any) -> None:
        self.placement.use(self.name)
        if module is not self.placement.networks[self.name]:  # a copy that has some weights of its own
            module.to(self.placement.device)


def place(
    backbone: Any,
    device: torch.device,
    budget: int | None = None,
    free: Callable[[torch.device], int] | None = None,
) -> None:
    """Moves all networks to `device` if they all fit at once; otherwise makes them take turns there.

    Args:
        backbone: its networks are in main memory
        budget: bytes for all networks; default `SHARE` of the free memory on a GPU, no limit elsewhere
        free: returns the free bytes on a device; default: as reported by CUDA

    Raises:
        ValueError: if even the largest network does not fit into the device's free memory
    """
    networks = {**backbone.components, "vae": backbone.vae}
    sizes = {name: size_of(network) for name, network in networks.items()}
    if budget is None and (free is not None or device.type == "cuda"):
        room = free(device) if free is not None else torch.cuda.mem_get_info(device)[0]
        check_budget(sizes, room, str(device))
        budget = int(SHARE * room)
    if budget is None or sum(sizes.values()) <= budget:
        backbone.to(device)
        return
    if backbone.placement:
        backbone.placement.close()
    backbone.placement = Placement(networks, device, budget)
    backbone.placement.watch()
