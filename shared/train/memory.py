"""Less memory while a phase runs: recomputed activations, networks that wait in main memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def recomputed(network: Any, on: bool) -> Iterator[None]:
    """Inside, activations are not kept but computed again in the backward pass: less memory, more time."""
    if on:
        network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if on:
            network.disable_gradient_checkpointing()


class Offloaded:
    """Networks of a GPU that wait in main memory while nobody needs them; elsewhere (`on` is False) nothing moves."""

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device, on: bool | None = None) -> None:
        self.networks, self.device = dict(networks), device
        self.on = device.type == "cuda" if on is None else on
        self._away: set[str] = set()

    def offload(self, *names: str) -> None:
        """Park these networks, by name."""
        if self.on and names:
            self._move(names, torch.device("cpu"))
            self._away |= set(names)

    def restore(self) -> None:
        """All of them are on the device again."""
        self._move(sorted(self._away), self.device)
        self._away = set()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, all of them are on the device."""
        offloaded = sorted(self._away)
        self.restore()
        try:
            yield
        finally:
            self.offload(*offloaded)

    def _move(self, names: Any, device: torch.device) -> None:
        for name in names:
            self.networks[name].to(device)
        if names and self.device.type == "cuda":
            torch.cuda.empty_cache()
