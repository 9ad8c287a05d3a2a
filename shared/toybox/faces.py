"""Builds faces. A face is a head with shoulders, whose geometry and colours are determined by an identity vector.

A face is a set of ellipsoids. The identity determines how they are moved and stretched, so the same points on unit
spheres can be reused for every face. The z-buffer hides points that end up inside another ellipsoid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from shared.toybox.part_colors import SLOTS
from shared.toybox.parts import Anchors
from shared.toybox.primitives import ball

# Each part's name, its colour slot, and the radius that determines how densely the part is sampled.
_PARTS = (
    ("head", "skin", 0.5),
    ("neck", "skin", 0.26),
    ("torso", "second", 0.56),
    ("ear_l", "skin", 0.14),
    ("ear_r", "skin", 0.14),
    ("nose", "skin", 0.15),
    ("white_l", "ivory", 0.13),
    ("white_r", "ivory", 0.13),
    ("iris_l", "iris", 0.08),
    ("iris_r", "iris", 0.08),
    ("pupil_l", "dark", 0.05),
    ("pupil_r", "dark", 0.05),
    ("brow_l", "brow", 0.12),
    ("brow_r", "brow", 0.12),
    ("mouth", "lips", 0.15),
    ("hair", "main", 0.56),
    ("back_hair", "main", 0.5),
    ("lock_l", "main", 0.3),
    ("lock_r", "main", 0.3),
    ("beard", "brow", 0.48),
    ("collar", "ivory", 0.2),
)
_INDEX = {name: index for index, (name, _, _) in enumerate(_PARTS)}
ANCHORS = Anchors(top=(-0.02, 0.5, 0.42), eyes=(0.45, 0.26, 0.36), neck=(-0.02, -0.3, 0.3), side=0.38)
BOTTOM, FOOT = -0.98, (0.3, 0.6)


@dataclass(frozen=True)
class Faces:
    """The point clouds of K faces.

    points, normals: [K, N, 3]
    slots: [N]
    colors: the colours that depend on the identity, [K, 3] by slot name
    """

    points: Tensor
    normals: Tensor
    slots: Tensor
    colors: dict[str, Tensor]


@lru_cache(maxsize=8)
def _unit(spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns points on unit spheres, [N, 3], and the index of the part to which each point belongs, [N]."""
    points, owners = [], []
    for index, (_, _, radius) in enumerate(_PARTS):
        sphere = ball(1, 1, 1, spacing / radius)
        points.append(sphere.points)
        owners.append(np.full(len(sphere.points), index))
    return np.concatenate(points).astype(np.float32), np.concatenate(owners)


def _mix(a: tuple[float, ...], b: tuple[float, ...], t: np.ndarray) -> np.ndarray:
    return np.asarray(a) + (np.asarray(b) - np.asarray(a)) * t[:, None]


def _layout(v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the parts' centres and radii [K, P, 3] and tilts [K, P] for identities [K, D]. A tilt is the rise in z
    per unit of y."""
    shape = (len(v), len(_PARTS))
    centre, radius, tilt = np.zeros((*shape, 3)), np.zeros((*shape, 3)), np.zeros(shape)
    rx, ry, rz, cz = 0.42 + 0 * v[:, 0], 0.37 + 0.06 * v[:, 0], 0.46 + 0.06 * v[:, 1], 0.18

    def put(name: str, x, y, z, a, b, c) -> None:
        centre[:, _INDEX[name]] = np.stack(np.broadcast_arrays(x, y, z, v[:, 0])[:3], 1)
        radius[:, _INDEX[name]] = np.stack(np.broadcast_arrays(a, b, c, v[:, 0])[:3], 1)

    def skin(y, z) -> np.ndarray:
        """Returns the x coordinate of the head's surface at (y, z)."""
        return rx * np.sqrt(np.clip(1 - (y / ry) ** 2 - ((z - cz) / rz) ** 2, 0.05, 1))

    put("head", 0, 0, cz, rx, ry, rz)
    put("neck", -0.04, 0, -0.36, 0.16, 0.16, 0.34)
    put("torso", -0.06, 0, -0.86, 0.33, 0.66 + 0.08 * v[:, 0], 0.38)
    put("collar", 0.02, 0, -0.56, 0.2, 0.23, 0.09)
    eye_y, eye_z, eye = 0.15 + 0.035 * v[:, 4], cz + 0.07, 0.088 + 0.026 * v[:, 5]
    nose_z = cz - 0.08 - 0.03 * v[:, 7]
    mouth_z = cz - 0.25
    put("nose", skin(0, nose_z) + 0.02, 0, nose_z, 0.1 + 0.04 * v[:, 7], 0.07 + 0.03 * v[:, 8], 0.1 + 0.04 * v[:, 7])
    beard = v[:, 15] > 0.2
    put("mouth", skin(0, mouth_z) + 0.02 * beard, 0, mouth_z, 0.06, 0.13 + 0.05 * v[:, 9], 0.04 + 0.018 * v[:, 10])
    for side, sign in (("l", 1), ("r", -1)):
        y = sign * eye_y
        front = skin(y, eye_z)
        put(f"white_{side}", front - 0.01, y, eye_z, 0.05, eye * 1.15, eye * 0.9)
        put(f"iris_{side}", front + 0.025, y * 0.99, eye_z, 0.03, eye * 0.62, eye * 0.66)
        put(f"pupil_{side}", front + 0.045, y * 0.985, eye_z, 0.02, eye * 0.32, eye * 0.34)
        brow_z = cz + 0.2 + 0.2 * (eye - 0.09)
        put(f"brow_{side}", skin(y, cz + 0.2) + 0.01, y, brow_z, 0.04, 0.11, 0.03 + 0.014 * v[:, 11])
        tilt[:, _INDEX[f"brow_{side}"]] = -sign * 0.35 * v[:, 10]
        put(f"ear_{side}", -0.02, sign * ry, cz + 0.02, 0.09, 0.06, 0.12 + 0.02 * v[:, 8])
        long = np.clip(v[:, 13] + 0.3, 0, 1.3)
        lock = 0.02 + 0.1 * (long > 0)
        put(f"lock_{side}", -0.08, sign * (ry + 0.03), cz - 0.28 * long, 0.2 * (lock > 0.05), lock, 0.2 + 0.3 * long)
    puff = 0.06 + 0.05 * v[:, 12]
    put("hair", -0.03, 0, cz + 0.04 + 0.5 * puff, rx + puff, ry + puff, rz + puff)
    long = np.clip(v[:, 13], -0.4, 1)
    put("back_hair", -0.2, 0, cz - 0.12 - 0.2 * long, 0.28, ry * 0.86 + puff, 0.38 + 0.2 * long)
    put("beard", 0.02, 0, cz - 0.02, (rx + 0.02) * beard, (ry + 0.015) * beard, (rz + 0.05) * beard)
    return centre, np.maximum(radius, 1e-3), tilt


def faces(identities: np.ndarray, spacing: float, device: torch.device) -> Faces:
    """Builds faces from identities [K, IDENTITY_SIZE] in [-1, 1]."""
    v = np.asarray(identities, float)
    centre, radius, tilt = (torch.tensor(a, dtype=torch.float32, device=device) for a in _layout(v))
    unit, owner = (torch.from_numpy(a).to(device) for a in _unit(spacing))
    points = unit * radius[:, owner] + centre[:, owner]
    points[..., 2] += tilt[:, owner] * (points[..., 1] - centre[:, owner, 1])
    points[..., 2] = points[..., 2].clamp_min(BOTTOM)  # the bust stands on a flat base
    # Hair is a shell from which the face is cut out. A beard is a shell from which the upper part and the back are cut
    # out. Points that are cut out are moved inside the head.
    line = torch.tensor(0.3 + 0.22 * v[:, 14], dtype=torch.float32, device=device)[:, None]
    x, z = unit[:, 0], unit[:, 2]
    bald = (owner == _INDEX["hair"]) & (z < line + (0.9 * x - 0.2).clamp(-1.1, 0.35) * 1.1 - 0.1)
    shaved = (owner == _INDEX["beard"]) & ((z > -0.32 - 0.25 * (0.5 - x).clamp(0, 1)) | (x < -0.1))
    gone = bald | shaved
    points = torch.where(gone[..., None], torch.zeros(3, device=device), points)
    normals = torch.nn.functional.normalize(unit / radius[:, owner], dim=-1)
    slots = torch.tensor([SLOTS[slot] for _, slot, _ in _PARTS], device=device)[owner]
    return Faces(points, normals, slots, _colors(v, device))


def _colors(v: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    tone, warm, eye = (v[:, 2] + 1) / 2, (v[:, 3] + 1) / 2, (v[:, 6] + 1) / 2
    skin = np.where(
        (tone < 0.5)[:, None],
        _mix((0.36, 0.21, 0.13), (0.74, 0.5, 0.34), tone * 2),
        _mix((0.74, 0.5, 0.34), (1.0, 0.84, 0.73), tone * 2 - 1),
    )
    skin = skin * _mix((1.0, 1.0, 0.92), (1.04, 0.95, 0.96), warm)
    iris = np.where(
        (eye < 0.5)[:, None],
        _mix((0.3, 0.16, 0.06), (0.15, 0.5, 0.25), eye * 2),
        _mix((0.15, 0.5, 0.25), (0.2, 0.5, 0.95), eye * 2 - 1),
    )
    lips = skin * 0.45 + np.array([0.75, 0.12, 0.16]) * 0.55
    colors = {"skin": skin, "iris": iris, "lips": lips}
    return {name: torch.tensor(c, dtype=torch.float32, device=device).clamp(0, 1) for name, c in colors.items()}
