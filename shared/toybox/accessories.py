"""Builds the accessories that things wear (a hat, a crown, glasses and a scarf). Each is a point cloud that is fitted
to its wearer's anchors."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from shared.toybox.part_colors import SLOTS
from shared.toybox.parts import Anchors, Parts, both
from shared.toybox.primitives import ball, box, curve, lathe, tube
from shared.toybox.shapes import visible


def _hat(h: float) -> Parts:
    crown = curve([(0.62, -0.1), (0.6, 0.5), (0.5, 0.95), (0.0, 1.02)])
    return [
        ("hat", lathe([(0, -0.12), (1.15, -0.12), (1.15, 0.06), (0, 0.06)], h)),
        ("hat", lathe(np.concatenate([[[0, -0.1]], crown]), h)),
        ("band", lathe([(0, 0.06), (0.66, 0.06), (0.65, 0.3), (0, 0.3)], h)),
    ]


def _crown(h: float) -> Parts:
    parts: Parts = [("gold", lathe([(0.74, -0.15), (0.88, -0.15), (0.96, 0.5), (0.82, 0.5), (0.74, -0.15)], h))]
    for k in range(6):
        spike = lathe([(0, 0.36), (0.36, 0.36), (0, 1.05)], h)
        parts.append(("gold", spike.move(x=0.86).turn("z", 60 * k + 30)))
        parts.append(("alarm", ball(0.12, 0.12, 0.12, h).move(0.94, 0, 0.28).turn("z", 60 * k + 30)))
    return parts


def _glasses(h: float) -> Parts:
    ring = [(0.05 * 0, 0.44 * np.cos(a), 0.4 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 13)]
    parts: Parts = [("rose", box(0.09, 0.12, 0.08, h).move(0, 0, 0.08))]
    parts += both(("rose", tube(ring, 0.13, h).move(y=0.54)))
    parts += both(("lens", ball(0.05, 0.4, 0.36, h).move(0, 0.54, 0)))
    parts += both(("rose", tube([(0.0, 0.98, 0.1), (-0.8, 1.04, 0.12), (-1.5, 1.0, 0.02)], 0.09, h)))
    return parts


def _scarf(h: float) -> Parts:
    parts: Parts = []
    for k in range(12):
        angles = np.radians(30 * k + np.array([0.0, 15.0, 30.0]))
        parts.append((f"rainbow{k % 6}", tube([(np.cos(a), np.sin(a), 0.0) for a in angles], 0.25, h)))
    for k in range(5):
        tail = box(0.1, 0.24, 0.15, h, 0.03).move(1.12 + 0.03 * k, 0.42, -0.32 - 0.26 * k)
        parts.append((f"rainbow{(k + 1) % 6}", tail))
    return parts


_MAKERS = {"red hat": _hat, "yellow crown": _crown, "pink glasses": _glasses, "rainbow scarf": _scarf}


@lru_cache(maxsize=32)
def accessory(name: str, spacing: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the points [N, 3], normals [N, 3] and slots [N] of an accessory, before it is fitted to a wearer."""
    # Fitting shrinks an accessory to about 0.42 of its size, so the points can be spaced more widely here.
    points, normals, slots = visible(_MAKERS[name](spacing / 0.42), spacing)
    return points.astype(np.float32), normals.astype(np.float32), slots.astype(np.int64)


def fit(name: str, anchors: Anchors) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Returns the scale (x, y, z) and position (x, y, z) of an accessory on its wearer."""
    if name == "pink glasses":
        x, z, width = anchors.eyes
        return (width, max(width, 1.03 * anchors.side), width), (x + 0.04, 0.0, z)
    if name == "rainbow scarf":
        x, z, radius = anchors.neck
        return (radius, radius, min(radius, 0.5)), (x, 0.0, z)
    x, z, radius = anchors.top
    return (radius, radius, radius), (x, 0.0, z)


assert all(slot in SLOTS for slot in ("hat", "band", "gold", "rose", "lens", "rainbow5"))
