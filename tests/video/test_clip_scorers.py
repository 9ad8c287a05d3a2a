"""Clips generated during training are scored, the best state is kept, and frozen clips cause a warning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.concept import read
from shared.metrics.clips.scorer import ClipScorer
from shared.recipe.resolve import load
from shared.runner.clip_scorers import Watched
from shared.runner.judging import FIRST_SEED
from shared.runner.learn import personalize
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


class Freezing(VideoRunner):
    """A runner whose clips stand still from the second validation on."""

    validations = 0

    def make(self, *given: Any, **more: Any) -> Tensor:
        clips = super().make(*given, **more)
        self.validations += 1
        return clips if self.validations == 1 else clips[:, :, :1].expand_as(clips)


def test_training_that_freezes_the_clips_causes_a_warning_and_restores_the_best_state(
    clip_model: Path, clip_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.concept"
    settings = [*FAST, f"backbone={clip_model}", f"subject.clips={clip_folder}", f"output={out}", "preview.num=0"]
    settings += ["trainable.temporal.lr=0.2", "sampling.frames=4"]
    settings += ["train.validation.every=1", "train.validation.num=2"]
    planned = plan(load("animatediff_motion_lora", settings, "video", VideoRecipe))
    runner = open_runner(Freezing, str(clip_model), [], "cpu")
    scorers = VideoRunner.scorers(planned, runner.backbone, None, None)
    assert scorers is not None
    alarm = "nothing moves in 100% of the clips generated while m is being learned, compared with only 0% of those"
    with pytest.warns(UserWarning, match=alarm):
        personalize(planned, runner, scorers=scorers)
    lines = [json.loads(line) for line in (planned.workdir / "log.jsonl").read_text().splitlines()]
    first, last = (line for line in lines if "validation/score" in line)
    assert (first["validation/frozen"], last["validation/frozen"], last["validation/score"]) == (0, 1, 0)
    motion, leak = first["validation/motion_fidelity"], first["validation/leakage"]
    assert first["validation/score"] == pytest.approx(motion * (1 - max(0, leak))) and motion > 0.1
    kept = read(out).meta.metrics
    assert kept["step"] == 1 and kept["score"] == first["validation/score"]
    restored = open_runner(VideoRunner, None, [str(out)], "cpu")
    how = SamplingSettings(steps=2, height=32, width=32, frames=4)
    clips = restored.generate(["a photo of a <m>"] * 2, [FIRST_SEED, FIRST_SEED + 1], how)
    again = scorers["m"].scorer(clips, ["a photo of a"] * 2)
    assert again["motion_fidelity"] == pytest.approx(motion, abs=1e-4)
