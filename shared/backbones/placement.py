"""Keeps a model's networks on the device. If they do not all fit, keeps them in main memory until they are used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

#: The share of a GPU's free memory that networks may take; the rest is for activations, gradients and pictures.
SHARE = 0.7


def to_evict(
    present: Sequence[str], sizes: Mapping[str, int], needed: str, budget: int, pinned: Collection[str] = ()
) -> list[str]:
    """Returns the networks that must leave the device so that `needed` fits alongside the remaining ones.

    Args:
        present: the networks on the device, least recently used first
        sizes: the size of each network, in bytes
        budget: the maximum total size of the networks on the device, in bytes
        pinned: the networks that must stay

    Returns:
        as few networks as possible, starting with the least recently used. If `needed` does not fit even then, all networks
        that may leave
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
    """Raises ValueError when the largest network alone does not fit into `free` bytes."""
    name = max(sizes, key=lambda n: sizes[n])
    if sizes[name] > free:
        raise ValueError(
            f"the {name} takes {sizes[name] / 2**30:.1f} GiB, but {device} has only {free / 2**30:.1f} GiB free: "
            "use a smaller model, a lower precision (--precision bf16), or --device cpu"
        )


def size_of(network: nn.Module) -> int:
    """Returns the total size of a network's parameters and buffers, in bytes."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


class Placement:
    """Moves networks to the device when they are used, and moves the least recently used ones away when memory is short.

    A network with trainable parameters never leaves the device, because the backward pass needs those parameters where the
    forward pass used them, and the optimizer's moments are also on the device.

    Args:
        networks: the networks by name
        device: the device used for computation
        budget: the maximum total size of the networks on the device, in bytes. If None, there is no limit
    """

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device, budget: int | None = None) -> None:
        self.networks, self.device, self.budget = dict(networks), device, budget
        self.present: list[str] = [] if budget is not None else list(networks)  # least recently used first
        self._handles: list[Any] = []

    def watch(self) -> None:
        """Registers hooks that move each network to the device before it is called."""
        for name, network in self.networks.items():
            self._handles.append(network.register_forward_pre_hook(_Use(self, name)))

    def close(self) -> None:
        """Removes the hooks, so that calls no longer move networks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def use(self, name: str) -> None:
        """Moves this network to the device. If there is not enough room, first moves other networks to main memory."""
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
        return self  # a copied network that still has this hook shares the original network's placement


class _Use:
    """A forward pre-hook that moves its network to the device."""

    def __init__(self, placement: Placement, name: str) -> None:
        self.placement, self.name = placement, name

    def __call__(self, module: nn.Module, _args: Any) -> None:
        self.placement.use(self.name)
        if module is not self.placement.networks[self.name]:  # a copy that does not share all weights
            module.to(self.placement.device)


def place(
    backbone: Any,
    device: torch.device,
    budget: int | None = None,
    free: Callable[[torch.device], int] | None = None,
) -> None:
    """Moves all of a backbone's networks to `device` if they all fit. Otherwise, makes them take turns on it.

    Args:
        backbone: a backbone whose networks are in main memory
        device: the device used for computation
        budget: the maximum total size of the networks on the device, in bytes. By default, `SHARE` of the free memory on
            a GPU, and no limit elsewhere
        free: a function that returns the number of free bytes on a device. By default, CUDA reports it

    Raises:
        ValueError: if the largest network alone does not fit into the device's free memory
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
