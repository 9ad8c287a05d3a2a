"""What regions of space have in common, and where a view shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras
from shared.config import NAME, KindPart

#: Points [..., 3] -> how much each is inside, [...] in [0, 1]; exactly 0 outside.
Inside = Callable[[Tensor], Tensor]


class RegionPart(KindPart):
    """A part of space, in radii of the thing (x forward, y to its left, z up), with what is asked for there.

    prompt, negative: instead of the recipe's; "": the recipe's. concepts: those whose adapters are on there, and nowhere else;
    None: those of the rest. softness: radii over which the region fades in behind its border, all of them inside.
    """

    prompt: str = ""
    negative: str = ""
    concepts: tuple[Annotated[str, Field(pattern=NAME)], ...] | None = None
    softness: Annotated[float, Field(ge=0, le=1)] = 0.05

    @property
    def is_told_more(self) -> bool:
        """Whether what guides it is not what guides the rest."""
        return bool(self.prompt or self.negative) or self.concepts is not None

    def check(self) -> None:
        """ValueError for a file that cannot be read."""
        self.build()

    def build(self) -> Inside:
        """Where it is. ValueError for a file that cannot be read."""
        raise NotImplementedError

    def faded(self, depth: Tensor) -> Tensor:
        """How much points are inside that lie so far behind the border, in radii; not above 0: outside."""
        return (depth / self.softness).clamp(0, 1) if self.softness else (depth > 0).to(depth)


def together(regions: Mapping[str, Inside], points: Tensor) -> Tensor:
    """How much points [..., 3] are inside any of the regions, [...]."""
    return torch.stack([inside(points) for inside in regions.values()]).amax(0)


@torch.no_grad()
def seen(
    inside: Inside, cameras: Cameras, depth: Tensor, opacity: Tensor, cells: tuple[int, int], reach: float
) -> Tensor:
    """How much of each cell shows a region, [B, 1, h, w] in [0, 1]: rays pass through it before they reach what is there.

    Args:
        depth, opacity: [B, 1, H, W], of the views
        cells: h and w; h · 2 and w · 2 rays are looked along, at 48 places each
        reach: half the side of the cube that is looked at
    """
    size = (2 * cells[0], 2 * cells[1])
    depth, opacity = (F.interpolate(v, size, mode="area")[:, 0, ..., None] for v in (depth, opacity))
    origins, directions = cameras.rays(*size)
    middle = cameras.distance[:, None, None, None]
    along = middle + torch.linspace(-1, 1, 48, device=depth.device) * (reach * 3**0.5)
    shares = inside(origins[..., None, :] + along[..., None] * directions[..., None, :])
    before = shares * (along <= depth + 0.05)  # the surface itself, if that is inside
    share = torch.where(opacity > 0, torch.lerp(shares.amax(-1, True), before.amax(-1, True), opacity.clamp(0, 1)),
                        shares.amax(-1, True))  # fmt: skip
    return F.avg_pool2d(share[:, None, ..., 0], 2)
