"""The parts of a shape: surfaces by color slot, and the places where accessories sit."""

from __future__ import annotations

from dataclasses import dataclass

from shared.toybox.primitives import Surface

Parts = list[tuple[str, Surface]]


@dataclass(frozen=True)
class Anchors:
    """Where accessories sit, in the units of the shape.

    top: (x, z, radius) of a hat
    eyes: (x, z, width) of glasses
    neck: (x, z, radius) of a scarf
    side: how far to the left and right the arms of glasses must reach to pass beside the head
    """

    top: tuple[float, float, float]
    eyes: tuple[float, float, float]
    neck: tuple[float, float, float]
    side: float


def both(part: tuple[str, Surface]) -> Parts:
    """Returns a part and its mirror image on the other side."""
    slot, surface = part
    return [(slot, surface), (slot, surface.mirror())]
