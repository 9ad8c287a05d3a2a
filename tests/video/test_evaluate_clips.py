"""Evaluates motions in synthetic clips, and runs `pcs video evaluate` with a tiny model."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pcs_video.commands.video import app
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.cli import run
from shared.concept import read
from shared.concept.concept_folder import with_fields
from shared.evaluation.clips.case_facts import ClipCase
from shared.evaluation.clips.evaluate import ClipShots, Makers, evaluate_clips
from shared.evaluation.clips.prompt_sets import ClipTexts, clip_prompt_sets, load_clip_prompts
from shared.evaluation.prompt_sets import prompt_sets
from shared.io.clips.write_clip import write_clip
from shared.metrics.clips.paths import KnownMotion
from shared.metrics.clips.report import ClipReport
from shared.metrics.clips.scorer import ClipScorer
from shared.recipe.resolve import load
from shared.runner.judging_clips import ClipEvaluationSettings, clip_score_line
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.sampling.settings import SamplingSettings
from shared.toybox.motions.held_out import motion_names
from tests.core.moving_patches import moving_patch
from tests.core.runs import paint
from tests.video.conftest import FAST, moving_square

TOO_MANY = "one motion, one subject, or one of each"
QUICK = ("--steps", "2", "--frames", "4", "--height", "32", "--width", "32", "--guidance", "2")
PAGE_FILES = {"index.html", "report.json", "scores.csv", "clips.csv", "sheet.png", "clips"}


def maker(step: tuple[int, int], look: int = 0, spread: bool = True) -> Callable[..., Tensor]:
    """Returns a function that makes clips in which a patch moves by `step` (right, down) pixels per frame.

    Unless `spread` is False, the textures depend on the prompt and the seed.
    """

    def make(prompts: Sequence[str], seeds: Sequence[int], progress: Any) -> Tensor:
        told = [sum(map(ord, p)) % 97 for p in prompts]
        looks = [look + spread * (100 * s + t) for s, t in zip(seeds, told, strict=True)]
        return torch.stack([moving_patch(step, seed=n) for n in looks])

    return make


def texts(count: int = 2, **named: str) -> ClipTexts:
    return ClipTexts(load_clip_prompts("toybox_motion"), limit=count, **{"motion": "slide", **named})


LEARNED = [moving_patch((3, 0), seed=9000), moving_patch((4, 0), seed=9500)]


def judged(makers: Makers, scorer: ClipScorer | None = None, case: ClipCase | None = None, **shots: Any) -> ClipReport:
    scorer = scorer or ClipScorer(motion_clips=LEARNED)
    case = case or ClipCase(motion="slide")
    return evaluate_clips(makers, case, texts(), scorer, ClipShots(**{"seeds": (0, 1), **shots}))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipReport, Path]:
    """Evaluates a model that shows the learned motion if the prompt names it. In other clips, the patch moves down."""
    out = tmp_path_factory.mktemp("judged") / "report"
    return judged(Makers(maker((3, 0)), maker((0, 3)), maker((0, 3))), out=out), out


def test_a_learned_motion_is_distinguished_from_the_motion_in_base_model_clips(good: tuple[ClipReport, Path]) -> None:
    report, _ = good
    fidelity, false, leak = (report.score(key) for key in ("motion_fidelity", "false_motion", "leakage"))
    assert fidelity and false and leak and fidelity.value and fidelity.low and fidelity.base is not None
    assert fidelity.value > 0.85 > 0.3 > fidelity.base and fidelity.low <= fidelity.value
    assert false.value is not None and false.value < 0.3 and false.better == "lower"
    assert fidelity.among_low is not None and fidelity.among_low > 0.85
    assert leak.value is not None and leak.among_high is not None and leak.value < leak.among_high + 0.3
    assert report.value("frozen") == 0 and report.value("dynamic") == 1
    keys = [s.key for s in report.scores]
    assert keys.index("temporal_consistency") == keys.index("dynamic_degree") + 1, (
        "the two scores should be read together"
    )
    assert report.value("spread") and "clip_t" not in keys and "identity" not in keys
    assert any("No CLIP model was given" in note for note in report.notes)
    # without a subject, there is no note about whole frames
    assert not any("whole frames" in note for note in report.notes)
    rows = report.of_kind("concept")
    assert [(r.prompt, r.seed) for r in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert not any(r.failed for r in rows) and len(report.of_kind("base")) == len(report.of_kind("unnamed")) == 4
    assert rows[0].text == "a photo of a red and blue car <slide> on the beach"
    assert report.of_kind("unnamed")[0].text == "a photo of a red and blue car on the beach"


def test_the_report_is_a_page_that_plays_the_clips(good: tuple[ClipReport, Path]) -> None:
    report, out = good
    assert {p.name for p in out.iterdir()} >= PAGE_FILES
    for row in report.clips:
        with Image.open(out / row.file) as clip:
            assert getattr(clip, "n_frames", 1) == 5 and clip.size == (64, 64)
    page = (out / "index.html").read_text()
    shown = [base64.b64decode(m) for m in re.findall(r'<img src="data:image/webp;base64,([^"]+)"', page)]
    assert len(shown) == 12 + 2 and all(getattr(Image.open(io.BytesIO(s)), "n_frames", 1) == 5 for s in shown)
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    assert page.count("prefers-reduced-motion: reduce") == len(shown)
    again = ClipReport.load(out)
    assert again == report.model_copy(update={"files": again.files}) and again.files.keys() <= report.files.keys()
    with (out / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["score.motion_fidelity"]) for r in rows] == [c.scores["motion_fidelity"] for c in report.clips]
    with (out / "scores.csv").open(newline="") as file:
        table = {r["key"]: r for r in csv.DictReader(file)}
    assert float(table["leakage"]["value"]) == report.value("leakage")


def test_the_error_for_an_unreadable_report_states_the_reason(good: tuple[ClipReport, Path], tmp_path: Path) -> None:
    whole = json.loads((good[1] / "report.json").read_text())
    for change, message in (
        ({"schema_version": 7}, "schema version 7"),
        ({"medium": "pictures"}, "not a report of clips"),
        ({"clips": 3}, "not a valid report: clips"),
    ):
        (tmp_path / "report.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(ValueError, match=message):
            ClipReport.load(tmp_path)


def test_flags_state_what_is_wrong_with_a_clip() -> None:
    def still(prompts: Sequence[str], seeds: Sequence[int], progress: Any) -> Tensor:
        return torch.stack([moving_patch((3, 0), seed=s)[:, :1].repeat(1, 5, 1, 1) for s in seeds])

    base = maker((0, 3))
    frozen = judged(Makers(still, base), seeds=(0,))
    assert [r.flags for r in frozen.of_kind("concept")] == [["nothing moves"]] * 2
    degree = frozen.score("dynamic_degree")
    assert degree and (degree.value, degree.low, degree.high) == (0, 0, 0)
    assert frozen.value("frozen") == 1 and frozen.value("score") == 0 and frozen.value("temporal_consistency") == 1
    opposite = judged(Makers(maker((-3, 0)), base), seeds=(0,))
    assert [r.flags for r in opposite.of_kind("concept")] == [["moves unlike the motion's clips"]] * 2
    copied = judged(Makers(maker((3, 0), look=9000, spread=False), base))
    assert [r.flags for r in copied.of_kind("concept")] == [["looks like the motion's clips"]] * 4
    assert copied.value("leakage") == pytest.approx(1) and copied.value("spread") == pytest.approx(0, abs=1e-6)


class SeesPaths:
    """A fake path reader that interprets horizontal movement as the known motion and all else as standing still."""

    def __init__(self, known: KnownMotion) -> None:
        self.known = known

    def __call__(self, frames: Tensor) -> np.ndarray:
        count = frames.shape[1]
        change = (frames[:, 1] - frames[:, 0]).abs().mean(0)
        wide = change.sum(0).gt(0.1).sum() > change.sum(1).gt(0.1).sum()
        return self.known.motion.path(count) if wide else np.zeros((count, 6))


def test_a_toybox_motion_is_recognized() -> None:
    known = KnownMotion("reporting-loop", motion_names()["reporting-loop"])
    scorer = ClipScorer(motion_clips=LEARNED, known=known, reader=SeesPaths(known))
    case = ClipCase(motion="loop", ceiling=0.9, acts_unnamed=True)
    report = judged(Makers(maker((3, 0)), maker((0, 3))), scorer, case, seeds=(0,))
    found, false = report.score("motion_recognised"), report.score("false_motion")
    assert found and false and (found.value, found.base, found.truth) == (1, 0, 0.9)
    beside = f"base model 0.000   chance {known.chance:.3f}   true clips 0.900"
    assert clip_score_line(found) == f"1.000 [0.342, 1.000]   {beside}"
    assert found.chance == known.chance and report.candidates[0] == "loop" and len(report.candidates) >= 11
    assert (false.value, false.unit) == (1, "rate") and false.explanation.startswith("Motion recognized in clips")
    assert any("affects every clip" in note for note in report.notes) and not report.of_kind("unnamed")
    assert report.of_kind("base")[0].moves_like == "still" and not report.of_kind("base")[0].flags
    swapped = judged(Makers(maker((0, 3)), maker((3, 0))), scorer, case, seeds=(0,))
    assert [r.flags for r in swapped.of_kind("concept")] == [["nearest to standing still"]] * 2


def test_the_motion_and_the_subject_are_inserted_into_prompts(tmp_path: Path) -> None:
    assert clip_prompt_sets() == ("toybox_motion",) and "toybox_motion" not in prompt_sets()
    chosen = load_clip_prompts("toybox_motion")
    assert len(chosen.prompts) == 10
    assert (
        len({p.expects["class"] for p in chosen.prompts})
        == len({p.expects["background"] for p in chosen.prompts})
        == 10
    )
    both = ClipTexts(chosen, "zigzag", "my-mug", "mug", 1)
    assert both.named == ["a photo of a <my-mug> <zigzag> on the beach"]
    assert both.unnamed == ["a photo of a <my-mug> on the beach"]
    assert both.plain == ["a photo of a mug on the beach"] and both.expects == [{"background": "beach"}]
    assert both.of_pictures().prompts[0].text == "a photo of a {concept} on the beach"
    alone = ClipTexts(chosen, "", "my-mug", "mug", 1)
    assert alone.named == ["a photo of a <my-mug> on the beach"]
    file = tmp_path / "mine.txt"
    file.write_text("# mine\na {thing}, {concept}, at night\n")
    own = load_clip_prompts(file)
    assert ClipTexts(own, "", "owl", "owl").plain == ["an owl, at night"]
    cases: Sequence[tuple[str, Mapping[str, str], str]] = (
        ("a {thing}", {"motion": "m", "subject": "s"}, "does not say where the motion goes"),
        ("a mug {concept}", {"motion": "m", "subject": "s"}, "does not say where the subject goes"),
        ("a {thing} {concept}", {"motion": "m"}, "no subject is evaluated: set the prompt's `thing`"),
    )
    for line, who, message in cases:
        file.write_text(line)
        with pytest.raises(ValueError, match=message):
            ClipTexts(load_clip_prompts(file), **who)
    file.write_text("a {thng}")
    with pytest.raises(ValueError, match=r"Did you mean '\{thing\}'"):
        load_clip_prompts(file)
    with pytest.raises(ValueError, match="Did you mean 'toybox_motion'"):
        load_clip_prompts("toybox_motions")


# --- the command line, with a tiny model ---


@pytest.fixture(scope="module")
def concepts(
    tmp_path_factory: pytest.TempPathFactory, clip_model: Path, clip_folder: Path, picture_model: Path
) -> Path:
    """Returns a folder that contains slide.concept and the clips that the motion was learned from."""
    folder = tmp_path_factory.mktemp("learned")
    clips = folder / "clips"
    for i in range(2):
        write_clip(clips / f"{i}", moving_square(i), 8)
    settings = [f"backbone={clip_model}", f"subject.clips={clips}", f"output={folder / 'slide.concept'}", *FAST]
    recipe: Any = load("motion_director", [*settings, "trainable.temporal.lr=0.05"], "video", VideoRecipe)
    personalize(plan(recipe), open_runner(VideoRunner, recipe.backbone, [], "cpu"))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text('prompts:\n- {text: "a {thing} {concept} on the beach", thing: red mug}\n')
    return file


def test_a_motion_is_evaluated_without_any_scoring_network(
    concepts: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    asked = ["evaluate", "--concept", concepts / "slide.concept", "--prompts", prompts, "--out", out, *QUICK]
    assert run(app, [str(a) for a in asked]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    report = ClipReport.load(out)
    assert last == str(out / "index.html") and [line[:34].rstrip() for line in said] == [s.title for s in report.scores]
    (fidelity,) = (line for line in said if line.startswith("Motion fidelity"))
    number = r"-?\d\.\d{3}"
    beside = rf"base model {number}   between the motion's clips {number} to {number}"
    assert re.fullmatch(rf"Motion fidelity +{number} \[{number}, {number}\]   {beside}", fidelity), fidelity
    assert {p.name for p in out.iterdir()} >= PAGE_FILES and len(report.motion_clips) == 2
    measured = {s.key for s in report.scores if s.value is not None}
    assert measured >= {
        "motion_fidelity",
        "leakage",
        "false_motion",
        "dynamic_degree",
        "temporal_consistency",
        "spread",
    }
    assert (report.motion, report.frames, report.seeds, report.recipes) == (
        "slide", 4, [0, 1], {"slide": "motion_director"},
    )  # fmt: skip
    assert any("motion has no words" in note for note in report.notes) and not report.of_kind("unnamed")
    made, base = report.files[report.of_kind("concept")[0].file], report.files[report.of_kind("base")[0].file]
    assert made != base and report.costs.concept_bytes and report.costs.seconds_per_clip
    assert run(app, [str(a) for a in asked]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_motion_at_strength_0_gives_the_same_clips_as_the_base_model(
    concepts: Path, prompts: Path, tmp_path: Path
) -> None:
    runner = open_runner(VideoRunner, None, [str(concepts / "slide.concept")], "cpu")
    small = SamplingSettings("", 2.0, 2, height=32, width=32, frames=4)
    settings = ClipEvaluationSettings(str(prompts), (3,), sampling=small, false_motion="off")
    report = runner.evaluate_clips(settings)
    base, off, made = (report.files[report.of_kind(kind)[0].file] for kind in ("base", "unnamed", "concept"))

    def frames(webp: bytes) -> bytes:
        clip = Image.open(io.BytesIO(webp))
        out = b""
        for i in range(getattr(clip, "n_frames", 1)):
            clip.seek(i)
            out += clip.convert("RGB").tobytes()
        return out

    assert frames(off) == frames(base) != frames(made)
    assert report.of_kind("unnamed")[0].text == "a red mug <slide> on the beach"
    assert runner.backbone.strengths == {"slide": 1.0} and not any("no words" in note for note in report.notes)
    none = runner.evaluate_clips(replace(settings, false_motion="none"))
    assert none.score("false_motion") is None and not none.of_kind("unnamed")


def test_a_subject_and_a_motion_are_evaluated_together(
    concepts: Path, clip_model: Path, dino: Path, prompts: Path, tmp_path: Path
) -> None:
    photos = paint(tmp_path / "photos")
    settings = [
        f"backbone={clip_model}",
        f"subject.images={photos}",
        "subject.class_noun=mug",
        *FAST[:3],
        "preview.num=0",
    ]
    settings += ["sources.class_pictures=null", "regularize.prior=null", "trainable.lora.lr=0.05"]
    recipe: Any = load("subject_lora", [*settings, f"output={tmp_path / 'thing.concept'}"], "video", VideoRecipe)
    personalize(plan(recipe), open_runner(VideoRunner, recipe.backbone, [], "cpu"))
    both = ["--concept", tmp_path / "thing.concept", "--concept", concepts / "slide.concept"]
    asked = ["evaluate", *both, "--prompts", prompts, "--dino", dino, "--num", 1, *QUICK, "--out", tmp_path / "report"]
    assert run(app, [str(a) for a in asked]) == 0
    report = ClipReport.load(tmp_path / "report")
    assert (report.subject, report.motion, report.class_noun, report.name) == (
        "thing",
        "slide",
        "mug",
        "thing with slide",
    )
    assert report.of_kind("concept")[0].text == "a <thing> <slide> on the beach"
    assert report.of_kind("base")[0].text == "a mug on the beach" and len(report.references) == 3
    identity, likeness = report.score("identity"), report.score("dino_i")
    assert identity and likeness and identity.value is not None and identity.base is not None
    assert identity.value != identity.base and likeness.value != likeness.base
    assert report.score("subject_crops") is None and any("on whole frames" in note for note in report.notes)
    score = [report.value(key) or 0.0 for key in ("identity", "motion_fidelity", "leakage")]
    assert report.value("score") == pytest.approx(max(0, score[0] * score[1] * (1 - score[2])))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--prompts", "dreambench"), "unknown prompt set for clips 'dreambench'"),
        (("--false-motion", "of"), "Did you mean 'off'"),
        (("--references", "nowhere"), "nowhere does not exist"),
        (("--clip", "nowhere"), "no such folder"),
    ],
)
def test_impossible_evaluations_are_refused(
    concepts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: Sequence[str], message: str
) -> None:
    out = tmp_path / "report"
    assert run(app, ["evaluate", "--concept", str(concepts / "slide.concept"), "--out", str(out), *QUICK, *extra]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_only_one_motion_or_one_subject_or_one_of_each_can_be_evaluated(
    concepts: Path, clip_model: Path, tmp_path: Path
) -> None:
    bare = open_runner(VideoRunner, str(clip_model), [], "cpu")
    with pytest.raises(ValueError, match=f"{TOO_MANY}; given concepts: none"):
        bare.evaluate_clips()
    one = read(concepts / "slide.concept")
    bare.load(one)
    bare.load(replace(one, meta=with_fields(one.meta, name="other")))
    with pytest.raises(ValueError, match=rf"{TOO_MANY}; given concepts: slide \(motion\), other \(motion\)"):
        bare.evaluate_clips()


def test_clips_made_during_training_are_scored_and_checked_for_motion(
    clip_model: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.concept"
    settings = [f"backbone={clip_model}", f"subject.clips={clip_folder}", f"output={out}", *FAST]
    settings += ["train.validation.every=1", "train.validation.num=1", "sampling.frames=4"]
    assert run(app, ["personalize", "motion_director", *settings]) == 0
    metrics = read(out).meta.metrics
    expected = max(0, metrics["motion_fidelity"] * (1 - metrics["leakage"]))
    assert metrics["score"] == pytest.approx(expected, abs=1e-6) and 0 <= metrics["frozen"] <= 1


def test_clips_that_the_motion_was_not_learned_from_are_refused(concepts: Path, tmp_path: Path) -> None:
    shutil.copytree(concepts, tmp_path / "moved")
    write_clip(tmp_path / "moved" / "clips" / "0", moving_square(5), 8)
    runner = open_runner(VideoRunner, None, [str(tmp_path / "moved" / "slide.concept")], "cpu")
    with pytest.raises(ValueError, match="has clips that the motion was not learned from: give --references"):
        runner.evaluate_clips()
    shutil.rmtree(tmp_path / "moved" / "clips")
    with pytest.raises(ValueError, match="give --references FOLDER: a motion stores the hashes of its clips"):
        runner.evaluate_clips()
