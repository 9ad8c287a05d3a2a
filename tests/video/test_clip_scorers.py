"""Clips generated during training are scored, and a warning is given if training makes them stand still."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.metrics.clips.scorer import ClipScorer
from shared.recipe.resolve import load
from shared.runner.clip_scorers import Watched
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.sampling.settings import SamplingSettings
from tests.core.moving_patches import moving_patch
from tests.video.conftest import FAST
from tests.video.transformer_runs import learn

MOVING = moving_patch((3, 0))
STILL = MOVING[:, :1].repeat(1, 5, 1, 1)


@contextmanager
def no_alarm() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("base", "made", "alarm"),
    [
        ((MOVING, MOVING), (MOVING, MOVING), False),
        ((MOVING, MOVING), (MOVING, STILL), True),
        ((MOVING, STILL), (MOVING, STILL), False),  # as many clips stand still as before training
        ((MOVING, STILL), (STILL, STILL), True),
        ((STILL, STILL), (STILL, STILL), False),  # nothing moved before training either
    ],
)
def test_only_training_that_freezes_clips_causes_a_warning(
    base: Sequence[Tensor], made: Sequence[Tensor], alarm: bool
) -> None:
    watched = Watched(ClipScorer(motion_clips=[MOVING]), "slide", lambda prompts: torch.stack(list(base)))
    clips, prompts = torch.stack(list(made)), ["a mug", "a dog"]
    share = sum(clip is STILL for clip in made) / 2
    if not alarm:
        with no_alarm():
            assert watched(clips, prompts)["frozen"] == share
        return
    before = f"{sum(clip is STILL for clip in base) / 2:.0%}"
    with pytest.warns(
        UserWarning,
        match=f"{share:.0%} of the clips .* slide is being learned, compared with only {before} of those generated",
    ):
        assert watched(clips, prompts)["frozen"] == share


def test_base_model_clips_are_generated_once_and_only_after_a_frozen_clip() -> None:
    asked: list[Sequence[str]] = []

    def base(prompts: Sequence[str]) -> Tensor:
        asked.append(prompts)
        return STILL[None]

    watched = Watched(ClipScorer(), "slide", base)
    watched(MOVING[None], ["a mug"])
    assert not asked
    for _ in range(2):
        watched(STILL[None], ["a mug"])
    assert asked == [("a mug",)]


def test_base_clips_are_generated_without_the_concept_that_is_being_learned(
    clip_model: Path, clip_folder: Path, tmp_path: Path
) -> None:
    """Training may already have begun. Other loaded concepts stay active."""
    settings = [*FAST, f"backbone={clip_model}", f"subject.clips={clip_folder}", f"output={tmp_path / 'm.concept'}"]
    settings += ["train.validation.every=1", "sampling.frames=4"]
    planned = plan(load("motion_director", settings, "video", VideoRecipe))
    runner = open_runner(VideoRunner, str(clip_model), [], "cpu")
    learn(runner.backbone, "beside", roles=("temporal_attention",))

    def made() -> Tensor:
        how = SamplingSettings(steps=2, height=32, width=32, frames=4)
        return runner.make(["a mug", "a dog"], [10_000, 10_001], how)

    before = made()
    scorers = VideoRunner.scorers(planned, runner.backbone, None, None)
    assert scorers is not None and set(scorers) == {"m"}
    learn(runner.backbone, "m", roles=("temporal_attention",), rank=2)
    assert not torch.allclose(made(), before, atol=1e-3)
    assert torch.equal(scorers["m"].base(("a mug", "a dog")), before)
