"""Builds the animals and the robot. Each class of thing has a function that returns a list of (slot, surface) pairs and
the anchors to which accessories are fitted.

x points forward, y left and z up, in arbitrary units. `shapes.py` scales every class to a bounding sphere of radius 1.
`h` is the spacing of the surface points.
"""

from __future__ import annotations

from shared.toybox.parts import Anchors, Parts, both
from shared.toybox.primitives import ball, box, curve, lathe, tube


def duck(h: float) -> tuple[Parts, Anchors]:
    """Builds a toy duck with an orange beak. Its wings and tail have the second colour."""
    parts: Parts = [
        ("main", ball(0.78, 0.58, 0.5, h)),
        ("main", ball(0.26, 0.24, 0.36, h).move(0.42, 0, 0.42)),
        ("main", ball(0.38, 0.36, 0.37, h).move(0.5, 0, 0.82)),
        ("second", tube([(-0.5, 0, 0.1), (-0.8, 0, 0.26), (-1.0, 0, 0.55)], [0.3, 0.24, 0.06], h)),
        ("orange", ball(0.24, 0.2, 0.07, h).move(0.95, 0, 0.74)),
        ("orange", ball(0.17, 0.16, 0.05, h).move(0.9, 0, 0.67)),
    ]
    parts += both(("second", ball(0.46, 0.12, 0.28, h).turn("y", 18).turn("z", 8).move(-0.1, 0.57, 0.1)))
    parts += both(("second", ball(0.2, 0.09, 0.12, h).turn("y", 30).move(-0.5, 0.6, 0.24)))
    parts += both(("ivory", ball(0.09, 0.06, 0.1, h).move(0.72, 0.24, 0.94)))
    parts += both(("dark", ball(0.065, 0.06, 0.075, h).move(0.76, 0.255, 0.94)))
    return parts, Anchors(top=(0.5, 1.15, 0.33), eyes=(0.84, 0.92, 0.36), neck=(0.46, 0.5, 0.32), side=0.37)


def dog(h: float) -> tuple[Parts, Anchors]:
    """Builds a standing dog with a dark nose and hanging ears. Its ears, tail and paws have the second colour."""
    parts: Parts = [
        ("main", ball(0.72, 0.34, 0.34, h).move(-0.12, 0, 0)),
        ("main", tube([(0.35, 0, 0.08), (0.6, 0, 0.5)], [0.28, 0.24], h)),
        ("main", ball(0.36, 0.33, 0.33, h).move(0.68, 0, 0.66)),
        ("main", ball(0.28, 0.19, 0.17, h).move(0.98, 0, 0.55)),
        ("dark", ball(0.1, 0.12, 0.09, h).move(1.22, 0, 0.62)),
        ("second", tube([(-0.75, 0, 0.15), (-0.98, 0, 0.35), (-1.02, 0, 0.68)], [0.12, 0.12, 0.07], h)),
        ("tongue", ball(0.1, 0.09, 0.04, h).turn("y", 30).move(1.12, 0, 0.4)),
    ]
    for x in (0.34, -0.6):
        parts += both(("main", tube([(x, 0.2, -0.1), (x, 0.21, -0.62)], [0.17, 0.13], h)))
        parts += both(("second", ball(0.2, 0.15, 0.12, h).move(x + 0.05, 0.21, -0.66)))
    parts += both(("second", ball(0.17, 0.1, 0.34, h).turn("x", 14).move(0.56, 0.36, 0.58)))
    parts += both(("ivory", ball(0.06, 0.09, 0.1, h).move(0.97, 0.14, 0.77)))
    parts += both(("dark", ball(0.05, 0.06, 0.07, h).move(1.01, 0.14, 0.77)))
    return parts, Anchors(top=(0.64, 0.95, 0.3), eyes=(1.03, 0.77, 0.36), neck=(0.46, 0.28, 0.33), side=0.34)


def cat(h: float) -> tuple[Parts, Anchors]:
    """Builds a sitting cat with pointed ears and a tail that rises beside its body. The tail, inner ears, muzzle, chest
    and paws have the second colour."""
    ear = [(0.0, -0.12), (0.19, 0.0), (0.12, 0.2), (0.0, 0.42)]
    parts: Parts = [
        ("main", lathe(curve([(0, -0.8), (0.42, -0.76), (0.52, -0.5), (0.42, 0), (0.26, 0.3), (0, 0.4)]), h)),
        ("main", ball(0.34, 0.43, 0.35, h).move(0.16, 0, 0.5)),
        ("second", ball(0.16, 0.24, 0.36, h).move(0.36, 0, -0.18)),
        ("second", ball(0.14, 0.19, 0.11, h).move(0.44, 0, 0.4)),
        ("tongue", ball(0.05, 0.06, 0.045, h).move(0.57, 0, 0.46)),
        (
            "second",
            tube(
                [(-0.35, 0, -0.66), (-0.8, 0.2, -0.66), (-0.9, 0.5, -0.3), (-0.7, 0.62, 0.1), (-0.75, 0.6, 0.45)],
                [0.13, 0.13, 0.13, 0.12, 0.08],
                h,
            ),
        ),
    ]
    parts += both(("main", lathe(ear, h).turn("x", -16).move(0.12, 0.27, 0.78)))
    parts += both(("second", ball(0.05, 0.09, 0.16, h).turn("x", -16).move(0.25, 0.27, 0.86)))
    parts += both(("main", tube([(0.3, 0.18, -0.1), (0.42, 0.18, -0.66)], 0.12, h)))
    parts += both(("second", ball(0.2, 0.14, 0.11, h).move(0.5, 0.19, -0.7)))
    parts += both(("main", ball(0.34, 0.18, 0.26, h).move(0.02, 0.42, -0.56)))
    parts += both(("lime", ball(0.06, 0.11, 0.1, h).move(0.43, 0.18, 0.6)))
    parts += both(("dark", ball(0.06, 0.04, 0.085, h).move(0.465, 0.175, 0.6)))
    return parts, Anchors(top=(0.14, 0.86, 0.3), eyes=(0.5, 0.6, 0.42), neck=(0.1, 0.2, 0.35), side=0.43)


def bear(h: float) -> tuple[Parts, Anchors]:
    """Builds a sitting teddy bear with round ears and outstretched limbs. Its shirt has the second colour."""
    parts: Parts = [
        ("second", ball(0.42, 0.48, 0.5, h).move(0, 0, -0.22)),
        ("main", ball(0.4, 0.47, 0.4, h).move(0.04, 0, 0.5)),
        ("cream", ball(0.2, 0.21, 0.16, h).move(0.38, 0, 0.4)),
        ("dark", ball(0.08, 0.1, 0.07, h).move(0.56, 0, 0.47)),
        ("main", ball(0.46, 0.5, 0.24, h).move(0, 0, -0.62)),
        ("main", ball(0.12, 0.12, 0.12, h).move(-0.5, 0, -0.6)),
    ]
    parts += both(("main", ball(0.1, 0.19, 0.19, h).move(0.0, 0.39, 0.83)))
    parts += both(("cream", ball(0.05, 0.11, 0.11, h).move(0.08, 0.39, 0.83)))
    parts += both(("second", tube([(0.02, 0.36, 0.02), (0.12, 0.58, -0.08)], [0.19, 0.19], h)))
    parts += both(("main", tube([(0.1, 0.54, -0.06), (0.3, 0.72, -0.2)], [0.16, 0.15], h)))
    parts += both(("main", tube([(0.15, 0.32, -0.66), (0.62, 0.48, -0.68)], [0.22, 0.19], h)))
    parts += both(("cream", ball(0.06, 0.14, 0.14, h).turn("z", 18).move(0.79, 0.53, -0.68)))
    parts += both(("dark", ball(0.05, 0.065, 0.075, h).move(0.4, 0.17, 0.6)))
    return parts, Anchors(top=(0.0, 0.86, 0.36), eyes=(0.46, 0.6, 0.42), neck=(0.02, 0.16, 0.4), side=0.47)


def robot(h: float) -> tuple[Parts, Anchors]:
    """Builds a box robot with a lit panel on its chest and two tanks on its back. Its arms, legs and ears have the
    second colour."""
    parts: Parts = [
        ("main", box(0.3, 0.4, 0.42, h, 0.05).move(0, 0, -0.02)),
        ("main", box(0.27, 0.3, 0.25, h, 0.05).move(0, 0, 0.74)),
        ("metal", box(0.12, 0.12, 0.1, h).move(0, 0, 0.45)),
        ("metal", tube([(0, 0, 0.95), (0, 0, 1.14)], 0.035, h)),
        ("orange", ball(0.09, 0.09, 0.09, h).move(0, 0, 1.2)),
        ("dark", box(0.04, 0.27, 0.2, h).move(0.29, 0, 0.04)),
        ("lamp", box(0.04, 0.2, 0.05, h).move(0.305, 0, 0.12)),
        ("glass", box(0.04, 0.08, 0.05, h).move(0.305, 0.1, -0.06)),
        ("alarm", box(0.04, 0.06, 0.05, h).move(0.305, -0.11, -0.06)),
        ("dark", box(0.04, 0.2, 0.04, h).move(0.25, 0, 0.58)),
    ]
    parts += both(("ivory", ball(0.07, 0.1, 0.1, h).move(0.26, 0.13, 0.8)))
    parts += both(("dark", ball(0.05, 0.05, 0.05, h).move(0.31, 0.13, 0.8)))
    parts += both(("second", ball(0.16, 0.13, 0.16, h).move(0, 0.48, 0.26)))
    parts += both(("second", tube([(0, 0.52, 0.26), (0.02, 0.58, -0.05), (0.14, 0.58, -0.34)], 0.11, h)))
    parts += both(("second", ball(0.14, 0.13, 0.14, h).move(0.18, 0.58, -0.38)))
    parts += both(("second", box(0.15, 0.14, 0.26, h, 0.03).move(0, 0.2, -0.64)))
    parts += both(("second", box(0.25, 0.17, 0.1, h, 0.04).move(0.08, 0.2, -0.92)))
    parts += both(("metal", tube([(-0.36, 0.16, 0.24), (-0.36, 0.16, -0.24)], 0.12, h)))
    parts += both(("second", ball(0.09, 0.06, 0.1, h).move(0, 0.32, 0.76)))
    return parts, Anchors(top=(0, 0.98, 0.34), eyes=(0.34, 0.8, 0.34), neck=(0, 0.44, 0.3), side=0.33)
