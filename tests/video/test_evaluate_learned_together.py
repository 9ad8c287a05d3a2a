"""Evaluates a subject that was learned together with its motion, from clips that show both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.io.clips.write_clip import write_clip
from shared.recipe.resolve import load
from shared.runner.judging_clips import ClipEvaluationSettings
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.sampling.settings import SamplingSettings
from tests.core.runs import paint
from tests.video.conftest import FAST, moving_square

SMALL = SamplingSettings("", 2.0, 2, height=32, width=32, frames=4)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, clip_model: Path) -> Path:
    """Returns a folder that contains hop.concept and the clips that it was learned from."""
    folder = tmp_path_factory.mktemp("together")
    for i in range(2):
        write_clip(folder / "clips" / f"{i}", moving_square(i), 8)
    settings = [f"subject.clips={folder / 'clips'}", "subject.class_noun=mug", f"output={folder / 'hop.concept'}"]
    sizes = [f"phases.{p}.{s}" for p in ("set", "sequence") for s in ("train.steps=1", "sources.clips.window.length=4")]
    recipe: Any = load("set_then_sequence", [f"backbone={clip_model}", *settings, *FAST, *sizes], "video", VideoRecipe)
    personalize(plan(recipe), open_runner(VideoRunner, recipe.backbone, [], "cpu"))
    return folder


def test_the_motion_is_judged_by_the_clips_and_the_subject_by_pictures(learned: Path, dino: Path, tmp_path: Path):
    prompts = tmp_path / "mine.yaml"
    prompts.write_text('prompts:\n- {text: "a {thing} {concept} on the beach"}\n')
    runner = open_runner(VideoRunner, None, [str(learned / "hop.concept")], "cpu")
    settings = ClipEvaluationSettings(
        str(prompts), (0,), sampling=SMALL, dino=dino, pictures=paint(tmp_path / "photos"), out=tmp_path / "report"
    )
    report = runner.evaluate_clips(settings)
    assert (report.name, report.motion, report.subject, report.prompts) == (
        "hop",
        "hop",
        "hop",
        ["a <hop> on the beach"],
    )
    measured = {s.key for s in report.scores if s.value is not None}
    assert {"motion_fidelity", "identity", "dino_i"} <= measured and not {"leakage", "false_motion"} & measured
    assert len(report.motion_clips) == 2 and any("leakage from its clips is not measured" in n for n in report.notes)
    fidelity, identity = report.value("motion_fidelity") or 0.0, report.value("identity") or 0.0
    assert report.value("score") == pytest.approx(max(0.0, fidelity) * identity)


def test_pictures_are_asked_for_and_missing_clips_are_noted(learned: Path, dino: Path, tmp_path: Path):
    shutil.copytree(learned / "hop.concept", tmp_path / "hop.concept")
    runner = open_runner(VideoRunner, None, [str(tmp_path / "hop.concept")], "cpu")
    prompts = tmp_path / "mine.yaml"
    prompts.write_text('prompts:\n- {text: "a {thing} {concept} on the beach"}\n')
    asked = {"prompts": str(prompts), "seeds": (0,), "sampling": SMALL, "dino": dino}
    with pytest.raises(ValueError, match="hop was learned from clips: give --pictures FOLDER with pictures of it"):
        runner.evaluate_clips(ClipEvaluationSettings(**asked))
    report = runner.evaluate_clips(ClipEvaluationSettings(**asked, pictures=paint(tmp_path / "photos")))
    measured = {s.key for s in report.scores if s.value is not None}
    assert "identity" in measured and "motion_fidelity" not in measured
    assert any("The motion's clips were not given" in note for note in report.notes)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        runner.evaluate_clips(ClipEvaluationSettings(**asked, references=Path("nowhere")))
