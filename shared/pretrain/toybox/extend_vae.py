"""A larger autoencoder around a smaller one: the same pictures and the same latents at first, and more of both to learn.

Weights grow as in Net2Net (arXiv 1511.05641), with zeros where a new feature would be read by an old one, so that at first
nothing new is seen. In an encoder whose old features never read a new one, the old latents can stay exactly as they are
while the new ones are learned: what was trained on them goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared.pretrain.toybox import models

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_NEW_LOG_VARIANCE = -4.0  # so that what a new channel says is not drowned by its own noise before it says much


@dataclass(frozen=True)
class Held:
    """An autoencoder within a larger one, whose encoder stays as it is: its latents are the first of the larger one's.

    ``scaling_factor``: with which they are read.
    """

    size: models.VaeSize
    scaling_factor: float


def size_of(vae: AutoencoderKL) -> models.VaeSize:
    """The size of an autoencoder that `models.build_vae` made."""
    known: Any = vae.config
    return models.VaeSize(
        tuple(known.block_out_channels),
        known.layers_per_block,
        known.norm_num_groups,
        known.sample_size,
        known.latent_channels,
    )


@torch.no_grad()
def extend(vae: AutoencoderKL, size: models.VaeSize, seed: int = 0) -> AutoencoderKL:
    """An autoencoder of `size` that at first does what `vae` does; its first latent channels are those of `vae`.

    Args:
        vae: on the CPU, in fp32; left as it is
        size: as deep as `vae`, as wide or wider, with group norms over as many channels each
        seed: of the new features

    Raises:
        ValueError: `vae` is no part of an autoencoder of `size`
    """
    old = size_of(vae)
    _check_within(old, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        larger = models.build_vae(size)
    own = dict(vae.named_parameters())
    for name, parameter in larger.named_parameters():
        _place(name, parameter, own[name], old, size)
    if (more := size.latent_channels) > old.latent_channels:
        assert larger.quant_conv is not None and larger.quant_conv.bias is not None
        larger.quant_conv.bias[more + old.latent_channels :] = _NEW_LOG_VARIANCE
    larger.register_to_config(scaling_factor=vae.config["scaling_factor"])
    return larger


def hold(vae: AutoencoderKL, inner: models.VaeSize) -> None:
    """Keeps the encoder of the autoencoder of size `inner` within `vae` as it is: it gets gradients of 0.

    Exact only under an optimizer without weight decay. What attention compares stays as a whole: its scores mix all
    features.
    """
    size = size_of(vae)
    _check_within(inner, size)
    shapes = {name: p.shape for name, p in _skeleton(inner).named_parameters()}
    for name, parameter in _encoding(vae):
        learned = torch.ones_like(parameter)
        rows, _ = _places(name, shapes[name], inner, size)
        learned[rows] = 0
        if ".to_q." in name:
            learned[:] = 0
        parameter.register_hook(learned.mul)


def _place(name: str, parameter: Tensor, own: Tensor, old: models.VaeSize, new: models.VaeSize) -> None:
    """Writes the weights `own` into the larger `parameter`; old features read nothing new."""
    rows, columns = _places(name, own.shape, old, new)
    if ".to_q." in name:  # queries of new features see nothing, and a wider head divides the scores by more
        parameter.zero_()
        own = own * math.sqrt(new.channels[-1] / old.channels[-1])
    if own.ndim == 1:
        parameter[rows] = own
        return
    block = parameter.new_zeros(len(rows), *parameter.shape[1:])
    block[:, columns] = own
    parameter[rows] = block


def _places(name: str, shape: torch.Size, old: models.VaeSize, new: models.VaeSize) -> tuple[Tensor, Tensor]:
    """The rows and columns of a larger parameter that are those of the one of `shape` within it.

    Features come first. Means and log-variances are two runs of channels, of which the first of each are old.
    """
    few, many = old.latent_channels, new.latent_channels
    moments = torch.cat([torch.arange(few), many + torch.arange(few)])
    rows = moments if name.startswith(("encoder.conv_out.", "quant_conv.")) else torch.arange(shape[0])
    if len(shape) == 1:
        return rows, rows
    return rows, moments if name.startswith("quant_conv.") else torch.arange(shape[1])


def _encoding(vae: AutoencoderKL) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((n, p) for n, p in vae.named_parameters() if n.startswith(("encoder.", "quant_conv.")))


def _skeleton(size: models.VaeSize) -> AutoencoderKL:
    with torch.device("meta"):
        return models.build_vae(size)


def _check_within(inner: models.VaeSize, size: models.VaeSize) -> None:
    alike = (len(inner.channels), inner.layers_per_block) == (len(size.channels), size.layers_per_block)
    wider = alike and all(a <= b for a, b in zip(inner.channels, size.channels, strict=True))
    per_group = alike and all(
        a * size.groups == b * inner.groups for a, b in zip(inner.channels, size.channels, strict=True)
    )
    if not (wider and per_group and inner.latent_channels <= size.latent_channels):
        raise ValueError(
            f"an autoencoder of {inner} is no part of one of {size}: that must have as many levels and layers, no fewer "
            f"channels, and as many channels in each group of its norms"
        )
