"""Defines motions for personalization, in two splits. No caption describes them, and no training clip shows them.

Each motion has a fixed rhythm and direction. Only its size varies a little from clip to clip.
"""

from __future__ import annotations

import numpy as np

from shared.config import unknown
from shared.toybox.motions.motion import Array, Motion, Parameters, hop, ramp

SPLITS = ("development", "reporting")


def _zigzag(t: Array, p: Parameters) -> dict[str, Array]:
    return {"x": p["wide"] * t, "y": p["high"] * np.abs((2 * t + 0.5) % 1 * 2 - 1)}


def _figure_of_eight(t: Array, p: Parameters) -> dict[str, Array]:
    return {"x": p["wide"] / 2 * np.sin(2 * np.pi * t), "y": p["high"] / 2 * np.sin(4 * np.pi * t)}


def _pendulum(t: Array, p: Parameters) -> dict[str, Array]:
    # The thing hangs from a point above the picture and turns with its string.
    swing = np.radians(p["swing_deg"]) * np.cos(3 * np.pi * t)
    return {"x": p["string"] * np.sin(swing), "y": p["string"] * np.cos(swing), "roll_deg": -np.degrees(swing)}


def _spiral(t: Array, p: Parameters) -> dict[str, Array]:
    angle = 2 * np.pi * 1.6 * t
    return {"x": p["radius"] * t * np.sin(angle), "y": -p["radius"] * t * np.cos(angle)}


def _hop_and_turn(t: Array, p: Parameters) -> dict[str, Array]:
    # The thing hops twice. Each time, it makes half a turn in the air and then rests.
    jumps = [np.clip((t - start) / 0.36, 0, 1) for start in (0.04, 0.54)]
    turned = 180 * (jumps[0] + jumps[1])
    return {"y": -p["high"] * (hop(jumps[0]) + hop(jumps[1])), "azimuth_deg": turned}


def _stop_and_go(t: Array, p: Parameters) -> dict[str, Array]:
    return {"x": p["wide"] / 2 * (ramp(t, 0.14, 0.3) + ramp(t, 0.7, 0.86))}


def _staircase(t: Array, p: Parameters) -> dict[str, Array]:
    across, up = (np.clip(4 * t - a, 0, 1) + np.clip(4 * t - b, 0, 1) for a, b in ((0, 2), (1, 3)))
    return {"x": p["wide"] / 2 * across, "y": -p["high"] / 2 * up}


def _loop(t: Array, p: Parameters) -> dict[str, Array]:
    # The thing moves along a line, once around a circle above the line, then along the line again.
    angle = 2 * np.pi * np.clip((t - 0.2) / 0.6, 0, 1)
    along = np.clip(t / 0.25, 0, 1) + np.clip((t - 0.75) / 0.25, 0, 1)
    return {
        "x": p["wide"] / 2 * along + p["radius"] * np.sin(angle),
        "y": -p["radius"] * (1 - np.cos(angle)),
    }


def _falling_leaf(t: Array, p: Parameters) -> dict[str, Array]:
    swing = np.sin(3 * np.pi * t)
    return {
        "x": p["wide"] / 2 * swing,
        "y": p["deep"] * t - 0.05 * (1 - swing**2),
        "roll_deg": -p["tilt_deg"] * swing,
    }


def _lap(t: Array, p: Parameters) -> dict[str, Array]:
    # The thing runs around a circle on the ground, facing forward. It moves to the right when it is near the camera,
    # and to the left when it is far away.
    angle = 2 * np.pi * t
    near = np.cos(angle)
    return {
        "x": p["wide"] / 2 * np.sin(angle),
        "y": p["deep"] / 2 * near,
        "log_scale": p["growth"] / 2 * near,
        "azimuth_deg": -360 * t,
    }


def _look_around(t: Array, p: Parameters) -> dict[str, Array]:
    turned = ramp(t, 0.0, 0.25) - 2 * ramp(t, 0.35, 0.75) + ramp(t, 0.8, 1.0)
    return {"azimuth_deg": p["turn_deg"] * turned}


def _lunge(t: Array, p: Parameters) -> dict[str, Array]:
    # The thing moves quickly forward, then slowly back, twice.
    u = np.clip(2 * t, 0, 2 - 1e-9) % 1
    near = ramp(u, 0.0, 0.28) * (1 - ramp(u, 0.4, 1.0))
    return {"log_scale": p["growth"] * near, "y": 0.08 * near}


HELD_OUT: dict[str, tuple[Motion, ...]] = {
    "development": (
        Motion("zigzag", _zigzag, {"wide": (0.48, 0.58), "high": (0.34, 0.42)}),
        Motion("figure-of-eight", _figure_of_eight, {"wide": (0.44, 0.54), "high": (0.3, 0.38)}),
        Motion("pendulum", _pendulum, {"swing_deg": (26, 31), "string": (0.5, 0.6)}),
        Motion("spiral", _spiral, {"radius": (0.26, 0.32)}),
        Motion("hop-and-turn", _hop_and_turn, {"high": (0.24, 0.32)}),
        Motion("stop-and-go", _stop_and_go, {"wide": (0.56, 0.64)}),
    ),
    "reporting": (
        Motion("staircase", _staircase, {"wide": (0.44, 0.54), "high": (0.4, 0.5)}),
        Motion("loop", _loop, {"wide": (0.36, 0.44), "radius": (0.15, 0.19)}),
        Motion("falling-leaf", _falling_leaf, {"wide": (0.36, 0.46), "deep": (0.44, 0.52), "tilt_deg": (20, 26)}),
        Motion("lap", _lap, {"wide": (0.48, 0.58), "deep": (0.16, 0.22), "growth": (0.5, 0.65)}, facing_deg=-90.0),
        Motion("look-around", _look_around, {"turn_deg": (62, 74)}),
        Motion("lunge", _lunge, {"growth": (0.7, 0.86)}),
    ),
}


def motion_names() -> dict[str, Motion]:
    """Returns the held-out motions, keyed by full name, for example "development-zigzag"."""
    return {f"{split}-{motion.name}": motion for split in SPLITS for motion in HELD_OUT[split]}


def held_out_motions(split: str) -> tuple[Motion, ...]:
    """Returns the motions of a split. Raises ValueError, listing the choices, if the split is unknown."""
    if split not in HELD_OUT:
        raise ValueError(unknown(split, HELD_OUT, "held-out split"))
    return HELD_OUT[split]


def held_out_motion(name: str) -> Motion:
    """Returns a held-out motion by its full name. Raises ValueError, listing the choices, if the name is unknown."""
    motions = motion_names()
    if name not in motions:
        raise ValueError(unknown(name, motions, "toybox motion"))
    return motions[name]
