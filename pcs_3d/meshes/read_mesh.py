"""Reads meshes and points from GLB, OBJ and PLY files and scales them to radius 1 around the origin. The files may be
hostile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pcs_3d.meshes import file_checks
from shared.config import expanded, unknown
from shared.io.failures import of_the_machine

_CHECKS: dict[str, Callable[[Path], None]] = {
    ".glb": file_checks.check_glb,
    ".obj": file_checks.check_obj,
    ".ply": file_checks.check_ply,
}


@dataclass(frozen=True)
class Piece:
    """Triangles with at most one texture, or points.

    vertices: [V, 3].
    faces: [F, 3], empty for points.
    colors: the colour of each vertex, [V, 3] in [0, 1], or None.
    uv: the texture coordinates of each vertex, [V, 2] with v up, or None.
    texture: uint8 [H, W, 3], or None.
    """

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray | None = None
    uv: np.ndarray | None = None
    texture: np.ndarray | None = None


def read_mesh(path: Path | str, up: Literal["y", "z"] | None = None, azimuth_deg: float = 0.0) -> list[Piece]:
    """Reads the pieces of a file, with x forward, y left and z up. The pieces are scaled together to radius 1 around
    the origin.

    Points with non-finite coordinates are dropped, together with their triangles. Triangles without area are dropped as
    well. Raises ValueError if the file has an unsupported format, contains or declares too much data, refers to files
    outside its folder, or has too little usable geometry.
    """
    path = expanded(path)
    if path.suffix.lower() not in _CHECKS:
        raise ValueError(f"{path}: " + unknown(path.suffix, _CHECKS, "mesh format"))
    file_checks.check_size_of(path)
    _CHECKS[path.suffix.lower()](path)
    pieces = [p for p in map(_cleaned, _loaded(path)) if len(p.vertices)]
    if not pieces:
        raise ValueError(f"{path} contains no triangles and no points with finite coordinates")
    if any(len(p.faces) for p in pieces):
        pieces = [p for p in pieces if len(p.faces)]
    elif sum(len(p.vertices) for p in pieces) < 16:
        raise ValueError(f"{path} has no triangles and too few points to form a shape")
    return _normalised(path, pieces, up or ("z" if path.suffix.lower() == ".ply" else "y"), azimuth_deg)


def _loaded(path: Path) -> list[Piece]:
    import trimesh

    resolver = file_checks.FolderResolver(path)
    with _readable(path), path.open("rb") as stream:
        kind: Any = path.suffix.lower()[1:]
        scene = trimesh.load_scene(stream, file_type=kind, resolver=resolver, process=False)  # type: ignore[arg-type]
        places = [scene.graph[name] for name in scene.graph.nodes_geometry]
        shown = [scene.geometry[geometry] for _, geometry in places]
        images = {id(g.visual.material): image for g in shown if (image := _image(g)) is not None}
    if resolver.failure is not None:
        raise resolver.failure
    if resolver.refused:
        raise ValueError(f"{path} refers to a file that cannot be used: {resolver.refused[0]}")
    file_checks.check_total(path, shown, list(images.values()))
    textures: dict[int, np.ndarray] = {}  # by material, because meshes can share a material
    with _readable(path):
        return [
            _piece(geometry, np.asarray(matrix, dtype=np.float64), textures)
            for geometry, (matrix, _) in zip(shown, places, strict=True)
        ]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Converts any exception that a parser raises on hostile bytes, except failures of the machine, into a ValueError."""
    try:
        yield
    except Exception as error:
        if of_the_machine(error):
            raise
        raise ValueError(f"{path} cannot be read as a mesh: {type(error).__name__}: {str(error)[:200]}") from None


def _piece(geometry: Any, matrix: np.ndarray, textures: dict[int, np.ndarray]) -> Piece:
    vertices = np.asarray(geometry.vertices, dtype=np.float64).reshape(-1, 3)
    with np.errstate(all="ignore"):
        vertices = vertices @ matrix[:3, :3].T + matrix[:3, 3]
    faces = np.asarray(getattr(geometry, "faces", np.zeros((0, 3))), dtype=np.int64).reshape(-1, 3)
    piece = Piece(vertices, faces)
    visual: Any = getattr(geometry, "visual", None)
    if visual is not None and getattr(visual, "kind", None) == "texture":
        if (image := _image(geometry)) is not None:
            material = visual.material
            if id(material) not in textures:
                textures[id(material)] = _texture(image, material)
            return replace(piece, texture=textures[id(material)], uv=np.asarray(visual.uv, dtype=np.float64))
        plain = np.asarray(visual.material.main_color)[:3] / 255.0
        return replace(piece, colors=np.tile(plain, (len(vertices), 1)))
    points = not len(faces)
    colors = geometry.colors if points and hasattr(geometry, "colors") else getattr(visual, "vertex_colors", None)
    known = points or getattr(visual, "kind", None) is not None  # without colours, trimesh returns a default grey
    colors = np.asarray(colors if known and colors is not None else [])
    if colors.ndim == 2 and len(colors) == len(vertices) and colors.shape[1] >= 3:
        return replace(piece, colors=colors[:, :3] / 255.0)
    return piece


def _image(geometry: Any) -> Any:
    """Returns the PIL image of a geometry's texture without decoding it, or None if there is none."""
    visual: Any = getattr(geometry, "visual", None)
    if getattr(visual, "kind", None) != "texture" or visual.uv is None:
        return None
    return getattr(visual.material, "baseColorTexture", None) or getattr(visual.material, "image", None)


def _texture(image: Any, material: Any) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB"))
    factor = getattr(material, "baseColorFactor", None)
    if factor is not None:
        factor = np.asarray(factor, dtype=np.float64)[:3] / (255.0 if np.asarray(factor).dtype.kind in "ui" else 1.0)
        pixels = (pixels * factor).clip(0, 255).astype(np.uint8)
    return pixels


def _cleaned(piece: Piece) -> Piece:
    """Drops points that are not finite, and triangles that have no area or refer to dropped or missing points."""
    good = np.asarray((np.isfinite(piece.vertices) & (np.abs(piece.vertices) < 1e30)).all(1))
    if piece.uv is not None and (len(piece.uv) != len(good) or not np.isfinite(piece.uv).all()):
        piece = replace(piece, uv=None, texture=None)
    faces = piece.faces
    if len(faces):
        faces = faces[((faces >= 0) & (faces < len(good))).all(1)]
        faces = faces[good[faces].all(1)]
        size = float(np.ptp(piece.vertices[good], axis=0).max()) if good.any() else 1.0
        a, b, c = (piece.vertices[faces[:, i]] / (size or 1.0) for i in range(3))
        faces = faces[np.linalg.norm(np.cross(b - a, c - a), axis=1) > 1e-14]
        if not len(faces):
            return Piece(np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64))
    kept = good if not len(faces) else np.isin(np.arange(len(good)), faces)
    number = np.cumsum(kept) - 1
    take = [None if v is None else v[kept] for v in (piece.colors, piece.uv)]
    return Piece(piece.vertices[kept], number[faces] if len(faces) else faces, take[0], take[1], piece.texture)


def _normalised(path: Path, pieces: list[Piece], up: str, azimuth_deg: float) -> list[Piece]:
    every = np.concatenate([p.vertices for p in pieces])
    centre = (every.min(0) + every.max(0)) / 2
    radius = float(np.sqrt(((every - centre) ** 2).sum(1).max()))
    if not radius > 1e-30:
        raise ValueError(f"{path} has no extent, because all its points coincide")
    turn = np.eye(3) if up == "z" else np.eye(3)[[2, 0, 1]]  # in glTF, y is up, z is forward and x is to the left
    angle = math.radians(azimuth_deg)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ turn
    return [replace(p, vertices=(p.vertices - centre) / radius @ turn.T) for p in pieces]


def sampled(pieces: list[Piece], count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples points evenly over the triangles. Pieces without triangles contribute their own points. The same pieces
    always give the same points.

    Returns:
        The points, [N, 3], and their colours, [N, 3] in [0, 1]. Pieces without colours are grey. If no piece has
        colours, the second value is None.
    """
    rng = np.random.default_rng(0)
    areas = [_areas(p) for p in pieces]
    total = sum(a.sum() for a in areas)
    points, colors = [], []
    for piece, area in zip(pieces, areas, strict=True):
        if not len(piece.faces):
            points.append(piece.vertices)
            colors.append(np.full((len(piece.vertices), 3), 0.5) if piece.colors is None else piece.colors)
            continue
        n = max(1, round(count * area.sum() / total))
        corners = piece.faces[rng.choice(len(area), n, p=area / area.sum())]
        share = rng.dirichlet((1, 1, 1), n)
        points.append(np.einsum("nk,nkd->nd", share, piece.vertices[corners]))
        colors.append(colors_on(piece, corners, share))
    known = any(p.colors is not None or p.texture is not None for p in pieces)
    return np.concatenate(points), np.concatenate(colors) if known else None


def _areas(piece: Piece) -> np.ndarray:
    a, b, c = (piece.vertices[piece.faces[:, i]] for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def colors_on(piece: Piece, corners: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Returns the colours of N points on a piece, `[N, 3]` in [0, 1], or grey if the piece has no colours. Each point
    is given by the vertices of its triangle (`corners`, `[N, 3]`) and its barycentric coordinates (`share`,
    `[N, 3]`)."""
    if piece.texture is not None and piece.uv is not None:
        u, v = np.einsum("nk,nkd->nd", share, piece.uv[corners]).T % 1.0
        h, w = piece.texture.shape[:2]
        return piece.texture[((1 - v) * h).astype(int).clip(0, h - 1), (u * w).astype(int).clip(0, w - 1)] / 255.0
    if piece.colors is not None:
        return np.einsum("nk,nkd->nd", share, piece.colors[corners])
    return np.full((len(corners), 3), 0.5)
