"""Draws clips of one moving thing, with the ground truth for each frame.

All frames show the same thing and background in the same light. A thing's shadow moves with it, even in mid-air, as in
the pictures on which the toybox's model was trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.toybox.motions.captioned import CAMERA_MOTIONS, MOTIONS
from shared.toybox.motions.flow import flow
from shared.toybox.motions.motion import PATH, Array, Motion
from shared.toybox.motions.placing import place
from shared.toybox.render import painted
from shared.toybox.splat import groups, instances, visible
from shared.toybox.surfaces import SPACING
from shared.toybox.world import BACKGROUNDS, Camera, Scene, sample_scene

_PLAIN = tuple(name for name in BACKGROUNDS if name.endswith("studio"))


@dataclass(frozen=True, eq=False)
class MovingScene:
    """The content of a clip.

    scene: the first frame
    path: [F, 6] with columns `motion.PATH`
    pan: [F], the shift of the background, which is 0 unless the camera moves
    """

    scene: Scene
    motion: Motion
    path: Array
    pan: Array

    def scenes(self) -> list[Scene]:
        """Returns the F frames as scenes for `render`."""
        ways = zip(self.path, self.pan, strict=True)
        return [replace(self.scene, cameras=(_camera(at),), pan=float(pan)) for at, pan in ways]


@dataclass(frozen=True, eq=False)
class Clip:
    """F frames of H×W pixels with their ground truth.

    frames: [F, H, W, 3] in [0, 1]
    mask: [F, H, W], the share of each pixel that the thing covers in the photo style
    path: float64 [F, 6] with columns `motion.PATH`
    flow: [F-1, H, W, 2], the `moved` field of `flow.Flow`
    flow_known: bool [F-1, H, W], the `known` field of `flow.Flow`
    """

    frames: Tensor
    mask: Tensor
    path: Array
    flow: Tensor
    flow_known: Tensor

    @property
    def levels(self) -> Tensor:
        """The frames as uint8 [F, H, W, 3]."""
        return (self.frames * 255).round().to(torch.uint8)


def _camera(at: Array) -> Camera:
    x, y, log_scale, azimuth, elevation, roll = map(float, at)
    return Camera((azimuth + 180) % 360 - 180, elevation, roll, x, y, float(np.exp(log_scale)))


def sample_moving(
    rng: np.random.Generator, motion: Motion | None = None, frames: int = 16, split: str = "train", **fixed: Any
) -> MovingScene:
    """Samples a random clip of a motion. If `motion` is None, chooses a random captioned motion.

    `split` and `fixed` are as in `world.sample_scene`, except that `camera`, `view` and `two` cannot be fixed. A clip
    shows a single thing, and the motion determines its camera. If the camera moves and the background is not fixed, a
    background is chosen that makes the movement visible.
    """
    if taken := {"camera", "view", "two"} & set(fixed):
        raise ValueError(f"cannot fix {', '.join(sorted(taken))}: a clip has one thing, and its motion sets the camera")
    if motion is None:
        motion = tuple(MOTIONS.values())[int(rng.integers(len(MOTIONS)))]
    offsets = motion.offsets(motion.draw(rng), frames)
    path = place(rng, offsets, motion.facing_deg)[0]
    if motion.name in CAMERA_MOTIONS and not fixed.get("background"):
        seen = [name for name in BACKGROUNDS if name not in _PLAIN]
        fixed["background"] = seen[int(rng.integers(len(seen)))]
    scene = sample_scene(rng, split, camera=_camera(path[0]), two=False, **fixed)
    return MovingScene(scene, motion, path, offsets[0, :, len(PATH)])


@torch.no_grad()
def draw_clip(moving: MovingScene, size: int = 64, device: str | torch.device = "cpu") -> Clip:
    """Draws the frames of a clip with their ground truth. On a CPU, the result is reproducible bit for bit."""
    where, scenes = torch.device(device), moving.scenes()
    things = instances(scenes, where)
    hits = visible(things, groups(things, SPACING * 64 / size, where), len(scenes), 2 * size)
    drawn = painted(scenes, things, hits, size)
    pan = torch.tensor(moving.pan, dtype=torch.float32, device=where)
    moved = flow(things, hits, pan, size)
    return Clip(drawn.pixels.permute(0, 2, 3, 1), drawn.mask[:, 0], moving.path, moved.moved, moved.known)
