"""Defines the simplest possible asset (one learnable picture per view) and its ground truth."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pcs_3d.cameras import Cameras, wrapped_deg
from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.export.settings import ExportSettings
from pcs_3d.fields.base import FieldPart
from pcs_3d.renderers.rendering import Rendering
from shared.config import Part
from shared.trainable import TrainableGroup
from shared.trainable.base import Rate

VIEWS, SIDE = 4, 32


def view_of(cameras: Cameras) -> Tensor:
    """Returns, for each camera, the index of the view whose azimuth range contains it, `[B]`."""
    return ((wrapped_deg(cameras.azimuth_deg) + 180) / 360 * VIEWS).long().clamp_max(VIEWS - 1)


@cache
def true_pictures(side: int = SIDE) -> Tensor:
    """Returns one smoothly coloured picture per view, each with a square in a different position.

    Their shape is `[VIEWS, 3, S, S]` and their values are in [-1, 1].
    """
    draw = torch.Generator().manual_seed(5)
    ground = F.interpolate(torch.rand(VIEWS, 3, 4, 4, generator=draw), (side, side), mode="bilinear")
    pictures = 0.1 + 0.8 * ground
    for i in range(VIEWS):
        first = 2 + i * side // 8
        pictures[i, :, first : first + side // 4, side // 3 : side // 2] = torch.rand(3, 1, 1, generator=draw)
    return 2 * pictures - 1


def psnr(a: Tensor, b: Tensor, peak: float = 2.0) -> float:
    """Returns the PSNR in dB. `peak` is the range of the values, which is 2 for values in [-1, 1]."""
    return float(10 * torch.log10(peak**2 / (a - b).square().mean()))


class PicturesField(nn.Module):
    """A field that stores one picture per view, `[VIEWS, K, S, S]`. Colours are stored as logits.

    If `grows` is set, the pictures start at half the size. Halfway through the run, they are enlarged to the full size
    and become new parameters.
    """

    def __init__(self, side: int, channels: int, lr: float, seed: int, grows: bool) -> None:
        super().__init__()
        self.bound, self.channels, self.side, self.lr, self.grows = 1.0, channels, side, lr, grows
        first = side // 2 if grows else side
        draw = torch.Generator().manual_seed(seed)
        self.raw = nn.Parameter(0.1 * torch.randn(VIEWS, channels, first, first, generator=draw))

    @property
    def device(self) -> torch.device:
        return self.raw.device

    def groups(self) -> dict[str, list[TrainableGroup]]:
        return {"main": [TrainableGroup("pictures", [self.raw], self.lr)]}

    def advance(self, step: int, steps: int) -> dict[Any, Any] | None:
        if not self.grows or 2 * step < steps or self.raw.shape[-1] == self.side:
            return None
        self.raw = nn.Parameter(F.interpolate(self.raw.detach(), scale_factor=2, mode="nearest"))
        return {}

    def pictures(self) -> Tensor:
        """Returns the pictures `[VIEWS, K, S, S]`, with colours in [0, 1]. Latents are returned unchanged."""
        whole = F.interpolate(self.raw, (self.side, self.side), mode="nearest")
        return whole.sigmoid() if self.channels == 3 else whole

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {"raw": self.raw.detach().clone()}

    def load_state_dict(self, state: Any, *_: Any, **__: Any) -> Any:
        self.raw = nn.Parameter(state["raw"].clone())


class Pictures(FieldPart):
    """The settings of a `PicturesField`."""

    kind: Literal["pictures"] = "pictures"
    side: int = SIDE
    lr: Rate = 0.1
    grows: bool = False

    def build(self, channels: int = 3, seed: int = 0) -> PicturesField:
        return PicturesField(self.side, channels, self.lr, seed, self.grows)


class Slides(Part):
    """A renderer that shows the picture of each camera's view."""

    kind: Literal["slides"] = "slides"

    def render(self, field: PicturesField, cameras: Cameras, settings: Any) -> Rendering:
        shown = field.pictures()[view_of(cameras).to(field.raw.device)]
        full = torch.ones_like(shown[:, :1])
        return Rendering(shown, full, full)


class PictureRecipe(DistillRecipe):
    """A recipe for an asset made of pictures. Pictures have no shape, so the recipe's penalties are left out."""

    field: Pictures = Pictures()
    renderer: Slides = Slides()
    export: ExportSettings | None = ExportSettings(picture=SIDE)

    @model_validator(mode="before")
    @classmethod
    def _without_shape(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if k != "penalties"} if isinstance(data, Mapping) else data
