"""Saves memory while a phase runs, by recomputing activations and by offloading idle networks to main memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shared.backbones.placement import Placement
from shared.backbones.protocol import Backbone


@contextmanager
def recomputed(backbone: Backbone, on: bool) -> Iterator[None]:
    """Inside the context, the denoiser's activations are recomputed in the backward pass instead of being stored,
    which takes less memory but more time."""
    networks: list[Any] = [backbone.components[name] for name in backbone.noise_ranges] if on else []

    def run(module: Any, *args: Any) -> Any:
        return checkpoint(
            module.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), backbone.recomputing())
        )

    for network in networks:
        network.enable_gradient_checkpointing(run)
    try:
        yield
    finally:
        for network in networks:
            network.disable_gradient_checkpointing()


@contextmanager
def recomputed_encoder(vae: Any, on: bool) -> Iterator[None]:
    """Inside the context, the autoencoder's activations are recomputed in the backward pass, block by block."""
    if on:
        vae.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if on:
            vae.disable_gradient_checkpointing()


class Offloaded:
    """Networks that can be moved from the GPU to main memory while they are not in use.

    Args:
        on: whether networks are moved at all; by default, only if the device is a GPU
        placement: the placement of a backbone whose networks take turns on the device. If given, each offloaded network
            returns to the device only when it is next used
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        device: torch.device,
        on: bool | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.networks, self.device = dict(networks), device
        self.on = device.type == "cuda" if on is None else on
        self._return_when_used = placement is not None
        self._placement = placement or Placement(networks, device)
        self._away: set[str] = set()

    def offload(self, *names: str) -> None:
        """Moves the networks with these names to main memory."""
        if self.on and names:
            self._placement.send_away(*names)
            self._away |= set(names)

    def keep_only(self, used: Collection[str]) -> None:
        """Offloads all networks except these."""
        self.offload(*(self.networks.keys() - set(used)))

    def restore(self) -> None:
        """Brings all offloaded networks back to the device: at once or, with a `placement`, when each is next used."""
        for name in () if self._return_when_used else sorted(self._away):
            self._placement.use(name)
        self._away = set()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside the context, all networks are available on the device."""
        offloaded = sorted(self._away)
        self.restore()
        try:
            yield
        finally:
            self.offload(*offloaded)


def bring_trained(backbone: Backbone) -> None:
    """Moves the networks with trainable parameters to the device. Must be called before the optimizers are created."""
    placement = backbone.placement
    if placement is None:
        return
    for name, network in placement.networks.items():
        if any(p.requires_grad for p in network.parameters()):
            placement.use(name)
