"""Defines the parts of a shape, which are surfaces with colour slots, and the anchors to which accessories are
fitted."""

from __future__ import annotations

from dataclasses import dataclass

from shared.toybox.primitives import Surface

Parts = list[tuple[str, Surface]]


@dataclass(frozen=True)
class Anchors:
    """The positions and sizes that accessories take on a shape, in the shape's units.

    top: (x, z, radius) of a hat
    eyes: (x, z, width) of glasses
    neck: (x, z, radius) of a scarf
    side: how far to the left and right of the middle the arms of glasses must be to pass beside the head
    """

    top: tuple[float, float, float]
    eyes: tuple[float, float, float]
    neck: tuple[float, float, float]
    side: float


def both(part: tuple[str, Surface]) -> Parts:
    """Returns a part and its mirror image on the other side."""
    slot, surface = part
    return [(slot, surface), (slot, surface.mirror())]
