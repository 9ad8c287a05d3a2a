"""What holds while a phase runs: recomputed activations, attention whose backward is fast on a CPU, Ctrl-C that waits for
the step, networks that wait elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shared.backbones.protocol import Backbone

_FEW = 32 * 32  # places that look at each other: 4 MB for each head and picture, and 64 MB at twice the side


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


def pays(backbone: Backbone, side: int) -> bool:
    """Whether `unfused_attention` does for pictures of `side` pixels: on a CPU, while they are small. It keeps every row of
    every attention for the backward pass, which at 512 pixels would be gigabytes."""
    latents = backbone.latent_shape(side, side)
    return backbone.device.type == "cpu" and latents[-1] * latents[-2] <= _FEW


@contextmanager
def unfused_attention(network: nn.Module, on: bool) -> Iterator[None]:
    """Inside, diffusers' attention layers multiply matrices instead of calling PyTorch's fused kernel.

    The same function up to rounding; on a CPU the kernel's backward pass is slow (`tests/bench/bench_step.py` prints how
    much a step gains). Layers that run in something else than diffusers' default are left alone.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    layers = [m for m in network.modules() if on and isinstance(m, Attention) and type(m.processor) is AttnProcessor2_0]
    fused = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.processor = AttnProcessor()  # type: ignore[assignment]
        yield
    finally:
        for layer, processor in zip(layers, fused, strict=True):
            layer.processor = processor


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C lets the step end and the state be saved; the second acts at once."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    ignored = before == signal.SIG_IGN  # nohup and background jobs: Ctrl-C is not for this process
    if ignored or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class Parked:
    """Networks of a GPU that wait in main memory while nobody needs them; elsewhere (`on` is False) nothing moves."""

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device, on: bool | None = None) -> None:
        self.networks, self.device = dict(networks), device
        self.on = device.type == "cuda" if on is None else on
        self._away: set[str] = set()

    def away(self, *names: str) -> None:
        """Park these networks, by name."""
        if self.on and names:
            self._move(names, torch.device("cpu"))
            self._away |= set(names)

    def back(self) -> None:
        """All of them are on the device again."""
        self._move(sorted(self._away), self.device)
        self._away = set()

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside, all of them are on the device."""
        parked = sorted(self._away)
        self.back()
        try:
            yield
        finally:
            self.away(*parked)

    def _move(self, names: Any, device: torch.device) -> None:
        for name in names:
            self.networks[name].to(device)
        if names and self.device.type == "cuda":
            torch.cuda.empty_cache()
