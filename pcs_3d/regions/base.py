"""The base class for regions, and the computation of where they appear in views."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras
from shared.config import NAME, KindPart

#: Takes points, [..., 3]. Returns the degree to which each point is inside, [...] in [0, 1]. Points outside get 0.
Inside = Callable[[Tensor], Tensor]


class RegionPart(KindPart):
    """A part of space with its own prompt or concepts. Coordinates are in object radii, with x pointing forward, y to
    the object's left, and z up.

    prompt, negative: the region's prompt and negative prompt. If one of them is empty, the recipe's is used instead.
    concepts: the concepts whose adapters are on only in this region. If null, the region uses the same concepts as the
    rest of the scene.
    softness: the width, in radii, over which the region fades in from its border inwards.
    """

    prompt: str = ""
    negative: str = ""
    concepts: tuple[Annotated[str, Field(pattern=NAME)], ...] | None = None
    softness: Annotated[float, Field(ge=0, le=1)] = 0.05

    @property
    def is_told_more(self) -> bool:
        """Whether the region is guided differently from the rest of the scene."""
        return bool(self.prompt or self.negative) or self.concepts is not None

    def check(self) -> None:
        """Raises ValueError if the region's file cannot be read."""
        self.build()

    def build(self) -> Inside:
        """Builds the function that returns the degree to which points are inside.

        Raises ValueError if the region's file cannot be read.
        """
        raise NotImplementedError

    def faded(self, depth: Tensor) -> Tensor:
        """Returns the degree to which points are inside, given their depth below the border in radii. Points at a depth
        of 0 or less are outside."""
        return (depth / self.softness).clamp(0, 1) if self.softness else (depth > 0).to(depth)


def together(regions: Mapping[str, Inside], points: Tensor) -> Tensor:
    """Returns the degree to which each point (`[..., 3]`) is inside any of the regions, `[...]`."""
    return torch.stack([inside(points) for inside in regions.values()]).amax(0)


@torch.no_grad()
def seen(
    inside: Inside, cameras: Cameras, depth: Tensor, opacity: Tensor, cells: tuple[int, int], reach: float
) -> Tensor:
    """Returns the share of each cell that a region covers, `[B, 1, h, w]` in [0, 1].

    A ray counts if it passes through the region before it hits the object. A ray that misses the object counts if it
    passes through the region anywhere.

    Args:
        depth, opacity: the depth and opacity of the views, [B, 1, H, W]
        cells: h and w; 2 h by 2 w rays are sampled at 48 points each
        reach: half the side length of the sampled cube
    """
    size = (2 * cells[0], 2 * cells[1])
    depth, opacity = (F.interpolate(v, size, mode="area")[:, 0, ..., None] for v in (depth, opacity))
    origins, directions = cameras.rays(*size)
    middle = cameras.distance[:, None, None, None]
    along = middle + torch.linspace(-1, 1, 48, device=depth.device) * (reach * 3**0.5)
    shares = inside(origins[..., None, :] + along[..., None] * directions[..., None, :])
    before = shares * (along <= depth + 0.05)  # includes the surface itself
    share = torch.where(opacity > 0, torch.lerp(shares.amax(-1, True), before.amax(-1, True), opacity.clamp(0, 1)),
                        shares.amax(-1, True))  # fmt: skip
    return F.avg_pool2d(share[:, None, ..., 0], 2)
