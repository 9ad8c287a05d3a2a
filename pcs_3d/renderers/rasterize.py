"""Rasterizes triangles. A z-buffer finds the visible triangle at each pixel, without gradients. Blending pixels along
silhouettes then provides gradients."""

from __future__ import annotations

import torch
from torch import Tensor

_PAIRS = 1 << 22  # number of triangle-pixel pairs tested at a time


@torch.no_grad()
def nearest_faces(corners: Tensor, depths: Tensor, height: int, width: int) -> Tensor:
    """Returns the index of the nearest triangle at each pixel's centre (int64 `[H, W]`), or -1 where there is no
    triangle. Triangles that extend behind the camera or have no area are not drawn.

    Args:
        corners: [F, 3, 2] in pixels, x right and y down; the centre of the first pixel is at 0.5
        depths: [F, 3], positive in front of the camera
    """
    low = (corners.amin(1) - 0.5).ceil().long().clamp_min(0)
    limit = torch.tensor([width, height], device=corners.device) - 1
    high = torch.minimum((corners.amax(1) - 0.5).floor().long(), limit)
    size = (high - low + 1).clamp_min(0)
    size = size * ((depths.amin(1) > 1e-4) & corners.isfinite().flatten(1).all(1))[:, None]
    count = size.prod(1)
    best = torch.full((height * width,), torch.iinfo(torch.int64).max, device=corners.device)
    scale = 2**30 / max(1e-6, float(depths.max())) if len(depths) else 1.0
    drawn = count.nonzero()[:, 0]
    for chunk in _chunks(drawn, count[drawn]):
        face = chunk.repeat_interleave(count[chunk])
        first = torch.repeat_interleave(count[chunk].cumsum(0) - count[chunk], count[chunk])
        number = torch.arange(len(face), device=face.device) - first
        x, y = low[face, 0] + number % size[face, 0], low[face, 1] + number // size[face, 0]
        shares = barycentric(corners[face], torch.stack([x, y], -1) + 0.5)
        inside = (shares >= 0).all(-1).nonzero()[:, 0]
        shares, face = shares[inside], face[inside]
        depth = 1 / (shares / depths[face]).sum(-1)
        key = ((depth * scale).long() << 32) | face
        best.scatter_reduce_(0, (y * width + x)[inside], key, "amin")
    found = best != torch.iinfo(torch.int64).max
    return torch.where(found, best & 0xFFFFFFFF, -1).view(height, width)


def _chunks(faces: Tensor, count: Tensor) -> list[Tensor]:
    """Splits the faces into chunks with approximately `_PAIRS` triangle-pixel pairs each."""
    piece = (count.cumsum(0) - 1) // _PAIRS
    return list(faces.split(torch.unique_consecutive(piece, return_counts=True)[1].tolist())) if len(faces) else []


def barycentric(corners: Tensor, points: Tensor) -> Tensor:
    """Returns the barycentric coordinates (`[N, 3]`) of points (`[N, 2]`) in triangles (`[N, 3, 2]`). They are negative
    if the triangle has no area."""
    a, b, c = corners.unbind(1)
    whole = cross(b - a, c - a)
    parts = torch.stack(
        [cross(b - points, c - points), cross(c - points, a - points), cross(a - points, b - points)], -1
    )
    flat = whole.abs() < 1e-12
    return torch.where(flat[:, None], -1.0, parts / torch.where(flat, torch.ones_like(whole), whole)[:, None])


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cross product (`[...]`) of 2D vectors (`[..., 2]`)."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def silhouette_edges(faces: Tensor, corners: Tensor) -> Tensor:
    """Returns the edges at which the visible side of a mesh ends, as pairs of vertices (int64 `[E, 2]`). An edge is
    included if exactly one of its two triangles faces the camera, or if it does not belong to exactly two triangles.
    `corners` is as in `nearest_faces`."""
    turned = cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) > 0
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(-1).values
    side = turned.repeat(3).long()
    ends, number, count = torch.unique(edges, dim=0, return_inverse=True, return_counts=True)
    facing = torch.zeros(len(ends), dtype=torch.long, device=faces.device).index_add_(0, number, side)
    return ends[(count != 2) | (facing == 1)]


def antialiased(values: Tensor, covered: Tensor, edges: Tensor) -> Tensor:
    """Blends neighbouring pixels where a silhouette passes between their centres. The blending provides the gradient
    that moves silhouettes (Laine et al., https://arxiv.org/abs/2011.03277, section 3.6).

    Two neighbouring pixels, only one of which is covered, are blended according to the point at which the edge nearest
    to the covered pixel crosses the line between their centres. Steep edges blend horizontal neighbours, and flat edges
    blend vertical neighbours. If every edge blended both kinds of neighbours, the change in area of a moving silhouette
    would be counted twice.

    Args:
        values: the picture with its background, [H, W, K]
        covered: whether the mesh covers each pixel, bool [H, W]
        edges: the silhouette edges, [E, 2, 2] in pixels
    """
    height, width, _ = values.shape
    flat = values.reshape(height * width, -1)
    number = torch.arange(height * width, device=values.device).view(height, width)
    out = flat
    along = (edges[:, 1] - edges[:, 0]).detach().abs()
    steep = along[:, 1] >= along[:, 0]
    for a, b, mine in (
        (number[:, :-1], number[:, 1:], edges[steep]),
        (number[:-1], number[1:], edges[~steep]),
    ):
        mixed = (covered.view(-1)[a] != covered.view(-1)[b]).nonzero(as_tuple=True)
        one, two = a[mixed], b[mixed]
        swap = ~covered.view(-1)[one]
        p, q = torch.where(swap, two, one), torch.where(swap, one, two)
        if not len(p) or not len(mine):
            continue
        share, hit = _crossings(p, q, mine, width)
        p, q, share = p[hit], q[hit], share[hit]
        difference = flat[q] - flat[p]
        out = out.index_add(0, p, difference * (0.5 - share).clamp_min(0)[:, None])
        out = out.index_add(0, q, -difference * (share - 0.5).clamp_min(0)[:, None])
    return out.view_as(values)


def _crossings(p: Tensor, q: Tensor, edges: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Finds where the first edge crosses the line from pixel p to pixel q, for N pairs of pixels. Returns the share of
    the line before the crossing, in [0, 1], and whether any edge crosses the line."""
    start = torch.stack([p % width, p // width], -1) + 0.5
    step = torch.stack([q % width, q // width], -1) + 0.5 - start
    with torch.no_grad():
        far = _share(start[:, None], step[:, None], edges[None])
        first, which = torch.where(far.isfinite(), far, torch.inf).min(1)
    share = _share(start, step, edges[which])
    return torch.nan_to_num(share, posinf=0.5), first.isfinite()


def _share(start: Tensor, step: Tensor, edges: Tensor) -> Tensor:
    """Returns the share at which start + share · step crosses each edge (`[..., 2, 2]`), or infinity where there is no
    crossing."""
    a, along = edges[..., 0, :], edges[..., 1, :] - edges[..., 0, :]
    across = cross(step.to(along), along)
    safe = torch.where(across.abs() < 1e-9, torch.ones_like(across), across)
    share = cross(a - start, along) / safe
    place = cross(a - start, step.to(along)) / safe
    hit = (across.abs() >= 1e-9) & (share >= 0) & (share <= 1) & (place >= -1e-4) & (place <= 1 + 1e-4)
    return torch.where(hit, share, torch.full_like(share, torch.inf))
