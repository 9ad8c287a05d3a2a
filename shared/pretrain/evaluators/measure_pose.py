"""Measures the pose estimator's errors on new renders, and how often it recognizes the motion of new clips."""

from __future__ import annotations

from typing import Any

import numpy as np

from shared.pretrain.evaluators.measure import Degrade, confusions, render_all
from shared.pretrain.evaluators.pose_task import pose_of
from shared.toybox import world
from shared.toybox.evaluators.pose import load_pose, path_of
from shared.toybox.motions.captioned import MOTIONS
from shared.toybox.motions.captioned_paths import nearest_captioned
from shared.toybox.motions.clips import draw_clip, sample_moving
from shared.toybox.motions.held_out import held_out_motions
from shared.toybox.motions.look_alikes import candidates
from shared.toybox.motions.motion import PATH, Array, Motion
from shared.toybox.motions.path_distance import ranked

_LEVEL_DEG = 50.0  # above this elevation, azimuths are hard to recognize
_NEAR_DEG = 30.0
_FRAMES = 16
_SEED = 83


def measure_pose(n: int = 600, seed: int = 0, degrade: Degrade | None = None, clips: int = 4) -> dict[str, Any]:
    """Measures the median absolute pose errors on `n` new renders in all styles, and how often motions are recognized
    in `clips` new clips of each motion.

    Azimuths are judged only on renders from an elevation below 50 degrees. `azimuth_near` is the share of these renders
    whose azimuth error is below 30 degrees. Among clips of captioned motions, `captioned` is the share whose path is
    nearest to a path of the right motion. Among clips of held-out motions, `held_out_<split>` is the share that are
    recognized. The alternatives are the motion's look-alikes, the other motions of the split, and standing still.

    degrade: a function applied first to the pictures `[n, 3, 64, 64]`, for example the VAE's round trip
    """
    rng = np.random.default_rng([seed, _SEED])
    scenes = [world.sample_scene(rng, "reporting", two=False) for _ in range(n)]
    pictures = render_all(scenes)
    poses = load_pose().read(degrade(pictures) if degrade else pictures)
    read, truth = path_of(poses, follow=False), np.stack([pose_of(scene.cameras[0]) for scene in scenes])
    apart = np.abs(read - truth)
    turn = PATH.index("azimuth_deg")
    apart[:, turn] = np.minimum(apart[:, turn] % 360, 360 - apart[:, turn] % 360)
    level = truth[:, PATH.index("elevation_deg")] < _LEVEL_DEG
    errors = {
        name: round(float(np.median(apart[level if i == turn else slice(None), i])), 4) for i, name in enumerate(PATH)
    }
    found: dict[str, Any] = {"errors": errors}
    found["azimuth_near"] = round(float((apart[level, turn] < _NEAR_DEG).mean()), 4)
    names, answers = _captioned(rng, clips, degrade)
    found["captioned"] = round(float(np.mean([a == b for a, b in zip(names, answers, strict=True)])), 4)
    found["confusions"] = confusions(answers, names)
    for split in ("development", "reporting"):
        found[f"held_out_{split}"] = round(float(np.mean(_held_out(split, rng, clips, degrade))), 4)
    return found


def path_read(rng: np.random.Generator, motion: Motion, degrade: Degrade | None = None) -> Array:
    """Renders a new clip of a motion and returns the path read from it, `[16, 6]`."""
    clip = draw_clip(sample_moving(rng, motion, _FRAMES, "reporting"))
    frames = clip.frames.permute(0, 3, 1, 2)
    return path_of(load_pose().read(degrade(frames) if degrade else frames))


def _captioned(rng: np.random.Generator, clips: int, degrade: Degrade | None) -> tuple[list[str], list[str]]:
    names = [name for name in MOTIONS for _ in range(clips)]
    return names, [nearest_captioned(path_read(rng, MOTIONS[name], degrade)) for name in names]


def _held_out(split: str, rng: np.random.Generator, clips: int, degrade: Degrade | None) -> list[bool]:
    hits = []
    for motion in held_out_motions(split):
        among = candidates(motion, split, _FRAMES)
        hits += [ranked(path_read(rng, motion, degrade), among)[0][0] == motion.name for _ in range(clips)]
    return hits
