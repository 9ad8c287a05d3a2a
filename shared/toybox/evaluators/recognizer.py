"""The recognizer, which reads the attributes of a toybox picture and names them in the words that captions use.

It is a small convolutional network with one head per attribute. The "attribute accuracy" metric is computed with it.
`weights/CARD.md` states the recognizer's own accuracy.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from shared.toybox.evaluators.convnet import WEIGHTS, Trunk, TrunkConfig, check_pixels, load_state, read_config

ATTRIBUTES = ("class", "main", "second", "background", "view", "accessory", "style")
FACE_VIEWS = ("front", "side")  # views that show the face; only hair is visible from behind and from above


class RecognizerConfig(BaseModel):
    """The settings of the trunk, and the names of each attribute's values in the order of its head's outputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    trunk: TrunkConfig = TrunkConfig()
    values: dict[str, tuple[str, ...]]


class Recognizer(nn.Module):
    """A network that maps pictures (`[B, 3, 64, 64]` in [0, 1]) to one distribution for each of the attributes `class`,
    `main`, `second`, `background`, `view`, `accessory` and `style`.

    `second` is the colour of the part that `captions.PARTS` names, so a picture whose two colours are swapped counts as
    wrong.
    """

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config.trunk)
        hidden = 192
        self.neck = nn.Sequential(nn.Linear(self.trunk.features, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.heads = nn.ModuleDict(
            {f"head_{name}": nn.Linear(hidden, len(names)) for name, names in config.values.items()}
        )

    def features(self, pixels: Tensor) -> Tensor:
        """Returns the output of the layer before the heads, `[B, 192]`, which is used for KID."""
        return self.neck(self.trunk(pixels))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Returns the logits of each attribute, `[B, values]`."""
        return self.read(pixels)[0]

    def read(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the logits of each attribute, `[B, values]`, and of the things' positions, `[B, 1, 8, 8]`."""
        features, where = self.trunk.read(pixels)
        hidden = self.neck(features)
        return {name: self.heads[f"head_{name}"](hidden) for name in self.config.values}, where

    @torch.no_grad()
    def probabilities(self, pixels: Tensor, batch_size: int = 128) -> dict[str, Tensor]:
        """Returns the probabilities of each attribute's values, `[B, values]`, in the order of `config.values`."""
        check_pixels(pixels)
        device = next(self.parameters()).device
        parts = [self(chunk.to(device, torch.float32)) for chunk in pixels.split(batch_size)]
        return (
            {name: torch.cat([p[name] for p in parts]).softmax(1).cpu() for name in self.config.values} if parts else {}
        )

    @torch.no_grad()
    def embed(self, pixels: Tensor, batch_size: int = 128) -> Tensor:
        """Returns the normalized `features` of pictures (`[B, 3, 64, 64]` in [0, 1]), `[B, 192]` on the CPU."""
        check_pixels(pixels)
        device = next(self.parameters()).device
        parts = [self.features(chunk.to(device, torch.float32)).cpu() for chunk in pixels.split(batch_size)]
        return F.normalize(torch.cat(parts), dim=1) if parts else torch.zeros(0, 192)

    @torch.no_grad()
    def where(self, pixels: Tensor, batch_size: int = 128) -> Tensor:
        """Returns the probability that each cell of the pictures (`[B, 3, 64, 64]` in [0, 1]) shows the thing,
        `[B, 8, 8]`."""
        check_pixels(pixels)
        device = next(self.parameters()).device
        parts = [self.trunk.read(chunk.to(device, torch.float32))[1][:, 0] for chunk in pixels.split(batch_size)]
        return torch.cat(parts).sigmoid().cpu()

    def predict(self, pixels: Tensor, batch_size: int = 128) -> dict[str, list[str]]:
        """Returns the most probable value of each attribute for each of the pictures (`[B, 3, 64, 64]` in [0, 1])."""
        probabilities = self.probabilities(pixels, batch_size)
        return {name: [self.config.values[name][i] for i in p.argmax(1).tolist()] for name, p in probabilities.items()}


@lru_cache(maxsize=4)
def load_recognizer(folder: Path | str = WEIGHTS / "recognizer") -> Recognizer:
    """Loads the recognizer from `folder`, frozen and on the CPU. Each folder is loaded once per process."""
    path, raw = read_config(folder, "recognizer")
    return load_state(Recognizer(RecognizerConfig.model_validate(raw)), path)
