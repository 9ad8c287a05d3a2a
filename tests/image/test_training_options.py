"""The options and output of `pcs image personalize`: instruments, fresh starts, checks, random numbers and progress."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from pcs_image.runner import ImageRunner
from shared.backbones import load_backbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.commands.progress import Bar, Lines, Tenths, _duration
from shared.concept import read
from shared.io.read_subject import read_subject
from shared.recipe.resolve import load
from shared.runner.judging import training_scorers
from shared.runner.plan import Plan, plan
from shared.train import checkpoint
from shared.train.loop import Record

TINY = ("backbone=tiny", "train.steps=2", "train.batch_size=2", "train.resolution=32", "sampling.steps=2")


def test_a_recipe_that_learns_nothing_is_refused_before_anything_is_written(pcs, photos, tmp_path: Path):
    recipe = tmp_path / "only.yaml"
    recipe.write_text("base: dreambooth_lora\nregularize: {prior: null}\nphases: {only: {task: {kind: generate}}}\n")
    where = (f"subject.images={photos}", "subject.class_noun=mug", f"output={tmp_path / 'x.concept'}")
    ran = pcs("image", "personalize", recipe, *where)
    assert ran.code == 2 and "no phase of the recipe learns the subject" in ran.err
    assert not list(tmp_path.glob("x.*"))


# --- scoring during training ---------------------------------------------------------------------


def planned(photos: Path, out: Path, *settings: str) -> Plan:
    subject = (f"subject.images={photos}", "subject.class_noun=mug", f"output={out / 'x.concept'}")
    return plan(load("textual_inversion", [*TINY, *subject, *settings]))


EVERY = "train.validation.every=1"


def test_pictures_without_an_instrument_to_score_them_cause_a_warning(make_tiny_sd, photos, tmp_path):
    backbone = StableDiffusionBackbone(make_tiny_sd(), "tiny")
    with pytest.warns(UserWarning, match=r"nothing can score them, so the last state is kept.*give --clip FOLDER"):
        assert training_scorers(planned(photos, tmp_path, EVERY), backbone, None, None) is None


def test_instruments_without_pictures_to_score_cause_a_warning(make_tiny_sd, photos, dino, tmp_path):
    backbone = StableDiffusionBackbone(make_tiny_sd(), "tiny")
    with pytest.warns(UserWarning, match=r"none are generated: set train\.validation\.every=100"):
        assert training_scorers(planned(photos, tmp_path), backbone, None, dino) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert training_scorers(planned(photos, tmp_path), backbone, None, None) is None
        scorers = training_scorers(planned(photos, tmp_path, EVERY), backbone, None, dino)
    assert scorers is not None and set(scorers) == {"x"}
    scores = scorers["x"](torch.zeros(2, 3, 32, 32), ["a mug"] * 2)
    assert 0 <= scores["score"] <= 1
    for gone in ({"clip": tmp_path / "gone", "dino": None}, {"clip": None, "dino": tmp_path / "gone"}):
        with pytest.raises(ValueError, match="gone: no such folder"):
            training_scorers(planned(photos, tmp_path), backbone, **gone)


@pytest.mark.parametrize("option", ["--clip", "--dino"])
def test_missing_instruments_are_reported(pcs, learn, tmp_path, option):
    for settings in ((), (EVERY,)):
        ran = pcs(*learn("textual_inversion", f"output={tmp_path / 'x.concept'}", *settings), option, tmp_path / "gone")
        assert ran.code == 2 and f"{option} {tmp_path / 'gone'}: no such folder" in ran.err
        assert list(tmp_path.iterdir()) == []


def test_the_best_state_by_dino_score_is_kept(pcs, learn, dino, tmp_path):
    ran = pcs(*learn("textual_inversion", f"output={tmp_path / 'x.concept'}", EVERY), "--dino", dino)
    assert ran.code == 0, ran.err
    metrics = read(tmp_path / "x.concept").meta.metrics
    assert 0 <= metrics["score"] <= 1 and metrics["step"] in (1, 2)
    assert metrics["training_seconds"] > 0 and metrics["validation_seconds"] > 0
    assert metrics["mixed_precision"] == "no" and metrics["training_peak_memory"] > 0


# --- starting over -------------------------------------------------------------------------------


def test_overwrite_starts_over_after_a_failed_run(pcs, learn, tmp_path):
    """The option works even if the settings have changed and the saved state is damaged."""
    out, training = tmp_path / "x.concept", tmp_path / "x.training"
    wild = learn("textual_inversion", f"output={out}", "trainable.tokens.lr=1e30")
    assert pcs(*wild).code == 1 and list(training.glob("checkpoint-*"))
    (training / "mine.txt").write_text("keep me")
    tame = learn("textual_inversion", f"output={out}", "train.steps=1")
    refused = pcs(*tame)
    assert refused.code == 2 and "continue it with --resume, or start over with --overwrite" in refused.err
    (next(training.glob("checkpoint-*")) / "state.json").write_text("{")
    mine = pcs(*tame, "--overwrite")
    assert mine.code == 2 and "mine.txt" in mine.err and "state.json" not in mine.err, (
        "the message names only files that pcs did not write"
    )
    assert (training / "mine.txt").read_text() == "keep me" and list(training.glob("checkpoint-*"))
    (training / "mine.txt").unlink()
    anew = pcs(*tame, "--overwrite")
    assert anew.code == 0, anew.err
    assert (out / "concept.json").is_file()
    assert checkpoint.load(training) is None
    assert [json.loads(x)["step"] for x in (training / "log.jsonl").read_text().splitlines()] == [1]


def test_a_failed_run_can_be_resumed_with_a_lower_learning_rate(pcs, learn, tmp_path):
    out = tmp_path / "x.concept"
    assert pcs(*learn("textual_inversion", f"output={out}", "trainable.tokens.lr=1e30")).code == 1
    ran = pcs(*learn("textual_inversion", f"output={out}", "trainable.tokens.lr=1e-3"), "--resume")
    assert ran.code == 0 and (out / "concept.json").is_file(), ran.err


# --- random numbers --------------------------------------------------------------------------------


def test_the_callers_random_state_is_not_changed(tiny_folder, photos, tmp_path):
    runner = ImageRunner(load_backbone(tiny_folder))
    subject = {"mug": read_subject(photos, "mug")}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    runner.personalize(subject, load("pivotal_tuning", TINY), tmp_path / "run", tensorboard=False)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(7)
    broken = load("pivotal_tuning", [*TINY, "trainable.tokens.lr=1e30"])
    runner.unload("mug")
    with pytest.raises(RuntimeError):
        runner.personalize(subject, broken, tmp_path / "other", tensorboard=False)
    assert torch.equal(torch.rand(3), expected), "the random state is unchanged even if training fails"


# --- checks before training ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("phases.tune.sampling.scheduler=magic", r"phases\.tune\.sampling\.scheduler: .*unknown scheduler 'magic'"),
        ("sampling.scheduler=magic", r"sampling\.scheduler: .*unknown scheduler 'magic'"),
        ("phases.tune.sampling.guidance=.nan", r"sampling\.guidance = nan"),
        ("phases.tune.train.mixed_precision=fp16", r"phases\.tune\.train\.mixed_precision = 'fp16'"),
    ],
)
def test_the_settings_of_every_phase_are_checked_before_the_first_phase_begins(
    tiny_folder, photos, tmp_path, setting, message
):
    runner = ImageRunner(load_backbone(tiny_folder))
    with pytest.raises(ValueError, match=message):
        recipe = load("pivotal_tuning", [*TINY, setting])
        runner.personalize({"mug": read_subject(photos, "mug")}, recipe, tmp_path / "run", tensorboard=False)
    assert not (tmp_path / "run").exists() and not runner.backbone.placeholders


@pytest.mark.parametrize("guidance", ["nan", "inf"])
def test_a_non_finite_guidance_scale_is_refused(pcs, concepts, photos, tmp_path, guidance):
    for arguments in (("generate", "a <mug>"), ("evaluate", "--references", photos)):
        out = ("--concept", concepts["mug"], "--out", tmp_path / "o", "--guidance", guidance)
        ran = pcs("image", *arguments, *out)
        assert ran.code == 2 and f"'--guidance': {guidance} is not a number between -1000 and 1000" in ran.err
        assert list(tmp_path.iterdir()) == []


def test_the_runner_generates_class_pictures_at_the_resolution_of_their_phase(tiny_folder, photos, tmp_path):
    small = ("sources.class_pictures.num_images=2", "sources.class_pictures.steps=1")
    file = tmp_path / "own.yaml"
    file.write_text("base: dreambooth_lora\nphases: {a: {trainable: {}}}")
    recipe = load(str(file), [*TINY, *small, "phases.a.train.resolution=16"])
    runner = ImageRunner(load_backbone(tiny_folder))
    runner.personalize({"mug": read_subject(photos, "mug")}, recipe, tmp_path / "run", tensorboard=False)
    assert "mug" in runner.loaded


# --- progress --------------------------------------------------------------------------------------


def test_class_pictures_are_counted_while_they_are_generated(pcs, learn, tmp_path, monkeypatch):
    monkeypatch.setenv("PCS_CACHE", str(tmp_path / "cache"))
    more = ("sources.class_pictures.num_images=4", "sources.class_pictures.batch_size=2")
    more += ("sources.class_pictures.steps=2", "train.validation.every=1")
    ran = pcs(*learn("dreambooth_lora", f"output={tmp_path / 'x.concept'}", *more))
    assert ran.code == 0, ran.err
    steps = re.findall(r"class pictures of 'a photo of a mug', denoising steps: (\d of \d)", ran.err)
    assert steps == ["2 of 8", "4 of 8", "6 of 8", "8 of 8"], "two batches of two pictures take two steps each"
    shutil.rmtree(tmp_path / "x.concept")
    again = pcs(*learn("dreambooth_lora", f"output={tmp_path / 'x.concept'}", *more))
    assert again.code == 0 and "class pictures" not in again.err, "the class pictures already exist"
    for what in ("pictures at step 1", "pictures at step 2", "the preview of 'x'"):
        assert re.search(rf"^{what}, denoising steps: (\d+) of \1$", again.err, re.MULTILINE), what


def test_generate_reports_every_denoising_step(pcs, concepts, tmp_path):
    steps = ("--steps", 4, "--concept", concepts["mug"])
    ran = pcs(
        "image",
        "generate",
        "a photo of a <mug>",
        *steps,
        "--num",
        5,
        "--height",
        32,
        "--width",
        32,
        "--out",
        tmp_path / "o",
    )
    assert ran.code == 0, ran.err
    assert re.findall(r"pictures, denoising steps: (\d+) of 20", ran.err)[-1] == "20" and len(ran.err.splitlines()) >= 4


def test_the_training_speed_counts_only_steps_that_can_be_timed(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("shared.commands.progress.time.monotonic", lambda: now[0])
    with Bar() as bar:
        now[0] = 100.0  # the time spent on class pictures
        for step in range(1, 4):
            bar.step("tune", Record(step, 0.5, {}, {}, 1.0), 3)
            now[0] += 20.0
    assert capsys.readouterr().err.splitlines() == [
        "tune: step 1, 1 of 3 done, loss 0.5000",
        "tune: step 2, 2 of 3 done, loss 0.5000, 20.0 s per step, about 20 s left",
        "tune: step 3, 3 of 3 done, loss 0.5000, 20.0 s per step",
    ]


def test_a_step_without_a_loss_shows_the_last_loss(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("shared.commands.progress.time.monotonic", lambda: now[0])
    with Bar() as bar:
        for step, loss in enumerate((None, 0.5, None), 1):
            now[0] += 20.0
            bar.step("views", Record(step, loss, {}, {}, 1.0), 3)
    assert capsys.readouterr().err.splitlines() == [
        "views: step 1, 1 of 3 done",
        "views: step 2, 2 of 3 done, loss 0.5000, 20.0 s per step, about 20 s left",
        "views: step 3, 3 of 3 done, loss 0.5000, 20.0 s per step",
    ]


def test_steps_that_follow_generated_pictures_do_not_affect_the_speed(capsys, monkeypatch):
    """A step cannot be timed if it is the first one or if pictures were generated just before it."""
    now = [0.0]
    monkeypatch.setattr("shared.commands.progress.time.monotonic", lambda: now[0])
    with Bar() as bar:
        for seconds, loss in ((100.0, None), (0.25, 0.5), (0.25, 0.5)):
            now[0] += seconds
            bar.step("tune", Record(bar.done + 1, loss, {}, {}, 1.0), 9)
        bar.pictures("previews", 4, 4)
        for seconds in (100.0, 0.25):
            now[0] += seconds
            bar.step("tune", Record(bar.done + 1, 0.5, {}, {}, 1.0), 9)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tune")]
    assert lines == ["tune: step 1, 1 of 9 done", "tune: step 4, 4 of 9 done, loss 0.5000, 4.0 steps/s, about 2 s left"]


def test_the_remaining_time_is_given_in_suitable_units():
    assert [_duration(s) for s in (0.2, 89.5, 90, 5399, 7500)] == ["1 s", "90 s", "2 min", "1 h 30 min", "2 h 5 min"]


def test_a_repeated_job_is_reported_again(capsys):
    tenths = Tenths()
    for _ in range(2):
        for done in (1, 2):
            tenths("pictures", done, 2)
    assert capsys.readouterr().err.splitlines() == ["pictures: 1 of 2", "pictures: 2 of 2"] * 2


def test_without_a_terminal_a_line_is_written_every_ten_percent(capsys):
    with Lines() as counter:
        for done in range(1, 241):
            counter("pictures", done, 240)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"pictures: {24 * i} of 240" for i in range(1, 11)]
    with Bar() as bar:
        bar.pictures("class pictures", 3, 3)
    assert capsys.readouterr().err == "class pictures: 3 of 3\n"
    tenths = Tenths()
    for done in (1, 2, 3):
        tenths("few", done, 3)
    assert capsys.readouterr().err.splitlines() == ["few: 1 of 3", "few: 2 of 3", "few: 3 of 3"]
