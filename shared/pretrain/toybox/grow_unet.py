"""A U-Net as a larger one that computes the same, to go on learning from (function-preserving growth, arXiv 1511.05641).

Channels cannot be added without changing what group norms see, so that levels grow in depth: further residual blocks and
attention layers whose last layers begin at 0. Further latent channels begin as inputs without weight and outputs of 0: that
is the best prediction of v for noise and unit-variance data of which nothing is known.
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

    ValueError where `size` is not larger in layers per block, or in latent channels, alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new: Any = models.build_unet(unet.config.cross_attention_dim, size)
    old_layers, layers = (len(net.down_blocks[0].resnets) for net in (unet, new))
    _check(unet, new, layers - old_layers)
    for down, up in zip(new.down_blocks, new.up_blocks, strict=True):
        _begin_at_zero(down, slice(old_layers, None))
        _begin_at_zero(up, slice(1, 1 + layers - old_layers))
    state = new.state_dict()
    for name, tensor in unet.state_dict().items():
        place = _later(name, layers - old_layers)
        state[place] = _padded(name, tensor, state[place])
    new.load_state_dict(state)
    return new


def _check(unet: Any, new: Any, extra: int) -> None:
    may_grow = {"in_channels", "out_channels", "layers_per_block"}
    for name, value in unet.config.items():
        found = new.config.get(name)
        if not name.startswith("_") and name not in may_grow and _plain(found) != _plain(value):
            raise ValueError(f"a U-Net with {name}={value} cannot grow to {name}={found}")
    if extra < 0 or new.config["in_channels"] < unet.config["in_channels"]:
        raise ValueError("a U-Net can only grow, not shrink")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _later(name: str, extra: int) -> str:
    """Where a tensor belongs. An up block takes its level's skips in reverse order, so that what comes after its first
    residual block moves behind the new ones."""
    side, _, rest = name.partition(".")
    block, _, rest = rest.partition(".")
    part, _, rest = rest.partition(".")
    if side != "up_blocks" or part not in ("resnets", "attentions"):
        return name
    number, _, rest = rest.partition(".")
    return f"{side}.{block}.{part}.{int(number) + extra if int(number) > 0 else 0}.{rest}"


def _padded(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor with zeros where the new one has more latent channels."""
    if tensor.shape == like.shape:
        return tensor
    if name.split(".")[0] not in ("conv_in", "conv_out"):
        raise ValueError(f"a U-Net cannot grow here: {name} has {tuple(tensor.shape)}, not {tuple(like.shape)}")
    padded = torch.zeros_like(like)
    padded[tuple(slice(length) for length in tensor.shape)] = tensor
    return padded


def _begin_at_zero(block: Any, gained: slice) -> None:
    """Makes the layers that a block has gained the identity."""
    for resnet in block.resnets[gained]:
        _zero(resnet.conv2)
        if resnet.conv_shortcut is not None:  # hidden states, then the skip: keep the former
            _zero(resnet.conv_shortcut)
            nn.init.dirac_(resnet.conv_shortcut.weight)
    for attention in getattr(block, "attentions", nn.ModuleList())[gained]:
        _zero(attention.proj_out)


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
