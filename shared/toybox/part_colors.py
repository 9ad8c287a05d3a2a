"""Defines the colours of a shape's parts. A part has one of the thing's own two colours or the colour of a detail."""

from __future__ import annotations

# Slots 0 and 1 have the thing's own two colours. The other slots are for small details. Except on faces, their colours
# are the same on all things of a class.
DETAILS: dict[str, tuple[float, float, float]] = {
    "main": (0.0, 0.0, 0.0),
    "second": (0.0, 0.0, 0.0),
    "dark": (0.06, 0.06, 0.08),
    "ivory": (0.97, 0.97, 0.94),
    "orange": (0.98, 0.52, 0.08),
    "glass": (0.42, 0.72, 0.88),
    "lamp": (1.0, 0.95, 0.62),
    "alarm": (0.85, 0.12, 0.1),
    "metal": (0.58, 0.6, 0.63),
    "tongue": (0.95, 0.48, 0.5),
    "cream": (0.96, 0.87, 0.7),
    "lime": (0.72, 0.9, 0.25),
    "wood": (0.48, 0.29, 0.14),
    "tire": (0.16, 0.16, 0.18),
    "gold": (1.0, 0.8, 0.12),
    "hat": (0.86, 0.08, 0.1),
    "band": (0.35, 0.02, 0.05),
    "rose": (1.0, 0.36, 0.66),
    "lens": (0.5, 0.1, 0.3),
    "skin": (0.0, 0.0, 0.0),
    "iris": (0.0, 0.0, 0.0),
    "brow": (0.0, 0.0, 0.0),
    "lips": (0.0, 0.0, 0.0),
    "rainbow0": (0.9, 0.1, 0.12),
    "rainbow1": (1.0, 0.58, 0.05),
    "rainbow2": (1.0, 0.9, 0.12),
    "rainbow3": (0.1, 0.66, 0.25),
    "rainbow4": (0.12, 0.4, 0.9),
    "rainbow5": (0.55, 0.18, 0.7),
}
SLOTS = {name: index for index, name in enumerate(DETAILS)}
