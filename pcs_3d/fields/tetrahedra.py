"""A field of signed distances on a grid of tetrahedra. The surface on which the distance is 0 is rendered as triangles
(DMTet, https://arxiv.org/abs/2111.04276)."""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor, nn

from pcs_3d.fields import grids
from pcs_3d.fields.base import BaseField, FieldPart
from pcs_3d.fields.field import Surface
from pcs_3d.fields.starts import first_features
from shared.trainable.base import Rate

_EDGES = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])


class Tetrahedra(FieldPart):
    """A grid of `resolution`³ nodes, and a grid of colours with `color_resolution` nodes along each side. Each node of
    the first grid has a signed distance, and can move by almost half a cell.

    lr: the learning rate of the distances, which are measured in cells.
    lr_places: the learning rate of the positions.
    """

    drawn_by: ClassVar[str] = "mesh"
    kind: Literal["tetrahedra"] = "tetrahedra"
    resolution: Annotated[int, Setting(ge=4, le=256)] = 32
    color_resolution: Annotated[int, Setting(ge=4, le=512)] = 64
    lr: Rate = 0.02
    lr_features: Rate | None = 0.1
    lr_places: Rate = 0.01

    def build(self, channels: int = 3, seed: int = 0) -> TetrahedraField:
        return TetrahedraField(self, channels)


class TetrahedraField(BaseField):
    """The signed distances and shifts of the nodes, and a grid of colours.

    distances: [R³], in cells, negative inside.
    moves: [R³, 3], the shift of each node before tanh.
    raw_features: [R', R', R', K]; colours are stored before the sigmoid is applied.
    """

    tets: Tensor

    def __init__(self, part: Tetrahedra, channels: int) -> None:
        super().__init__(part.bound, channels)
        self.part = part
        self.cell = 2 * part.bound / (part.resolution - 1)
        places = grids.nodes(part.resolution, part.bound).reshape(-1, 3)
        self.distances = nn.Parameter((part.start.shape().distance(places) / self.cell).clamp(-3, 3))
        self.moves = nn.Parameter(torch.zeros_like(places))
        features = first_features(part.start, part.color_resolution, part.bound, channels)
        self.raw_features = nn.Parameter(features.contiguous())
        self.places, self.tets = places, tetrahedra(part.resolution)  # not saved, because they follow from the settings

    def to(self, device: torch.device | str) -> TetrahedraField:  # type: ignore[override]
        self.places, self.tets = self.places.to(device), self.tets.to(device)
        return super().to(device)

    def trained(self) -> list[tuple[str, list[nn.Parameter], float]]:
        return [
            ("distances", [self.distances], self.part.lr),
            ("places", [self.moves], self.part.lr_places),
            ("features", [self.raw_features], self.part.feature_rate),
        ]

    def surface(self) -> Surface:
        nodes = self.places.to(self.moves) + self.moves.tanh() * (0.45 * self.cell)
        border = nodes.detach().abs().amax(-1) >= self.bound - 0.5 * self.cell  # the surface is closed at the bound
        distances = torch.where(border, self.distances.abs() + 0.1, self.distances)
        return marching_tetrahedra(nodes, distances, self.tets)

    def features_at(self, points: Tensor) -> Tensor:
        return self.colored(grids.trilinear(self.raw_features, points, self.bound))

    def total_variation(self) -> Tensor:
        """Returns the total variation of the colours before the sigmoid."""
        return grids.total_variation(self.raw_features)

    def slopes(self) -> Tensor:
        """Returns the gradient of the signed distance, `[R, R, R, 3]`, with lengths in object radii. The gradient has
        length 1 where the distance is exact."""
        size = self.part.resolution
        return grids.slopes((self.distances * self.cell).view(size, size, size), self.bound)


def tetrahedra(resolution: int) -> Tensor:
    """Splits each cell of a grid of R³ nodes into six tetrahedra around its diagonal (Kuhn's subdivision). Returns the
    nodes of each tetrahedron, int64 `[6 (R-1)³, 4]`. All tetrahedra have positive volume, and neighbouring cells share
    triangles."""
    strides = torch.tensor([resolution**2, resolution, 1])
    line = torch.arange(resolution - 1)
    first = (torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3) * strides).sum(-1)
    cells = []
    for order in permutations(range(3)):
        steps = torch.cat([torch.zeros(1, dtype=torch.long), strides[list(order)].cumsum(0)])
        odd = sum(order[i] > order[j] for i in range(3) for j in range(i + 1, 3)) % 2
        cells.append(first[:, None] + (steps[[0, 1, 3, 2]] if odd else steps))
    return torch.cat(cells)


@lru_cache
def _triangles() -> Tensor:
    """Returns the triangles in a tetrahedron for each set of corners that can be inside the surface, `[16, 2, 3]`. Bit
    i of the first index is set if corner i is inside. Each triangle is given by the three edges that its vertices lie
    on. In a tetrahedron of positive volume, the vertices are in counter-clockwise order when seen from outside the
    surface. There are up to two triangles, and unused entries are -1."""
    corners = torch.cat([torch.zeros(1, 3), torch.eye(3)])
    edge = {frozenset(pair): i for i, pair in enumerate(_EDGES.tolist())}
    out = torch.full((16, 2, 3), -1)
    for pattern in range(1, 15):
        inside = [i for i in range(4) if pattern >> i & 1]
        outside = [i for i in range(4) if not pattern >> i & 1]
        around = [(i, o) for i, turn in zip(inside, (1, -1), strict=False) for o in outside[::turn]]
        if len(inside) == 3:
            around = [(i, outside[0]) for i in inside]
        loop = [edge[frozenset(pair)] for pair in around]
        a, b, c = corners[_EDGES[loop[:3]]].mean(1)
        outward = corners[outside].mean(0) - corners[inside].mean(0)
        if torch.dot(torch.linalg.cross(b - a, c - a), outward) < 0:
            loop.reverse()
        out[pattern, 0] = torch.tensor(loop[:3])
        if len(loop) == 4:
            out[pattern, 1] = torch.tensor([loop[0], loop[2], loop[3]])
    return out


def marching_tetrahedra(nodes: Tensor, distances: Tensor, tets: Tensor) -> Surface:
    """Extracts the surface on which the signed distance is 0. Its vertices lie on the edges of the tetrahedra and are
    differentiable with respect to the distances and the nodes.

    Args:
        nodes: [V, 3]
        distances: the signed distance at each node, [V], negative inside
        tets: the nodes of each tetrahedron, [T, 4]

    Raises:
        ValueError: the signed distance does not change sign in any tetrahedron
    """
    inside = distances < 0
    corners = inside[tets]
    crossed = corners.any(1) & ~corners.all(1)
    if not crossed.any():
        what = "solid" if bool(inside.any()) else "empty"
        raise ValueError(f"the field has no surface, because it is {what} everywhere")
    tets, corners = tets[crossed], corners[crossed]
    ends = tets[:, _EDGES.to(tets.device)].reshape(-1, 2).sort(-1).values
    split = inside[ends[:, 0]] != inside[ends[:, 1]]
    key = ends[:, 0] * len(nodes) + ends[:, 1]
    edges, number = torch.unique(key[split], return_inverse=True)
    vertex = torch.full_like(key, -1)
    vertex[split] = number
    a, b = edges // len(nodes), edges % len(nodes)
    share = (distances[a] / (distances[a] - distances[b]))[:, None]
    vertices = nodes[a] + share * (nodes[b] - nodes[a])
    pattern = (corners.long() * torch.tensor([1, 2, 4, 8], device=tets.device)).sum(-1)
    triangles = _triangles().to(tets.device)[pattern].flatten(1)
    faces = vertex.view(-1, 6).gather(1, triangles.clamp_min(0)).reshape(-1, 3)
    return Surface(vertices, faces[(triangles >= 0).reshape(-1, 3).all(1)])
