"""Builds the surfaces from which the toybox's shapes are assembled.

A primitive consists of evenly spaced points on its surface, their outward unit normals, and a test of whether other
points lie inside it. With this test, points that can never be seen are dropped from an assembly. The axes are x forward
(a thing faces +x), y left and z up. Lengths are in the units of the shape that is being built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Inside = Callable[[np.ndarray, float], np.ndarray]


@dataclass(frozen=True)
class Surface:
    """Points on a surface.

    points: [N, 3]
    normals: outward unit normals [N, 3]
    inside: a function of points [M, 3] and a margin. It returns whether each point lies inside by more than the margin,
        bool [M].
    """

    points: np.ndarray
    normals: np.ndarray
    inside: Inside

    def move(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Surface:
        """Returns the surface shifted by (x, y, z)."""
        shift = np.array([x, y, z])
        return Surface(self.points + shift, self.normals, lambda p, m: self.inside(p - shift, m))

    def turn(self, axis: str, degrees: float) -> Surface:
        """Returns the surface rotated about the axis "x", "y" or "z" through the origin."""
        turn = rotation(axis, degrees)
        return Surface(self.points @ turn.T, self.normals @ turn.T, lambda p, m: self.inside(p @ turn, m))

    def mirror(self) -> Surface:
        """Returns the surface reflected left to right (y to -y)."""
        flip = np.array([1.0, -1.0, 1.0])
        return Surface(self.points * flip, self.normals * flip, lambda p, m: self.inside(p * flip, m))


def rotation(axis: str, degrees: float) -> np.ndarray:
    """Returns the right-handed rotation matrix [3, 3] about a coordinate axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def curve(points: Sequence[Sequence[float]] | np.ndarray, n: int = 60) -> np.ndarray:
    """Returns a smooth (Catmull-Rom) curve [n, D] through the points."""
    p = np.asarray(points, float)
    padded = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, len(p) - 1 - 1e-9, n)
    i = t.astype(int)
    f = (t - i)[:, None]
    a, b, c, d = (padded[i + k] for k in range(4))
    return 0.5 * (2 * b + (c - a) * f + (2 * a - 5 * b + 4 * c - d) * f**2 + (3 * b - a - 3 * c + d) * f**3)


def _along(path: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Samples a polyline [K, D] evenly. Returns points [N, D] and the unit tangents of the segments on which they lie,
    [N, D]."""
    steps = np.diff(path, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    steps, starts, lengths = steps[lengths > 1e-9], path[:-1][lengths > 1e-9], lengths[lengths > 1e-9]
    ends = np.cumsum(lengths)
    n = max(2, int(np.ceil(ends[-1] / spacing)))
    s = (np.arange(n) + 0.5) * ends[-1] / n
    k = np.minimum(np.searchsorted(ends, s), len(lengths) - 1)
    f = ((s - (ends[k] - lengths[k])) / lengths[k])[:, None]
    return starts[k] + f * steps[k], steps[k] / lengths[k][:, None]


def _in_polygon(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Returns which of the points [M, 2] lie in a polygon [K, 2] (even-odd rule), bool [M]."""
    inside = np.zeros(len(points), bool)
    x, y = points[:, 0], points[:, 1]
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _edge_distance(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Returns the distances [M] between points [M, 2] and the outline of a polygon [K, 2]."""
    best = np.full(len(points), np.inf)
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        d = b - a
        t = np.clip(((points - a) @ d) / max(float(d @ d), 1e-12), 0, 1)[:, None]
        best = np.minimum(best, np.linalg.norm(points - a - t * d, axis=1))
    return best


def ball(rx: float, ry: float, rz: float, h: float) -> Surface:
    """Samples the surface of an ellipsoid centred on the origin, with points about h apart."""
    wide = max(rx, ry)
    t = np.linspace(-np.pi / 2, np.pi / 2, 400)
    meridian, _ = _along(np.stack([wide * np.cos(t), rz * np.sin(t)], 1), h)
    rows = []
    for k, (r, z) in enumerate(meridian):
        n = max(3, int(np.ceil(2 * np.pi * r / h)))
        a = (np.arange(n) + 0.5 * (k % 2)) * 2 * np.pi / n
        rows.append(np.stack([np.cos(a) * r / wide, np.sin(a) * r / wide, np.full(n, z / rz)], 1))
    unit = np.concatenate(rows)
    radii = np.array([rx, ry, rz])
    normals = unit / radii
    smallest = min(rx, ry, rz)
    return Surface(
        unit * radii,
        normals / np.linalg.norm(normals, axis=1, keepdims=True),
        lambda p, m: np.linalg.norm(p / radii, axis=1) < 1 - m / smallest,
    )


def box(hx: float, hy: float, hz: float, h: float, round_by: float = 0.0) -> Surface:
    """Samples the surface of a box centred on the origin, with half-sizes (hx, hy, hz). Its edges are rounded with the
    radius `round_by`."""
    half = np.array([hx, hy, hz])
    points, normals = [], []
    for axis in range(3):
        u, v = (k for k in range(3) if k != axis)
        grid = [np.linspace(-half[k], half[k], max(2, int(np.ceil(2 * half[k] / h)) + 1)) for k in (u, v)]
        a, b = (g.ravel() for g in np.meshgrid(*grid, indexing="ij"))
        for sign in (-1.0, 1.0):
            p = np.zeros((len(a), 3))
            p[:, u], p[:, v], p[:, axis] = a, b, sign * half[axis]
            n = np.zeros_like(p)
            n[:, axis] = sign
            points.append(p)
            normals.append(n)
    p, n = np.concatenate(points), np.concatenate(normals)
    if round_by > 0:
        core = np.clip(p, -(half - round_by), half - round_by)
        n = (p - core) / np.linalg.norm(p - core, axis=1, keepdims=True)
        p = core + round_by * n
    return Surface(p, n, lambda q, m: np.all(np.abs(q) < half - m - 0.3 * round_by, axis=1))


def lathe(profile: Sequence[Sequence[float]] | np.ndarray, h: float) -> Surface:
    """Revolves a profile of (radius, z) pairs about the z axis. The solid lies to the left of the profile as it is
    traversed."""
    outline = np.asarray(profile, float)
    samples, tangents = _along(outline, h)
    points, normals = [], []
    for k, ((r, z), (dr, dz)) in enumerate(zip(samples, tangents, strict=True)):
        n = max(3, int(np.ceil(2 * np.pi * r / h)))
        a = (np.arange(n) + 0.5 * (k % 2)) * 2 * np.pi / n
        points.append(np.stack([np.cos(a) * r, np.sin(a) * r, np.full(n, z)], 1))
        normals.append(np.stack([np.cos(a) * dz, np.sin(a) * dz, np.full(n, -dr)], 1))

    def inside(p: np.ndarray, m: float) -> np.ndarray:
        q = np.stack([np.linalg.norm(p[:, :2], axis=1), p[:, 2]], 1)
        # Use both halves of the section, so that the axis itself does not count as an edge.
        whole = np.concatenate([outline, outline[::-1] * [-1, 1]]) if outline[0, 0] < 1e-6 else outline
        return _in_polygon(q, whole) & (_edge_distance(q, whole) > m)

    return Surface(np.concatenate(points), np.concatenate(normals), inside)


def extrude(polygon: Sequence[Sequence[float]] | np.ndarray, half: float, h: float) -> Surface:
    """Extrudes a polygon of (x, z) pairs to y = ±half. The pairs are in counter-clockwise order if x points right and z
    points up."""
    outline = np.asarray(polygon, float)
    edge, tangents = _along(np.concatenate([outline, outline[:1]]), h)
    y = np.linspace(-half, half, max(2, int(np.ceil(2 * half / h)) + 1))
    side = np.stack([np.repeat(edge[:, 0], len(y)), np.tile(y, len(edge)), np.repeat(edge[:, 1], len(y))], 1)
    out = np.stack([tangents[:, 1], np.zeros(len(edge)), -tangents[:, 0]], 1).repeat(len(y), 0)
    low, high = outline.min(0), outline.max(0)
    grid = np.meshgrid(*(np.arange(a + h / 2, b, h) for a, b in zip(low, high, strict=True)), indexing="ij")
    flat = np.stack([g.ravel() for g in grid], 1)
    flat = flat[_in_polygon(flat, outline)]
    points, normals = [side], [out]
    for sign in (-1.0, 1.0):
        points.append(np.stack([flat[:, 0], np.full(len(flat), sign * half), flat[:, 1]], 1))
        normals.append(np.tile([0.0, sign, 0.0], (len(flat), 1)))

    def inside(p: np.ndarray, m: float) -> np.ndarray:
        q = p[:, [0, 2]]
        return (np.abs(p[:, 1]) < half - m) & _in_polygon(q, outline) & (_edge_distance(q, outline) > m)

    return Surface(np.concatenate(points), np.concatenate(normals), inside)


def tube(path: Sequence[Sequence[float]] | np.ndarray, radius: float | Sequence[float], h: float) -> Surface:
    """Samples the surface of a round tube with closed ends. It follows a smooth curve through the K points of the path
    [K, 3]. Its radius is constant or given at each of these points."""
    spine = curve(path, 80)
    radii = np.broadcast_to(np.asarray(radius, float), (len(path),))
    widths = curve(radii[:, None], 80)[:, 0]
    steps = np.linalg.norm(np.diff(spine, axis=0), axis=1)
    s = np.concatenate([[0], np.cumsum(steps)])
    n = max(3, int(np.ceil(s[-1] / h)) + 1)
    at = np.linspace(0, s[-1], n)
    centre = np.stack([np.interp(at, s, spine[:, k]) for k in range(3)], 1)
    width = np.interp(at, s, widths)
    tangent = np.gradient(centre, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    points, normals = [], []
    # The axis least aligned with the path gives a frame with negligible twist.
    side = np.eye(3)[np.argmin(np.abs(tangent).max(0))]
    for c, t, w in zip(centre, tangent, width, strict=True):
        u = np.cross(t, side)
        u /= np.linalg.norm(u)
        v = np.cross(t, u)
        k = max(3, int(np.ceil(2 * np.pi * w / h)))
        a = np.arange(k) * 2 * np.pi / k
        d = np.cos(a)[:, None] * u + np.sin(a)[:, None] * v
        points.append(c + w * d)
        normals.append(d)
    for c, w in ((centre[0], width[0]), (centre[-1], width[-1])):
        cap = ball(w, w, w, h)
        points.append(cap.points + c)
        normals.append(cap.normals)

    def inside(p: np.ndarray, m: float) -> np.ndarray:
        result = np.zeros(len(p), bool)
        for c, w in zip(centre, width, strict=True):
            result |= ((p - c) ** 2).sum(1) < max(w - m, 0.0) ** 2
        return result

    return Surface(np.concatenate(points), np.concatenate(normals), inside)
