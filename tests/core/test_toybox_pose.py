"""Tests the pose estimator's targets, how its output is read, and the accuracy of its shipped weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.pretrain.evaluators.measure_pose import measure_pose
from shared.pretrain.evaluators.pose_task import pose_of, poses_of, soft_azimuths
from shared.pretrain.toybox import dataset
from shared.toybox.evaluators.pose import LINEAR, Poses, followed, path_of
from shared.toybox.motions.captioned import MOTIONS
from shared.toybox.motions.captioned_paths import STILL, nearest_captioned
from shared.toybox.motions.motion import PATH, still
from shared.toybox.motions.placing import sample_paths


def test_the_most_probable_sequence_of_azimuths_is_found():
    chances = np.random.default_rng(0).dirichlet(np.ones(6), 4)

    def score(way: tuple[int, ...]) -> float:
        seen = sum(np.log(chances[i, k] + 1e-9) for i, k in enumerate(way))
        turns = [abs((b - a + 3) % 6 - 3) * 60 for a, b in itertools.pairwise(way)]
        return seen - sum(0.5 * (turn / 30) ** 2 for turn in turns)

    best = max(itertools.product(range(6), repeat=4), key=score)
    assert followed(chances, step_deg=60).tolist() == list(best)


def test_encoded_azimuths_can_be_decoded():
    asked = torch.tensor([-180.0, -179.0, -7.0, 0.0, 33.3, 90.0, 171.0])
    poses = Poses(torch.zeros(7, 5), soft_azimuths(asked, 36))
    read = path_of(poses, follow=False)[:, PATH.index("azimuth_deg")]
    assert np.abs((read - asked.numpy() + 180) % 360 - 180).max() < 0.5


def test_a_turn_is_tracked_past_180_degrees_and_across_a_misread_frame():
    turn = torch.linspace(120, 480, 16)
    azimuths = soft_azimuths(turn, 36)
    azimuths[5] = 0.6 * soft_azimuths(turn[5:6] + 180, 36)[0] + 0.4 * azimuths[5]  # misread as the opposite side
    linear = torch.arange(80.0).view(16, 5)
    path = path_of(Poses(linear, azimuths))
    read = path[:, PATH.index("azimuth_deg")]
    assert np.abs((read - read[0]) - (turn.numpy() - 120)).max() < 1.0
    assert np.array_equal(path[:, [PATH.index(name) for name in LINEAR]], linear.numpy())


def test_poses_in_a_data_set_match_its_scenes(tmp_path: Path):
    (tmp_path / "recipe.json").write_text(json.dumps({"seed": 5}))
    poses = poses_of(tmp_path, 40)
    scenes = [dataset.scene_of(5, i)[0] for i in range(40)]
    for pose, scene in zip(poses, scenes, strict=True):
        if len(scene.things) == 2:
            assert np.isnan(pose).all()
        else:
            assert np.allclose(pose, pose_of(scene.cameras[0])) and np.exp(pose[2]) == pytest.approx(
                scene.cameras[0].scale
            )
    assert {len(s.things) for s in scenes} == {1, 2}


def test_captioned_motions_can_be_told_apart_by_their_true_paths():
    rng = np.random.default_rng(9)
    found = {name: [nearest_captioned(p) for p in sample_paths(rng, m, 40)] for name, m in MOTIONS.items()}
    right = {name: np.mean([answer == name for answer in answers]) for name, answers in found.items()}
    assert min(right.values()) >= 0.9 and np.mean(list(right.values())) >= 0.97, right
    assert nearest_captioned(still() + 3.0) == STILL


def test_the_shipped_estimator_reads_poses_and_motions_accurately():
    found = measure_pose(160, seed=3, clips=1)
    errors = found["errors"]
    assert max(errors["x"], errors["y"]) < 0.02 and errors["log_scale"] < 0.06 and errors["roll_deg"] < 3, errors
    assert errors["azimuth_deg"] < 8 and errors["elevation_deg"] < 5 and found["azimuth_near"] > 0.9, found
    assert found["captioned"] >= 0.8, found["confusions"]
