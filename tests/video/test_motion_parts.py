"""Tests parts that are used to learn motion.

Each prediction uses the right adapters, and a random augmentation is drawn once per clip.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pcs_video.backbones.animatediff import AnimateDiffBackbone
from pcs_video.motion.dual_path import DualPath
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.augment import ColorJitter, Flip, RandomResize
from shared.recipe.resolve import load
from shared.runner.plan import plan
from shared.train.training_run import TrainingRun
from shared.types import Example
from tests.video.clip_models import build_animatediff
from tests.video.conftest import FAST, moving_square


def test_one_draw_of_an_augmentation_changes_all_frames_alike() -> None:
    clip = Example(moving_square(0), "a toy", ("toy",), masks={"toy": (moving_square(0)[:1] > 0).float()})
    for augment in (Flip(p=0.5), ColorJitter(brightness=0.5), RandomResize(margin=0)):
        for seed in range(4):
            changed = augment(clip, torch.Generator().manual_seed(seed))
            each = [augment(frame, torch.Generator().manual_seed(seed)) for frame in clip.frames()]
            assert torch.equal(changed.pixels, torch.stack([e.pixels for e in each], dim=1))
            assert torch.equal(changed.masks["toy"], torch.stack([e.masks["toy"] for e in each], dim=1))
            assert len({e.caption for e in each}) == 1 and changed.caption == each[0].caption


@pytest.fixture
def clips(make_tiny_sd: Callable[..., Any]) -> AnimateDiffBackbone:
    return AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")


def run(backbone: Any, clip_folder: Path, tmp_path: Path, *settings: str, resume: bool = False) -> TrainingRun:
    asked = [f"subject.clips={clip_folder}", f"output={tmp_path / 'm.concept'}", *FAST, *settings]
    planned = plan(load("motion_director", asked, "video", VideoRecipe), resume=resume)
    cache = tmp_path / "cache"
    return TrainingRun(
        backbone, planned.recipe, planned.subjects, planned.workdir, cache, tensorboard=False, tasks=VideoRunner.tasks
    )


def test_each_clip_has_its_own_spatial_adapters(
    clips: AnimateDiffBackbone, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step trains the spatial adapters of one clip on one of its frames, while the temporal adapters are off.

    The step then trains the temporal adapters on the whole clip, while the spatial adapters are on but fixed. The
    spatial adapters of the other clip do not change.
    """
    seen: list[tuple[int, dict[str, float]]] = []
    predict = AnimateDiffBackbone.predict

    def watched(self: Any, x_t: Any, t: Any, conditioning: Any) -> Any:
        seen.append((x_t.ndim, {n: s for n, s in self.strengths.items() if s}))
        return predict(self, x_t, t, conditioning)

    monkeypatch.setattr(AnimateDiffBackbone, "predict", watched)
    session = run(clips, clip_folder, tmp_path, "train.steps=1", "task.skip=0", "trainable.spatial.lr=0.1")
    steps = session.steps()
    next(steps)
    (first_dims, first), (second_dims, second) = seen
    assert (first_dims, second_dims) == (4, 5)
    (own,) = first
    assert own in ("spatial@1", "spatial@2") and second == {own: 1.0, "m": 1.0}

    def moved(name: str) -> bool:
        return any(bool(p.abs().max() > 0) for a in clips.adapters[name] for k, p in zip(a.state_dict(), a.parameters(), strict=True) if "lora_B" in k)  # fmt: skip  # noqa: E501

    other = ({"spatial@1", "spatial@2"} - {own}).pop()
    assert moved(own) and moved("m") and not moved(other)
    assert clips.strengths[own] == 0.0  # outside their own clip's steps, the adapters are off
    steps.close()


def test_class_clips_are_learned_without_the_spatial_adapters_of_any_clip(
    clips: AnimateDiffBackbone, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, set[str]]] = []
    predict = AnimateDiffBackbone.predict

    def watched(self: Any, x_t: Any, t: Any, conditioning: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append((x_t.ndim, {n for n, s in self.strengths.items() if s and n in self.adapters}))
        return predict(self, x_t, t, conditioning)

    monkeypatch.setattr(AnimateDiffBackbone, "predict", watched)
    prior = {"kind": "generated_clips", "prompt": "a toy", "num_images": 1, "frames": 4, "steps": 1}
    settings = [f"sources.moving.{key}={value}" for key, value in prior.items()]
    settings += ["regularize.prior.kind=prior_preservation", "train.steps=1", "task.skip=0"]
    session = run(clips, clip_folder, tmp_path, *settings)
    session.class_pictures = lambda prompts, seeds, **how: torch.zeros(len(seeds), 3, 4, 32, 32)
    ((_, record),) = session.steps()
    (own,) = seen[0][1]
    assert seen == [(4, {own}), (5, {own, "m"}), (5, {"m"})]
    assert set(record.parts) == {"spatial", "denoising", "debias", "prior"}


def test_the_spatial_path_is_skipped_as_often_as_requested(
    clips: AnimateDiffBackbone, clip_folder: Path, tmp_path: Path
) -> None:
    session = run(clips, clip_folder, tmp_path, "train.steps=40", "task.skip=0.25")
    with_spatial = [("loss/spatial" if "spatial" in record.parts else "") for _, record in session.steps()]
    assert 40 * 0.5 < sum(map(bool, with_spatial)) < 40 * 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("trainable.spatial=null",), "unknown group 'spatial'"),
        (("task.spatial=looks",), "no part has the optimizer group 'looks'. Groups: spatial, temporal"),
        (
            ("trainable.spatial.per_source=false",),
            r"trainable\.spatial: dual_path needs a spatial part for each clip; set per_source=true",
        ),
        (("train.batch_size=2",), "a batch can hold only one picture or clip; set train.batch_size=1"),
    ],
)
def test_invalid_settings_for_the_dual_path_are_refused(
    clips: AnimateDiffBackbone, clip_folder: Path, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(run(clips, clip_folder, tmp_path, "task.skip=0", *settings).steps())


def test_a_resumed_run_learns_the_same_adapters_as_an_uninterrupted_one(
    make_tiny_sd: Callable[..., Any], clip_folder: Path, tmp_path: Path
) -> None:
    """All adapters are bit-identical, including the spatial adapters of each clip."""

    def fresh(folder: str, resume: bool = False) -> TrainingRun:
        backbone = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
        return run(
            backbone,
            clip_folder,
            tmp_path / folder,
            "train.steps=4",
            "train.gradient_accumulation=2",
            "train.checkpoint_every=2",
            resume=resume,
        )

    whole = fresh("whole")
    list(whole.steps())
    first = fresh("parts")
    steps = first.steps()
    for _ in range(3):
        next(steps)
    steps.close()
    again = fresh("parts", resume=True)
    list(again.steps(resume=True))
    for name in whole.sets_of_the_run:
        for a, b in zip(whole.backbone.adapters[name], again.backbone.adapters[name], strict=True):
            for key, value in a.state_dict().items():
                assert torch.equal(value, b.state_dict()[key]), (name, key)


def test_motion_director_uses_the_dual_path_task() -> None:
    assert VideoRunner.tasks[type(load("motion_director", (), "video", VideoRecipe).task)] is DualPath
