"""Tests the weights and random anchors of MotionDirector's appearance-debiased loss, and the complete objective."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_video.backbones.animatediff import AnimateDiffBackbone
from pcs_video.motion.appearance_debias import AppearanceDebias, debiased_error
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.io.clips.write_clip import write_clip
from shared.objective import Denoising
from shared.recipe.resolve import load
from shared.runner.plan import plan
from shared.train.training_run import TrainingRun
from shared.train.tune import Tune
from shared.types import Batch, Step
from tests.conftest import build_sd_v
from tests.core.runs import tuning
from tests.video.clip_models import build_animatediff
from tests.video.conftest import FAST, moving_square
from tests.video.transformer_runs import FAMILIES

ROOT = 2**0.5  # sqrt(beta^2 + 1) at beta = 1


def test_an_error_shared_by_all_frames_weighs_less_than_independent_errors() -> None:
    """With 16 frames and beta = 1, a shared error has weight 0.17, and independent errors have weight 2.82.

    Random errors are weighted as the closed form predicts.
    """
    draw = torch.Generator().manual_seed(0)
    anchors = torch.randint(16, (4096,), generator=draw)
    shared = torch.randn(4096, 2, 1, 2, 2, generator=draw).expand(-1, -1, 16, -1, -1)
    own = torch.randn(4096, 2, 16, 2, 2, generator=draw)
    assert debiased_error(shared, anchors, 1.0).mean() / shared.square().mean() == pytest.approx((ROOT - 1) ** 2)
    # the anchor contributes (sqrt(2) - 1)^2; every other frame contributes 2 for its error and 1 for the anchor's
    expected = (15 * (2 + 1) + (ROOT - 1) ** 2) / 16
    assert expected == pytest.approx(2.82, abs=0.005)
    assert debiased_error(own, anchors, 1.0).mean() / own.square().mean() == pytest.approx(expected, rel=0.01)
    assert torch.equal(debiased_error(own, anchors, 0.0), own.square())  # with beta = 0, this is the plain loss


def test_the_debiased_loss_uses_the_same_weights_as_the_plain_loss() -> None:
    """With inside=0 and outside=1, both losses ignore errors inside the subject's mask in each frame."""
    objective, part = Denoising(inside=0, outside=1), AppearanceDebias(beta=1.0)
    draw = torch.Generator().manual_seed(0)
    target, error = torch.randn(2, 4, 6, 8, 8, generator=draw), torch.randn(2, 4, 6, 8, 8, generator=draw)
    mask = torch.zeros(2, 1, 6, 8, 8)
    for frame in range(6):
        mask[:, :, frame, :, frame : frame + 2] = 1  # the subject moves
    weight = objective.weight(mask, None)
    assert weight is not None and torch.equal(weight, 1 - mask)
    batch = Batch(("a", "a"), (("m",), ("m",)), ("instance", "instance"), target)

    def losses(prediction: Tensor) -> tuple[Tensor, Tensor]:
        step: Any = SimpleNamespace(
            prediction=prediction,
            target=target,
            batch=batch,
            draw=torch.Generator().manual_seed(3),
            need=lambda name: weight,
        )
        return objective.example_losses(prediction, target, weight).mean(), part(step)

    assert losses(target + error) == losses(target + error + 9 * mask) != losses(target + 2 * error)
    weight = None
    anchors = torch.randint(6, (2,), generator=torch.Generator().manual_seed(3))
    assert losses(target + error)[1] == pytest.approx(float(debiased_error(error, anchors, 1.0).mean()))


# --- in a run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def longer_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer")
    for i in range(2):
        write_clip(folder / f"{i}", moving_square(i, frames=9, side=40), 8)
    return folder


def debiased(backbone: Any, folder: Path, tmp_path: Path, length: int, *settings: str) -> Tune:
    """Returns a `Tune` task with the penalty, before its first step."""
    asked = [f"subject.clips={folder}", f"output={tmp_path / 'm.concept'}", *FAST, "trainable.temporal.rank=2"]
    asked += [f"sources.clips.window.length={length}", "regularize.debias.kind=appearance_debias", *settings]
    planned = plan(load("animatediff_motion_lora", asked, "video", VideoRecipe))
    run = TrainingRun(
        backbone, planned.recipe, planned.subjects, planned.workdir, tmp_path / "cache", tensorboard=False,
        tasks=VideoRunner.tasks,
    )  # fmt: skip
    run.class_pictures = lambda prompts, seeds, **how: torch.zeros(len(seeds), 3, length, 32, 32)
    return tuning(run)


def of_each_anchor(error: Tensor) -> list[float]:
    """Returns the penalty with each frame in turn as the anchor, in float64. `error` has shape `[C, F, h, w]`."""
    error = error.double()
    return [float((ROOT * error - error[:, a : a + 1]).square().mean()) for a in range(error.shape[1])]


@pytest.fixture
def clips(make_tiny_sd: Callable[..., Any]) -> AnimateDiffBackbone:
    return AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")


def anchors(backbone: Any, folder: Path, tmp_path: Path, seed: int, micro: int) -> list[int]:
    """Returns the anchor frame that the penalty drew at each of eight steps."""
    task, chosen = debiased(backbone, folder, tmp_path, 9, f"seed={seed}"), []
    for step in range(8):
        with torch.no_grad(), task.state(step, micro) as state:
            values = of_each_anchor((state.prediction - state.target)[0])
            value = float(task.losses(state)["debias"])
        chosen.append(min(range(9), key=lambda frame: abs(values[frame] - value)))
        assert values[chosen[-1]] == pytest.approx(value, rel=1e-5)
    return chosen


def test_anchors_depend_on_the_seed_and_the_micro_batch(
    make_tiny_sd: Callable[..., Any], longer_clips: Path, tmp_path: Path
) -> None:
    def drawn(seed: int, micro: int, number: int) -> list[int]:
        backbone = AnimateDiffBackbone(build_animatediff(make_tiny_sd(), frames=9), "tiny")
        return anchors(backbone, longer_clips, tmp_path / str(number), seed, micro)

    first = drawn(0, 0, 0)
    assert first == drawn(0, 0, 1) and len(set(first)) > 2
    assert first != drawn(1, 0, 2) and first != drawn(0, 1, 3)


def test_the_penalty_ignores_class_examples(clips: AnimateDiffBackbone, clip_folder: Path, tmp_path: Path) -> None:
    prior = {"kind": "generated_clips", "prompt": "a toy", "num_images": 1, "frames": 4, "steps": 1}
    settings = [f"sources.moving.{key}={value}" for key, value in prior.items()]
    task = debiased(clips, clip_folder, tmp_path, 4, *settings, "regularize.prior.kind=prior_preservation")
    with torch.no_grad(), task.state(0, 0) as state:
        value = float(task.losses(state)["debias"])
    assert state.batch.role == ("instance", "prior")
    assert min(abs(v - value) for v in of_each_anchor((state.prediction - state.target)[0])) < 1e-5 * value


# --- the complete objective -------------------------------------------------------------------------------------


def flow_error(state: Step) -> Tensor:
    """Returns the prediction minus the velocity v = noise - x_0, with x_t = (1 - s) x_0 + s noise."""
    noise, clean = state.noise.double(), state.batch.latents.double()
    s = state.t.double().view(-1, 1, 1, 1, 1) / 1000
    torch.testing.assert_close(state.x_t.double(), (1 - s) * clean + s * noise, atol=1e-5, rtol=0)
    return state.prediction.double() - (noise - clean)


def v_error(state: Step) -> Tensor:
    """Returns the prediction minus v = a noise - s x_0, with x_t = a x_0 + s noise and Stable Diffusion's schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[state.t.long()].view(-1, 1, 1, 1, 1)
    a, s, noise, clean = kept.sqrt(), (1 - kept).sqrt(), state.noise.double(), state.batch.latents.double()
    torch.testing.assert_close(state.x_t.double(), a * clean + s * noise, atol=1e-5, rtol=0)
    return state.prediction.double() - (a * noise - s * clean)


@pytest.mark.parametrize(
    ("new", "error_of"),
    [
        (lambda: AnimateDiffBackbone(build_animatediff(build_sd_v(), frames=9), "tiny"), v_error),
        (FAMILIES["wan"], flow_error),
        (FAMILIES["ltx"], flow_error),
    ],
    ids=["v", "wan", "ltx"],
)
def test_the_objective_is_the_plain_loss_plus_the_debiased_loss(
    new: Callable[[], Any], error_of: Callable[[Step], Tensor], longer_clips: Path, tmp_path: Path
) -> None:
    """In each update, L = |e|^2 + |sqrt(2) e - e_a|^2 (arXiv 2310.08465, eq. 8).

    Here, e is the prediction error, and e_a is the anchor frame's prediction error.
    """
    task = debiased(new(), longer_clips, tmp_path, 9)
    for step in range(3):
        (update,) = task.updates(step, 0)
        loss = float(update.loss.detach())
        with torch.no_grad(), task.state(step, 0) as state:
            (error,) = error_of(state)
        assert error.shape[1] > 1
        plain = float(error.square().mean())
        wholes = [plain + debiased for debiased in of_each_anchor(error)]
        nearest = min(wholes, key=lambda whole: abs(whole - loss))
        assert loss == pytest.approx(nearest, rel=1e-5)
        assert len({round(whole / nearest, 4) for whole in wholes}) > 1  # the anchors can be told apart
