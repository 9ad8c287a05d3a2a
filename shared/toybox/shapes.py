"""Builds every class of thing as a cloud of surface points. Clouds are cached by class and spacing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shared.toybox import shapes_living, shapes_made
from shared.toybox.part_colors import SLOTS
from shared.toybox.parts import Anchors, Parts

SHAPES = {
    "duck": shapes_living.duck,
    "car": shapes_made.car,
    "mug": shapes_made.mug,
    "robot": shapes_living.robot,
    "rocket": shapes_made.rocket,
    "house": shapes_made.house,
    "dog": shapes_living.dog,
    "cat": shapes_living.cat,
    "teapot": shapes_made.teapot,
    "boot": shapes_made.boot,
    "boat": shapes_made.boat,
    "bear": shapes_living.bear,
}


@dataclass(frozen=True)
class Cloud:
    """A shape inside the unit sphere.

    points, normals: [N, 3]
    slots: [N], indices into part_colors.DETAILS
    bottom: the z coordinate of the ground under the shape
    foot: half the shape's length (x) and width (y) on the ground, for the contact shadow
    """

    points: np.ndarray
    normals: np.ndarray
    slots: np.ndarray
    anchors: Anchors
    bottom: float
    foot: tuple[float, float]


def visible(parts: Parts, margin: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the parts' points, normals and slots, leaving out points deeper than `margin` inside another part."""
    kept = []
    for index, (slot, surface) in enumerate(parts):
        points = surface.points
        buried = np.zeros(len(points), bool)
        for other, (_, hull) in enumerate(parts):
            if other != index:
                buried |= hull.inside(points, margin)
        keep = ~buried
        kept.append((points[keep], surface.normals[keep], np.full(int(keep.sum()), SLOTS[slot])))
    points, normals, slots = (np.concatenate(column) for column in zip(*kept, strict=True))
    return points, normals, slots


def _frame(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the bounding box's centre [3], with y = 0, and the radius of the bounding sphere with this centre."""
    centre = (points.min(0) + points.max(0)) / 2
    centre[1] = 0.0
    return centre, float(np.linalg.norm(points - centre, axis=1).max())


def place(anchors: Anchors, centre: np.ndarray, radius: float) -> Anchors:
    """Maps the anchors into the unit sphere."""

    def spot(a: tuple[float, float, float]) -> tuple[float, float, float]:
        return (a[0] - centre[0]) / radius, (a[1] - centre[2]) / radius, a[2] / radius

    return Anchors(spot(anchors.top), spot(anchors.eyes), spot(anchors.neck), anchors.side / radius)


@lru_cache(maxsize=64)
def cloud(class_name: str, spacing: float = 0.02) -> Cloud:
    """Builds the cloud of a class. `spacing` is the distance between neighbouring points for a shape of radius 1."""
    make = SHAPES[class_name]
    rough, _ = make(0.08)
    centre, radius = _frame(np.concatenate([s.points for _, s in rough]))
    parts, anchors = make(spacing * radius)
    points, normals, slots = visible(parts, 0.5 * spacing * radius)
    points = (points - centre) / radius
    low = points[:, 2] < points[:, 2].min() + 0.25
    foot = np.abs(points[low]).max(0)
    return Cloud(
        points.astype(np.float32),
        normals.astype(np.float32),
        slots.astype(np.int64),
        place(anchors, centre, radius),
        float(points[:, 2].min()),
        (float(foot[0]), float(foot[1])),
    )
