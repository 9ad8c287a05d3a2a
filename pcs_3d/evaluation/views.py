"""Renders meshes from all around, in the colours stored in their files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras, turntable
from pcs_3d.meshes.read_mesh import Piece, colors_on, read_mesh
from pcs_3d.renderers.mesh import on_screen
from pcs_3d.renderers.rasterize import barycentric, nearest_faces

VIEWS, SIDE = 16, 128
_FINER = 2  # for supersampling; each pixel is the mean of 2 × 2 samples


@dataclass(frozen=True)
class Views:
    """B views of an object.

    pixels: [B, 3, H, W] in [0, 1], on white.
    masks: bool [B, H, W], whether the object covers at least half of each pixel.
    """

    pixels: Tensor
    masks: Tensor


@dataclass(frozen=True)
class PaintedMesh:
    """A mesh with a texture or vertex colours. It consists of pieces from `read_mesh`, each of which has faces. The
    pieces are scaled by `scale` and then moved by `offset`."""

    pieces: tuple[Piece, ...]
    scale: float = 1.0
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def vertices(self) -> Tensor:
        """The vertices of all pieces, [V, 3], with x forward, y left and z up."""
        every = np.concatenate([p.vertices for p in self.pieces])
        return (torch.from_numpy(every) * self.scale + torch.tensor(self.offset, dtype=torch.float64)).float()

    @property
    def faces(self) -> Tensor:
        """The faces of all pieces, int64 [F, 3]."""
        starts = np.cumsum([0, *(len(p.vertices) for p in self.pieces)])
        return torch.from_numpy(np.concatenate([p.faces + s for p, s in zip(self.pieces, starts, strict=False)]))

    def placed(self, scale: float, offset: tuple[float, float, float]) -> PaintedMesh:
        """Returns the mesh with this scale and offset instead of its own."""
        return replace(self, scale=scale, offset=offset)

    def colors(self, faces: Tensor, shares: Tensor) -> Tensor:
        """Returns the colours from the file, [N, 3] in [0, 1], at N points. Each point is given by the index of its
        triangle in `faces` (`[N]`) and its barycentric coordinates in that triangle, `shares` (`[N, 3]`)."""
        out, first = torch.zeros(len(faces), 3), 0
        for piece in self.pieces:
            mine = (faces >= first) & (faces < first + len(piece.faces))
            corners = piece.faces[(faces[mine] - first).numpy()]
            out[mine] = torch.from_numpy(colors_on(piece, corners, shares[mine].double().numpy())).float()
            first += len(piece.faces)
        return out


def cameras() -> Cameras:
    """Returns the cameras used in every evaluation, evenly spaced around the object, starting at its front."""
    return turntable(VIEWS)


def painted_mesh(path: Path) -> PaintedMesh:
    """Reads a GLB, OBJ or PLY file as a mesh of radius 1 around the origin. Raises ValueError as `read_mesh` does, and
    also if the file contains only points."""
    pieces = tuple(p for p in read_mesh(path) if len(p.faces))
    if not pieces:
        raise ValueError(f"{path} has points but no faces: only meshes can be evaluated")
    return PaintedMesh(pieces)


def sphere(color: Tensor) -> PaintedMesh:
    """Returns a sphere of radius 1 in one colour (`[3]`). Its scores serve as a baseline."""
    import trimesh

    ball = trimesh.creation.icosphere(3)
    vertices = np.asarray(ball.vertices, dtype=np.float64)
    colors = np.tile(color.double().numpy(), (len(vertices), 1))
    return PaintedMesh((Piece(vertices, np.asarray(ball.faces, dtype=np.int64), colors),))


def draw(mesh: PaintedMesh, around: Cameras, side: int = SIDE) -> Views:
    """Renders a mesh in its own colours, without lighting, on white."""
    vertices, faces, fine = mesh.vertices, mesh.faces, side * _FINER
    pixels = []
    for i in range(len(around)):
        places, depth = on_screen(vertices, around[i : i + 1], fine, fine)
        face = nearest_faces(places[faces], depth[faces], fine, fine)
        y, x = (face >= 0).nonzero(as_tuple=True)
        chosen = face[y, x]
        shares = barycentric(places[faces[chosen]], torch.stack([x, y], -1) + 0.5) / depth[faces[chosen]]
        picture = torch.cat([torch.ones(3, fine, fine), torch.zeros(1, fine, fine)])
        picture[:3, y, x] = mesh.colors(chosen, shares / shares.sum(-1, keepdim=True)).T
        picture[3, y, x] = 1.0
        pixels.append(picture)
    drawn = F.avg_pool2d(torch.stack(pixels), _FINER)
    return Views(drawn[:, :3], drawn[:, 3] >= 0.5)


def silhouettes(mesh: PaintedMesh, around: Cameras, side: int, finer: int = _FINER) -> Tensor:
    """Returns `draw(...).masks` (bool `[B, side, side]`), but computes them much faster.

    All views are stacked vertically in one tall picture. Above and below each view is a margin of half its height,
    for parts that lie outside the view. Vertices beyond the margin are moved to its edge.
    """
    vertices, faces, fine = mesh.vertices, mesh.faces, side * finer
    corners, depths = [], []
    for i in range(len(around)):
        places, depth = on_screen(vertices, around[i : i + 1], fine, fine)
        top, bottom = 2 * fine * i + 0.5, 2 * fine * (i + 1) - 0.5
        down = (places[:, 1:] + (2 * i + 0.5) * fine).clamp(top, bottom)
        corners.append(torch.cat([places[:, :1], down], 1)[faces])
        depths.append(depth[faces])
    found = nearest_faces(torch.cat(corners), torch.cat(depths), 2 * fine * len(around), fine) >= 0
    inside = found.view(len(around), 2 * fine, fine)[:, fine // 2 : fine // 2 + fine]
    return F.avg_pool2d(inside[:, None].float(), finer)[:, 0] >= 0.5


def as_model_pixels(views: Views) -> Tensor:
    """Returns the pixels as `[B, 3, H, W]` in [-1, 1], the format that the instruments expect."""
    return 2 * views.pixels - 1


def angle_name(azimuth_deg: float) -> str:
    """Returns the file name of a view without its extension, such as "022" for 22.5 degrees."""
    return f"{math.floor(azimuth_deg):03d}"
