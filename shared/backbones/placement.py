"""Where a model's networks are: on the device that computes, or in main memory until they are used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

#: Of a GPU's free memory, what networks may take together; the rest is for activations, gradients and pictures.
SHARE = 0.7


def to_evict(
    present: Sequence[str], sizes: Mapping[str, int], needed: str, budget: int, pinned: Collection[str] = ()
) -> list[str]:
    """Which networks must leave the device so that `needed` fits beside the others.

    Args:
        present: those on the device, the least recently used first
        sizes: bytes of each
        budget: bytes for all of them
        pinned: those that stay, whatever it costs

    Returns:
        as few as possible, in that order; all that may go where even that is not enough
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
    """ValueError when the largest network alone does not fit into the free memory (bytes)."""
    name = max(sizes, key=lambda n: sizes[n])
    if sizes[name] > free:
        raise ValueError(
            f"the {name} takes {sizes[name] / 2**30:.1f} GiB, and {device} has {free / 2**30:.1f} GiB free: "
            "choose a smaller model, a smaller precision (--precision bf16), or --device cpu"
        )


def size_of(network: nn.Module) -> int:
    """Bytes of its parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


class Placement:
    """Moves networks to the device when they are used, and the least recently used ones away when room is short.

    A network that holds parameters in training never leaves: a backward pass wants them where the forward pass had
    them, and their optimizer's moments are beside them.

    Args:
        networks: by name
        device: that computes
        budget: bytes for all networks on the device; None: room for all
    """

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device, budget: int | None = None) -> None:
        self.networks, self.device, self.budget = dict(networks), device, budget
        self.present: list[str] = [] if budget is not None else list(networks)  # the least recently used first
        self._handles: list[Any] = []

    def watch(self) -> None:
        """From now on, every call of a network brings it to the device first."""
        for name, network in self.networks.items():
            self._handles.append(network.register_forward_pre_hook(_Use(self, name)))

    def close(self) -> None:
        """Calls move nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def use(self, name: str) -> None:
        """This network is on the device; others have left where there was no room for all."""
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
        """These networks wait in main memory."""
        away = [n for n in names if n in self.present]
        for name in away:
            self._move(name, torch.device("cpu"))
            self.present.remove(name)
        if away and self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def away(self) -> set[str]:
        """The networks that are in main memory now."""
        return self.networks.keys() - set(self.present)

    def _pinned(self) -> set[str]:
        return {n for n in self.present if any(p.requires_grad for p in self.networks[n].parameters())}

    def _move(self, name: str, device: torch.device) -> None:
        self.networks[name].to(device)

    def __deepcopy__(self, memo: Any) -> Placement:
        return self  # a copied network shares its weights with one that is placed here, or has none to place


class _Use:
    """A hook before a network's forward pass."""

    def __init__(self, placement: Placement, name: str) -> None:
        self.placement, self.name = placement, name

    def __call__(self, module: nn.Module, _args: Any) -> None:
        self.placement.use(self.name)
        if module is not self.placement.networks[self.name]:  # a copy, with some weights of its own
            module.to(self.placement.device)


def place(
    backbone: Any,
    device: torch.device,
    budget: int | None = None,
    free: Callable[[torch.device], int] | None = None,
) -> None:
    """Everything on `device` where it fits together, else networks that take turns there.

    Args:
        backbone: in main memory
        budget: bytes for all networks; default `SHARE` of what is free on a GPU, no limit elsewhere
        free: bytes free on a device; default what CUDA says

    Raises:
        ValueError: the largest network alone is larger than the device
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
