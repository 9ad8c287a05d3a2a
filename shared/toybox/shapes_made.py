"""Builds the vehicles, the mug, the teapot, the boot and the house. Each class of thing has a function that returns a
list of (slot, surface) pairs and the anchors to which accessories are fitted.

x points forward, y left and z up, in arbitrary units. `shapes.py` scales every class to a bounding sphere of radius 1.
`h` is the spacing of the surface points.
"""

from __future__ import annotations

import numpy as np

from shared.toybox.parts import Anchors, Parts, both
from shared.toybox.primitives import Surface, ball, box, curve, extrude, lathe, rotation, tube


def car(h: float) -> tuple[Parts, Anchors]:
    """Builds a car with headlights at the front and red taillights at the back. The cabin's roof and pillars have the
    second colour."""
    body = [(-1, -0.22), (0.98, -0.22), (1.05, -0.1), (1.02, 0.12), (0.5, 0.2), (-0.95, 0.22), (-1.05, 0.1)]
    cabin = [(-0.8, 0.2), (0.48, 0.2), (0.16, 0.52), (-0.66, 0.52)]
    roof = [(-0.75, 0.48), (0.27, 0.48), (0.1, 0.64), (-0.6, 0.64)]
    parts: Parts = [
        ("main", extrude(body, 0.5, h)),
        ("glass", extrude(cabin, 0.4, h)),
        ("second", extrude(roof, 0.46, h)),
        ("dark", box(0.05, 0.34, 0.07, h).move(1.03, 0, -0.02)),
        ("metal", box(0.06, 0.5, 0.05, h).move(1.03, 0, -0.18)),
        ("metal", box(0.06, 0.5, 0.05, h).move(-1.03, 0, -0.16)),
    ]
    parts += both(("second", box(0.06, 0.03, 0.16, h).move(-0.2, 0.4, 0.36)))
    parts += both(("second", box(0.06, 0.06, 0.18, h).turn("y", -16).move(-0.72, 0.4, 0.34)))
    parts += both(("second", box(0.05, 0.06, 0.22, h).turn("y", 45).move(0.3, 0.4, 0.36)))
    parts += both(("lamp", ball(0.06, 0.12, 0.1, h).move(1.03, 0.36, 0.03)))
    parts += both(("alarm", box(0.04, 0.1, 0.07, h).move(-1.02, 0.37, 0.06)))
    for x in (0.62, -0.62):
        wheel = lathe([(0, -0.1), (0.27, -0.1), (0.27, 0.1), (0, 0.1)], h).turn("x", 90)
        hub = lathe([(0, -0.1), (0.13, -0.1), (0.13, 0.1), (0, 0.1)], h).turn("x", 90)
        parts += both(("tire", wheel.move(x, 0.45, -0.25)))
        parts += both(("metal", hub.move(x, 0.475, -0.25)))
    return parts, Anchors(top=(-0.25, 0.62, 0.38), eyes=(1.1, 0.06, 0.6), neck=(-0.22, 0.28, 0.58), side=0.53)


def mug(h: float) -> tuple[Parts, Anchors]:
    """Builds a mug with a red heart on a badge at the front and a handle at the back. The handle, rim and foot have the
    second colour."""
    wall = [(0, -0.68), (0.6, -0.68), (0.6, 0.56), (0.5, 0.56), (0.5, -0.55), (0, -0.55)]
    rim = [(0.48, 0.5), (0.63, 0.5), (0.63, 0.68), (0.48, 0.68), (0.48, 0.5)]
    foot = [(0, -0.74), (0.63, -0.74), (0.63, -0.54), (0, -0.54)]
    loop = [(-0.55, 0, 0.36), (-0.88, 0, 0.4), (-1.08, 0, 0.08), (-0.96, 0, -0.26), (-0.55, 0, -0.36)]
    parts: Parts = [
        ("main", lathe(wall, h)),
        ("second", lathe(rim, h)),
        ("second", lathe(foot, h)),
        ("second", tube(loop, 0.12, h)),
        ("ivory", ball(0.07, 0.25, 0.25, h).move(0.57, 0, -0.02)),
        ("alarm", ball(0.06, 0.09, 0.09, h).move(0.615, 0.07, 0.03)),
        ("alarm", ball(0.06, 0.09, 0.09, h).move(0.615, -0.07, 0.03)),
        ("alarm", box(0.03, 0.1, 0.1, h).turn("x", 45).move(0.635, 0, -0.05)),
        ("wood", ball(0.5, 0.5, 0.02, h).move(0, 0, 0.46)),
    ]
    return parts, Anchors(top=(0, 0.74, 0.56), eyes=(0.68, 0.22, 0.52), neck=(0, 0.36, 0.66), side=0.62)


def rocket(h: float) -> tuple[Parts, Anchors]:
    """Builds a rocket with a porthole and a hatch at the front and a ladder at the back. The nose and fins have the
    second colour."""
    hull = curve([(0, -0.74), (0.26, -0.72), (0.4, -0.3), (0.41, 0.1), (0.32, 0.5), (0.22, 0.68)])
    nose = curve([(0.26, 0.58), (0.2, 0.78), (0.1, 1.0), (0.0, 1.16)])
    fin = [(0.24, -0.3), (0.24, -0.72), (0.44, -0.74), (0.74, -1.0), (0.74, -0.72), (0.46, -0.26)]
    mirrored = np.asarray(fin)[::-1] * [-1, 1]
    parts: Parts = [
        ("main", lathe(np.concatenate([hull, [[0, 0.68]]]), h)),
        ("second", lathe(np.concatenate([[[0, 0.58]], nose]), h)),
        ("metal", lathe([(0, -0.9), (0.24, -0.9), (0.16, -0.7), (0, -0.7)], h)),
        ("orange", ball(0.15, 0.15, 0.2, h).move(0, 0, -0.92)),
        ("metal", ball(0.1, 0.21, 0.21, h).move(0.33, 0, 0.24)),
        ("glass", ball(0.1, 0.14, 0.14, h).move(0.37, 0, 0.24)),
        ("metal", ball(0.08, 0.14, 0.2, h).move(0.35, 0, -0.28)),
        ("dark", ball(0.08, 0.09, 0.14, h).move(0.38, 0, -0.28)),
    ]
    for turn in (45, 135):
        parts.append(("second", extrude(fin, 0.06, h).turn("z", turn)))
        parts.append(("second", extrude(mirrored, 0.06, h).turn("z", turn)))
    for z in (-0.4, -0.2, 0.0, 0.2, 0.4):
        parts.append(("dark", box(0.04, 0.15, 0.03, h).move(-0.4 + 0.1 * max(z, 0), 0, z)))
    return parts, Anchors(top=(0, 0.86, 0.24), eyes=(0.46, 0.26, 0.42), neck=(0, 0.52, 0.36), side=0.42)


def house(h: float) -> tuple[Parts, Anchors]:
    """Builds a house with a door, two windows and a small round window at the front, and a chimney at the back. The
    roof has the second colour."""
    gable = [(-0.62, 0.14), (0.62, 0.14), (0.0, 0.66)]
    slope = [(0.0, 0.64), (0.78, -0.02), (0.8, 0.1), (0.0, 0.78)]
    other = np.asarray(slope)[::-1] * [-1, 1]
    parts: Parts = [
        ("main", box(0.6, 0.56, 0.42, h).move(0, 0, -0.26)),
        ("main", extrude(gable, 0.56, h).turn("z", 90)),
        ("second", extrude(slope, 0.7, h).turn("z", 90)),
        ("second", extrude(other, 0.7, h).turn("z", 90)),
        ("metal", box(0.1, 0.1, 0.26, h).move(-0.34, 0.36, 0.66)),
        ("dark", box(0.12, 0.12, 0.05, h).move(-0.34, 0.36, 0.94)),
        ("wood", box(0.04, 0.14, 0.25, h).move(0.6, 0, -0.42)),
        ("gold", ball(0.05, 0.04, 0.04, h).move(0.64, 0.08, -0.42)),
        ("ivory", box(0.03, 0.18, 0.03, h).move(0.61, 0, -0.14)),
        ("ivory", ball(0.04, 0.14, 0.14, h).move(0.7, 0, 0.22)),
        ("glass", ball(0.05, 0.09, 0.09, h).move(0.72, 0, 0.22)),
        ("metal", box(0.12, 0.2, 0.04, h).move(0.68, 0, -0.66)),
    ]
    # Dormers make the walls' colour and pattern visible from above, too.
    for turn in (90, -90):
        parts.append(("main", box(0.16, 0.2, 0.17, h).move(0.5, 0.08, 0.36).turn("z", turn)))
        parts.append(("glass", box(0.02, 0.1, 0.08, h).move(0.66, 0.08, 0.38).turn("z", turn)))
    parts += both(("ivory", box(0.03, 0.14, 0.15, h).move(0.6, 0.36, -0.26)))
    parts += both(("glass", box(0.04, 0.1, 0.11, h).move(0.61, 0.36, -0.26)))
    return parts, Anchors(top=(0, 0.76, 0.36), eyes=(0.68, -0.2, 0.66), neck=(0, 0.06, 0.74), side=0.58)


def teapot(h: float) -> tuple[Parts, Anchors]:
    """Builds a teapot with a spout at the front and a handle at the back. The lid, handle and foot have the second
    colour."""
    body = curve([(0, -0.5), (0.4, -0.5), (0.64, -0.24), (0.66, 0.0), (0.5, 0.3), (0.3, 0.42), (0, 0.44)])
    lid = curve([(0.0, 0.3), (0.4, 0.34), (0.42, 0.42), (0.3, 0.54), (0, 0.6)])
    spout = [(0.5, 0, -0.18), (0.8, 0, -0.08), (0.94, 0, 0.2), (1.12, 0, 0.42)]
    loop = [(-0.48, 0, 0.26), (-0.82, 0, 0.36), (-1.04, 0, 0.1), (-0.9, 0, -0.2), (-0.56, 0, -0.26)]
    parts: Parts = [
        ("main", lathe(body, h)),
        ("second", lathe(lid, h)),
        ("second", ball(0.14, 0.14, 0.13, h).move(0, 0, 0.7)),
        ("second", lathe([(0, -0.58), (0.46, -0.58), (0.46, -0.44), (0, -0.44)], h)),
        ("main", tube(spout, [0.22, 0.17, 0.13, 0.1], h)),
        ("dark", ball(0.07, 0.075, 0.07, h).move(1.17, 0, 0.48)),
        ("second", tube(loop, 0.095, h)),
    ]
    return parts, Anchors(top=(0, 0.56, 0.36), eyes=(0.66, 0.16, 0.5), neck=(0, 0.32, 0.47), side=0.6)


def boot(h: float) -> tuple[Parts, Anchors]:
    """Builds a boot with its toe and white laces at the front and a pull loop at the back. The sole, heel, cuff and
    loop have the second colour."""
    sole = curve([(0.92, 0.0), (0.78, 0.26), (0.4, 0.3), (0, 0.23), (-0.36, 0.26), (-0.52, 0.0)], 40)
    outline = np.concatenate([sole, sole[-2:0:-1] * [1, -1]])
    # The outline is in (x, y), but `extrude` works in (x, z), so the result is rotated about the x axis.
    flat = extrude(outline[::-1] if _clockwise(outline) else outline, 0.09, h).turn("x", 90)
    shaft = [(0, -0.6), (0.31, -0.6), (0.32, 0.55), (0.24, 0.55), (0.24, 0.2), (0, 0.2)]
    cuff = [(0.25, 0.42), (0.39, 0.42), (0.41, 0.72), (0.25, 0.72), (0.25, 0.42)]
    parts: Parts = [
        ("second", flat.move(0, 0, -0.74)),
        ("second", box(0.2, 0.21, 0.12, h).move(-0.24, 0, -0.86)),
        ("main", ball(0.5, 0.29, 0.27, h).move(0.36, 0, -0.5)),
        ("main", lathe(shaft, h).move(-0.16, 0, 0.0)),
        ("main", ball(0.36, 0.28, 0.3, h).move(-0.1, 0, -0.42)),
        ("main", tube([(0.0, 0, 0.1), (0.06, 0, -0.2), (0.3, 0, -0.44)], [0.2, 0.24, 0.25], h)),
        ("second", lathe(cuff, h).move(-0.16, 0, 0.0)),
        ("dark", ball(0.25, 0.25, 0.02, h).move(-0.16, 0, 0.5)),
        ("second", tube([(-0.5, 0, 0.5), (-0.68, 0, 0.3), (-0.5, 0, 0.08)], 0.06, h)),
    ]
    for x, z in ((0.18, 0.32), (0.2, 0.12), (0.27, -0.08), (0.42, -0.22)):
        parts.append(("ivory", tube([(x - 0.04, -0.15, z), (x, 0, z + 0.04), (x - 0.04, 0.15, z)], 0.05, h)))
    return parts, Anchors(top=(-0.16, 0.74, 0.42), eyes=(0.32, 0.32, 0.44), neck=(-0.16, 0.2, 0.37), side=0.34)


def _clockwise(outline: np.ndarray) -> bool:
    x, y = outline[:, 0], outline[:, 1]
    return bool(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) < 0)


def _hull(h: float) -> Surface:
    """Builds a boat's hull, which is half an ellipsoid with a raised, pointed bow, closed by a deck."""
    egg = ball(1.0, 0.46, 0.5, h * 0.8)
    keep = egg.points[:, 2] < 0
    points, normals = egg.points[keep], egg.normals[keep]
    deck = extrude([(x, z) for x, z in zip(np.cos(_TURN), 0.46 * np.sin(_TURN), strict=True)], 0.01, h).turn("x", 90)
    top = deck.points[:, 2] > 0
    points = np.concatenate([points, deck.points[top] * [1, 1, 0]])
    normals = np.concatenate([normals, np.tile([0.0, 0.0, 1.0], (int(top.sum()), 1))])
    points[:, 2] = np.maximum(points[:, 2], -0.36)  # the keel is flat, so that the boat can stand
    # The bow is pulled forward and up, and the stern slightly up, as in the sheer of a toy boat.
    lift = 0.3 * np.clip(points[:, 0], 0, None) ** 2 + 0.1 * np.clip(-points[:, 0], 0, None) ** 2
    points = points + np.stack([0.1 * lift, 0 * lift, lift], 1)
    return Surface(points, normals, lambda p, m: egg.inside(p, m + 0.05) & (p[:, 2] < -m))


_TURN = np.linspace(0, 2 * np.pi, 48, endpoint=False)


def boat(h: float) -> tuple[Parts, Anchors]:
    """Builds a tugboat with a flag and a lamp at the front and a funnel at the back. The cabin and funnel have the
    second colour."""
    parts: Parts = [
        ("main", _hull(h)),
        ("second", box(0.36, 0.3, 0.28, h, 0.02).move(-0.08, 0, 0.26)),
        ("ivory", box(0.42, 0.36, 0.04, h).move(-0.08, 0, 0.56)),
        ("second", lathe([(0, 0), (0.15, 0), (0.15, 0.36), (0, 0.36)], h).move(-0.26, 0, 0.56)),
        ("dark", lathe([(0, 0), (0.17, 0), (0.17, 0.13), (0, 0.13)], h).move(-0.26, 0, 0.9)),
        ("wood", tube([(0.62, 0, 0.0), (0.62, 0, 0.72)], 0.04, h)),
        ("orange", box(0.02, 0.03, 0.1, h).move(0.62, 0, 0.66)),
        ("orange", box(0.17, 0.025, 0.1, h).move(0.48, 0, 0.66)),
        ("lamp", ball(0.09, 0.09, 0.09, h).move(0.3, 0, 0.64)),
        ("wood", box(0.04, 0.12, 0.16, h).move(-0.43, 0, 0.16)),
    ]
    parts += both(("glass", box(0.03, 0.1, 0.1, h).move(0.27, 0.14, 0.34)))
    parts += both(("glass", ball(0.09, 0.04, 0.09, h).move(0.08, 0.3, 0.32)))
    parts += both(("glass", ball(0.09, 0.04, 0.09, h).move(-0.22, 0.3, 0.32)))
    for turn in (-38, 38):
        stripe = rotation("z", turn) @ np.array([0.8, 0, 0])
        parts.append(("ivory", ball(0.1, 0.1, 0.1, h).move(stripe[0], stripe[1] * 0.6, 0.06)))
    return parts, Anchors(top=(-0.26, 1.02, 0.3), eyes=(0.34, 0.32, 0.42), neck=(-0.08, 0.12, 0.44), side=0.34)
