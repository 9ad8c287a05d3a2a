"""In the complete task and training loop, every guidance method recovers the scene that a perfect teacher knows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pcs_3d.cameras import Cameras
from pcs_3d.distill.distill import Distill
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.guidance.oracle import OracleScores
from shared.train.training_run import TASKS, TrainingRun
from shared.trainable import TrainableGroup
from tests.three_d.distilling import finish, recipe, session
from tests.three_d.oracle_runs import reconstructed
from tests.three_d.picture_scenes import VIEWS, psnr, true_pictures, view_of

LONG = (
    "train.steps=150",
    "train.batch_size=4",
    "field.lr=0.1",
    "train.optimizers.main.schedule=cosine",
    "cameras.elevation_deg=[0, 0]",
)


def known(cameras: Cameras) -> Tensor:
    return true_pictures()[view_of(cameras)]


def oracle(**more) -> OracleScores:
    """Returns a teacher that is nearly certain of each view with the prompt, and less certain without it."""
    scene = {"prompt": (known, 0.05), "plain_prompt": (known, 0.05)}
    scene |= {told: (known, 0.7) for told in ("negative", "null", "away_near", "away_far")}
    return OracleScores(scene, **more)  # type: ignore[arg-type]


def fidelity(state: dict[str, Tensor]) -> float:
    return psnr(2 * state["field/raw"].sigmoid() - 1, true_pictures())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dreamfusion", ()),
        ("csd", ()),
        ("nfsd", ()),
        ("lucid_dreamer", ("guidance.times.high=0.98",)),
        ("sdi", ("guidance.normalize=sum",)),
        ("hifa", ("train.steps=300",)),
    ],
)
def test_each_guidance_method_recovers_the_scene(sd, tmp_path, name, settings):
    found = finish(session(sd, recipe(name, *LONG, *settings), tmp_path / "run", oracle()))
    assert fidelity(found) > 25


def test_a_field_of_latents_also_recovers_the_scene(sd, tmp_path):
    """SJC optimizes the teacher's latents directly, without an encoder. Here, the latents are pictures in [-1, 1]."""
    how = recipe("sjc", *LONG, "train.resolution=32")
    truth = true_pictures()
    means = lambda cameras: torch.cat([truth, truth[:, :1]], 1)[view_of(cameras)]  # noqa: E731 (four channels)
    found = finish(
        session(sd, how, tmp_path / "run", OracleScores({"prompt": (means, 0.05), "negative": (means, 0.7)}))
    )
    assert psnr(found["field/raw"][:, :3], truth) > 25


class Taught(Distill):
    """A task with a student that learns one picture per view."""

    def __init__(self, context, pictures: nn.Parameter) -> None:
        self.learned = pictures
        super().__init__(context, lambda *_: oracle(student=lambda cameras: pictures[view_of(cameras)]))

    def _check_groups(self) -> None:
        """Checks nothing, because the student is not part of the backbone here."""

    def groups(self):
        return {**self.field.groups(), "student": [TrainableGroup("student", [self.learned], 0.02)]}


def test_vsd_recovers_the_scene_with_a_student_trained_alongside_the_field(sd, tmp_path):
    pictures = nn.Parameter(torch.zeros(VIEWS, 3, 32, 32))
    how = recipe(
        "prolificdreamer",
        *LONG,
        "train.steps=300",
        "guidance.times.high=0.98",
    )
    tasks = {**TASKS, DistillTask: lambda context: Taught(context, pictures)}
    run = TrainingRun(sd, how, {}, tmp_path / "run", tmp_path / "cache", tensorboard=False, tasks=tasks)
    losses = [record.parts["student"] for _, record in run.steps()]
    assert fidelity(run.carried) > 25
    assert sum(losses[-50:]) < sum(losses[:50])
    assert psnr(pictures.detach(), true_pictures()) > 20, "the student has learned the current renders"


def test_a_3d_object_is_recovered_even_from_unseen_sides(sd, tmp_path):
    """The field, renderer and cameras are those of real runs. `bench_oracle.py` runs this for all guidance methods."""
    found = reconstructed(sd, "dreamfusion", tmp_path)
    assert found.iou > 0.9
    assert found.psnr > 25
