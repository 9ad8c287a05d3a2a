"""The identity encoder, which measures whether two pictures show the same individual thing.

It first finds the thing and then looks only at an enlarged crop around it, so that a small thing in a corner is
compared at the same size as a large one. This is a spatial transformer (Jaderberg et al., arXiv 1506.02025) whose crop
is not learned but computed from a map of the thing's position. The encoder is trained with the supervised contrastive
loss (Khosla et al., arXiv 2004.11362, eq. 2) on things in many views and on many backgrounds. Every batch contains hard
negatives, which are things of the same class and palette that differ only in their pattern or, for faces, in their
identity.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from shared.toybox.evaluators.convnet import WEIGHTS, Trunk, TrunkConfig, check_pixels, load_state, read_config

HIDDEN = 256
# Half the crop's side length, in standard deviations of the thing's position map, and the minimum of this half, as a
# fraction of half the picture's side length.
_WIDE, _LEAST = (
    2.2,
    0.28,
)
_SURE = 0.15  # cells with a lower probability do not count as part of the thing


class IdentityConfig(BaseModel):
    """The settings of the trunk, the dimension of the embedding, and the number of activations in `Palette`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    trunk: TrunkConfig = TrunkConfig()
    dimensions: int = 128
    palette: int = 96


class Palette(nn.Module):
    """A learned histogram of the thing's colours. It covers the accent colours but not the background.

    Each pixel of the half-resolution picture is mapped separately to `counts` activations. The output consists of the
    mean and the maximum of each activation over the thing.
    """

    def __init__(self, counts: int) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Conv2d(3, 48, 1), nn.ReLU(), nn.Conv2d(48, counts, 1), nn.ReLU())

    def forward(self, pixels: Tensor, where: Tensor) -> Tensor:
        """Returns the histograms, `[B, 2 * counts]`, of pictures `[B, 3, H, W]`. Pixels are weighted by `where`
        (`[B, 1, h, w]`). Both inputs are in [0, 1]."""
        small = F.avg_pool2d(pixels, 2) * 4 - 2
        features = self.points(small.contiguous(memory_format=torch.channels_last))
        weights = F.interpolate(where.to(features.dtype), size=features.shape[2:], mode="bilinear", align_corners=False)
        mean = (features * weights).sum((2, 3)) / (weights.sum((2, 3)) + 1)
        return torch.cat([mean, (features * weights).amax((2, 3))], 1).float()


class Locator(Trunk):
    """The first stages of a recognizer's trunk, which find the thing. They are not trained further."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__(TrunkConfig(widths=config.widths[:3], blocks=config.blocks[:3]))
        self.requires_grad_(False)

    def take_over(self, trunk: Trunk) -> None:
        """Copies the weights from a recognizer's trunk."""
        known = trunk.state_dict()
        self.load_state_dict({name: known[name] for name in self.state_dict()})

    def train(self, mode: bool = True) -> Locator:
        """Keeps the locator in eval mode whatever `mode` is, so that its batch statistics do not change."""
        return super().train(False)

    @torch.no_grad()
    def square(self, pixels: Tensor) -> Tensor:
        """Finds the square around the thing in each of the pictures (`[B, 3, H, W]`). Returns the affine maps from the
        whole picture to the square, `[B, 2, 3]`."""
        heat = self.read(pixels)[1].float().sigmoid()[:, 0]
        heat = heat * (heat > _SURE)
        side = heat.shape[-1]
        place = (torch.arange(side, device=heat.device) + 0.5) / side * 2 - 1  # in [-1, 1], as in grid_sample
        total = heat.sum((1, 2)) + 1e-3
        across, down = heat.sum(1), heat.sum(2)
        x, y = ((weight * place).sum(1) / total for weight in (across, down))
        spreads = [(weight * (place - at[:, None]).square()).sum(1) / total for weight, at in ((across, x), (down, y))]
        half = (_WIDE * torch.maximum(*spreads).sqrt()).clamp(_LEAST, 1.0)
        none = torch.zeros_like(half)
        return torch.stack([torch.stack([half, none, x], 1), torch.stack([none, half, y], 1)], 1)


def cut(pixels: Tensor, square: Tensor) -> Tensor:
    """Cuts the squares `[B, 2, 3]` out of pictures `[B, C, H, W]`, and enlarges each square to the picture's size."""
    grid = F.affine_grid(square, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid.to(pixels.dtype), padding_mode="border", align_corners=False)


class IdentityEncoder(nn.Module):
    """A network that maps pictures (`[B, 3, 64, 64]` in [0, 1]) to unit vectors `[B, D]`. The dot product of two
    vectors measures how similar the identities are.
    """

    def __init__(self, config: IdentityConfig) -> None:
        super().__init__()
        self.config = config
        self.locator = Locator(config.trunk)
        self.trunk = Trunk(config.trunk)
        self.palette = Palette(config.palette)
        inputs = self.trunk.features + 2 * config.palette
        self.norm = nn.BatchNorm1d(inputs)
        self.neck = nn.Sequential(nn.Linear(inputs, 2 * HIDDEN), nn.ReLU(), nn.Linear(2 * HIDDEN, HIDDEN), nn.ReLU())
        self.last = nn.Linear(HIDDEN, config.dimensions)

    def hidden(self, pixels: Tensor) -> Tensor:
        """Returns the features, `[B, HIDDEN]`, that the last linear layer maps to the embedding."""
        pixels = cut(pixels, self.locator.square(pixels))
        features, where = self.trunk.read(pixels)
        return self.neck(self.norm(torch.cat([features, self.palette(pixels, where.sigmoid())], 1)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the embeddings of pictures `[B, 3, 64, 64]` as unit vectors `[B, D]`."""
        return F.normalize(self.last(self.hidden(pixels)), dim=1)

    @torch.no_grad()
    def embed(self, pixels: Tensor, batch_size: int = 128) -> Tensor:
        """Embeds pictures (`[B, 3, 64, 64]` in [0, 1]) without gradients. Returns unit vectors `[B, D]` on the CPU."""
        check_pixels(pixels)
        device = next(self.parameters()).device
        parts = [self(chunk.to(device, torch.float32)).cpu() for chunk in pixels.split(batch_size)]
        return torch.cat(parts) if parts else torch.zeros(0, self.config.dimensions)


@lru_cache(maxsize=4)
def load_identity(folder: Path | str = WEIGHTS / "identity") -> IdentityEncoder:
    """Loads the identity encoder from `folder`, frozen and on the CPU. Each folder is loaded once per process."""
    path, raw = read_config(folder, "identity")
    return load_state(IdentityEncoder(IdentityConfig.model_validate(raw)), path)
