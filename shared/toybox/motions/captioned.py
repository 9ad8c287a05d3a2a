"""Defines the motions that captions describe. The motion module is trained on clips of these motions."""

from __future__ import annotations

import numpy as np

from shared.config import unknown
from shared.toybox.motions.motion import Array, Motion, Parameters, hop

_EVEN = (0.85, 1.2)  # limits of the exponent applied to time, which makes a motion slow down or speed up a little


def _spin(t: Array, p: Parameters) -> dict[str, Array]:
    return {"azimuth_deg": p["way"] * p["sweep_deg"] * t}


def _slide_left(t: Array, p: Parameters) -> dict[str, Array]:
    return {"x": -p["reach"] * t ** p["pace"]}


def _slide_right(t: Array, p: Parameters) -> dict[str, Array]:
    return {"x": p["reach"] * t ** p["pace"]}


def _bounce(t: Array, p: Parameters) -> dict[str, Array]:
    return {"y": -p["reach"] * hop((p["count"] * t + p["phase"]) % 1)}


def _rise(t: Array, p: Parameters) -> dict[str, Array]:
    return {"y": -p["reach"] * t ** p["pace"]}


def _fall(t: Array, p: Parameters) -> dict[str, Array]:
    return {"y": p["reach"] * t ** p["pace"]}


def _wobble(t: Array, p: Parameters) -> dict[str, Array]:
    return {"roll_deg": p["tilt_deg"] * np.sin(2 * np.pi * (p["count"] * t + p["phase"]))}


def _approach(t: Array, p: Parameters) -> dict[str, Array]:
    return {"log_scale": p["growth"] * t ** p["pace"]}


def _recede(t: Array, p: Parameters) -> dict[str, Array]:
    return {"log_scale": -p["growth"] * t ** p["pace"]}


def _orbit(t: Array, p: Parameters) -> dict[str, Array]:
    # If the camera moves to its right, it sees more of the thing's left side, and the background shifts to the right.
    turned = p["way"] * p["sweep_deg"] * (t - 0.5)
    return {"azimuth_deg": turned, "pan": turned / 240}


MOTIONS: dict[str, Motion] = {
    motion.name: motion
    for motion in (
        Motion("spin", _spin, {"sweep_deg": (300, 420)}, ("way",)),
        Motion("slide left", _slide_left, {"reach": (0.34, 0.6), "pace": _EVEN}),
        Motion("slide right", _slide_right, {"reach": (0.34, 0.6), "pace": _EVEN}),
        Motion("bounce", _bounce, {"reach": (0.2, 0.38), "count": (1.3, 2.1), "phase": (0, 1)}),
        Motion("rise", _rise, {"reach": (0.32, 0.56), "pace": _EVEN}),
        Motion("fall", _fall, {"reach": (0.32, 0.56), "pace": (1.4, 2.0)}),
        Motion("wobble", _wobble, {"tilt_deg": (15, 25), "count": (1.2, 2.1), "phase": (0, 1)}),
        Motion("approach", _approach, {"growth": (0.6, 0.88), "pace": _EVEN}),
        Motion("recede", _recede, {"growth": (0.6, 0.88), "pace": _EVEN}),
        Motion("orbit", _orbit, {"sweep_deg": (80, 150)}, ("way",)),
    )
}
CAMERA_MOTIONS = frozenset({"orbit"})
"""The motions in which the camera moves. In all others, the background stands still."""


def captioned_motion(name: str) -> Motion:
    """Returns a captioned motion by name. Raises ValueError, listing the choices, if the name is unknown."""
    if name not in MOTIONS:
        raise ValueError(unknown(name, MOTIONS, "captioned motion"))
    return MOTIONS[name]
