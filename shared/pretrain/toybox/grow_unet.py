"""A U-Net as a larger one that computes the same, to go on learning from (function-preserving growth, arXiv 1511.05641).

Channels cannot be added without changing what group norms see, so that the finest level grows in depth: further residual
blocks and attention layers whose last layers begin at 0. Further latent channels begin as inputs without weight and outputs
of 0: that is the best prediction of v for noise and unit-variance data of which nothing is known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared.pretrain.toybox import models


@torch.no_grad()
def grow(unet: Any, size: models.UnetSize) -> Any:
    """A U-Net of `size` with the outputs of `unet`; in latent channels that `unet` does not have, 0. What is new is drawn from
    seed 0.

    ValueError where `size` is not larger in the finest level's layers and attention, or in latent channels, alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new: Any = models.build_unet(unet.config.cross_attention_dim, size)
    old_layers, layers = (len(net.down_blocks[0].resnets) for net in (unet, new))
    _check(unet, new, layers - old_layers)
    _begin_at_zero(new, old_layers, layers)
    extra = layers - old_layers
    last = f"up_blocks.{len(unet.up_blocks) - 1}."
    state = new.state_dict()
    for name, tensor in unet.state_dict().items():
        place = _later(name, last, extra)
        if place not in state:
            raise ValueError(f"a U-Net cannot grow to {size}: it has no {place}")
        state[place] = _padded(name, tensor, state[place])
    new.load_state_dict(state)
    return new


def _check(unet: Any, new: Any, extra: int) -> None:
    may_grow = {"in_channels", "out_channels", "layers_per_block", "down_block_types", "up_block_types"}
    if _heads(unet)[1:] == _heads(new)[1:] and not hasattr(unet.up_blocks[-1], "attentions"):
        may_grow.add("attention_head_dim")
    for name, value in unet.config.items():
        found = new.config.get(name)
        if not name.startswith("_") and name not in may_grow and _plain(found) != _plain(value):
            raise ValueError(f"a U-Net with {name}={value} cannot grow to {name}={found}")
    if extra < 0 or new.config["in_channels"] < unet.config["in_channels"]:
        raise ValueError("a U-Net can only grow, not shrink")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _heads(unet: Any) -> tuple[int, ...]:
    """The number of heads, by level."""
    heads, levels = unet.config.attention_head_dim, len(unet.config.block_out_channels)
    return (heads,) * levels if isinstance(heads, int) else tuple(heads)


def _later(name: str, last: str, extra: int) -> str:
    """Where a tensor belongs. The last up block takes the finest level's skips in reverse order, so that what comes after
    its first residual block moves behind the new ones."""
    for part in ("resnets.", "attentions."):
        start = last + part
        if name.startswith(start):
            number, _, rest = name[len(start) :].partition(".")
            return f"{start}{int(number) + extra if int(number) > 0 else 0}.{rest}"
    return name


def _padded(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor with zeros where the new one has more latent channels."""
    if tensor.shape == like.shape:
        return tensor
    if name.split(".")[0] not in ("conv_in", "conv_out"):
        raise ValueError(f"a U-Net cannot grow here: {name} has {tuple(tensor.shape)}, not {tuple(like.shape)}")
    padded = torch.zeros_like(like)
    padded[tuple(slice(length) for length in tensor.shape)] = tensor
    return padded


def _begin_at_zero(new: Any, old_layers: int, layers: int) -> None:
    """Makes all that the finest level may have gained the identity; what it had already is overwritten afterwards."""
    down, up = new.down_blocks[0], new.up_blocks[-1]
    for block in (*down.resnets[old_layers:], *up.resnets[1 : 1 + layers - old_layers]):
        _zero(block.conv2)
        if block.conv_shortcut is not None:  # hidden states, then the skip: keep the former
            _zero(block.conv_shortcut)
            nn.init.dirac_(block.conv_shortcut.weight)
    for attention in (*getattr(down, "attentions", ()), *getattr(up, "attentions", ())):
        _zero(attention.proj_out)


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
