"""Tests the shipped asset recipes, the files that the runner writes, and the settings that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from pcs_3d.assets import ABOUT, AssetFiles, create
from pcs_3d.distill.distill import Distill
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from shared.config import read_yaml, validate
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from shared.io.locks import holding
from shared.recipe.catalog import recipe_files
from shared.recipe.phases import expand_phases
from shared.recipe.resolve import load
from shared.recipe.schema import dump
from shared.toybox.reference_sets import write_album
from shared.toybox.weights import backbone_path
from shared.train import checkpoint
from tests.core.test_locks import locked_elsewhere
from tests.three_d.distilling import SMALL, finish, recipe, session
from tests.three_d.picture_scenes import PictureRecipe

SHIPPED = sorted(recipe_files("3d"))
FEW = ("train.steps=2",)
# These recipes are tested in test_hand_over.py, test_pictures_to_asset.py, test_local_editing.py,
# test_texture_refinement.py, test_texture_from_views.py and test_reference_cameras.py.
TESTED_ELSEWHERE = {
    "dream_gaussian",
    "dreambooth3d",
    "local_editing",
    "texture_refinement",
    "texture_from_views",
    "magic3d",
    "mv_dreambooth",
    "realfusion",
    "reference_reconstruction",
    "texture_personalization",
}


def wrote(field, folder: Path, settings) -> None:
    (folder / "asset.txt").write_text(str(field.raw.sum().item()))


# --- the shipped recipes ---------------------------------------------------------------------


@pytest.mark.parametrize("place", [[], ["backbone=some/folder"]], ids=["toybox", "elsewhere"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_resolves_and_survives_a_round_trip(name, place):
    found = load(name, place, "3d", Recipe3D)
    assert validate(Recipe3D, json.loads(json.dumps(dump(found)))) == found
    assert (found.setting != "") == (not place), "the setting for toybox prompts is used only on the toybox"
    lines = recipe_files("3d")[name].read_text().splitlines()
    assert "https://" in lines[0] + lines[1]
    assert all(paper in "".join(lines[:6]) for paper in read_yaml(recipe_files("3d")[name])["papers"])


@pytest.mark.parametrize("place", [[], ["backbone=some/folder"]], ids=["toybox", "elsewhere"])
@pytest.mark.parametrize("name", SHIPPED)
def test_the_field_is_previewed_during_training_but_not_too_often(name, place):
    for phase, how in expand_phases(load(name, place, "3d", Recipe3D)):
        if isinstance(how.task, DistillTask):
            every, steps = how.train.validation.every, how.train.steps
            assert every and steps / every <= 25, (phase, every, steps)


def test_the_toybox_reads_every_negative_prompt_to_its_end():
    tokenizer = CLIPTokenizer.from_pretrained(backbone_path() / "tokenizer")
    for name in SHIPPED:
        for _, phase in expand_phases(load(name, [], "3d", Recipe3D)):
            assert len(tokenizer(phase.negative).input_ids) <= tokenizer.model_max_length, name
            assert not phase.negative or phase.negative in recipe_files("3d")[name].read_text()


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in TESTED_ELSEWHERE])
def test_shipped_recipes_take_two_steps_on_a_tiny_model(sd, tmp_path, name):
    size = ("train.resolution=null", "field.side=8") if name == "sjc" else ()
    run = session(sd, recipe(name, *FEW, *size), tmp_path / "run")
    before = run.recipe.field.build(4 if size else 3, 0).state_dict()["raw"]  # type: ignore[attr-defined]
    after = finish(run)["field/raw"]
    assert after.shape == before.shape and not torch.equal(after, before) and bool(after.isfinite().all())


# --- the runner and its files ----------------------------------------------------------------


def test_an_asset_folder_records_how_the_asset_was_made(sd, tmp_path, monkeypatch):
    monkeypatch.setattr(sd, "name", str(tmp_path / "sd"))
    how, runner = recipe("dreamfusion", *FEW, "train.validation.every=1"), Runner3D(sd)
    asset = create(runner, how, AssetFiles(tmp_path / "asset"), export=wrote)
    files = {str(p.relative_to(tmp_path / "asset")) for p in (tmp_path / "asset").rglob("*.*")}
    assert {"turntable.mp4", "asset.txt", ABOUT, "renders/000.png", "renders/315.png"} <= files
    about = json.loads((tmp_path / "asset" / ABOUT).read_text())
    assert about["prompt"] == "a photo of a mug" and validate(PictureRecipe, about["recipe"]) == how
    assert read_clip(tmp_path / "asset" / "turntable.mp4", ClipWindow(length=48)).frames.shape[1] == 48
    assert asset.views(how.cameras.sample(3, _start(), torch.Generator())).pixels.shape == (3, 3, 32, 32)
    assert checkpoint.load(tmp_path / "asset.training") is None and not sd.adapters
    assert list((tmp_path / "asset.training" / "samples").glob("*.png")), "previews are rendered during training"
    assert about["backbone"] == "sd" and str(tmp_path) not in json.dumps(about), (
        "asset.json must not contain local paths"
    )
    with pytest.raises(ValueError, match="exists"):
        AssetFiles(tmp_path / "asset").check()
    assert AssetFiles(tmp_path / "asset", resume=True).check(), "the asset is finished, so nothing is left to do"


def _start():
    from pcs_3d.schedules import Moment

    return Moment(0, 1)


def test_a_failed_export_leaves_a_state_to_resume_from(sd, tmp_path):
    def empty(field, folder, settings) -> None:
        raise ValueError("the field is empty")

    how, files = recipe("prolificdreamer", *FEW), AssetFiles(tmp_path / "asset", resume=True)
    with pytest.raises(ValueError, match="the field is empty"):
        create(Runner3D(sd), how, files, export=empty)
    assert not files.out.exists() and checkpoint.load(files.workdir) is not None
    with pytest.raises(ValueError, match="holds an interrupted run"):
        AssetFiles(tmp_path / "asset").check()
    assert not files.check()
    create(Runner3D(sd), how, files, export=wrote)
    again = create(Runner3D(sd), how, AssetFiles(tmp_path / "other"), export=wrote)
    assert (files.out / "asset.txt").read_text() == str(float(again.field.raw.sum()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["prompt="], "prompt is empty"),
        (["prompt=a photo of a <mug>"], "names <mug>, which is not loaded"),
        (["prompt=" + "a mug and a dog and " * 12], "too long"),
        (["task=tune"], "no phase of the recipe makes an asset"),
    ],
)
def test_impossible_prompts_and_tasks_are_refused_before_anything_begins(sd, tmp_path, settings, why):
    with pytest.raises(ValueError, match=why):
        Runner3D(sd).create(recipe("dreamfusion", *FEW, *settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pictures_in_the_training_folder_are_refused(pcs, tmp_path):
    """pcs wrote these pictures, so a new run would delete them with the files of an earlier run."""
    photos, links = tmp_path / "asset.training" / "photos", tmp_path / "links"
    write_album("development-robot", photos)
    links.mkdir()
    (links / "a.png").symlink_to(photos / "00.png")
    for images, read in ((photos, photos), (links, links / "a.png")):
        given = ("prompt=a photo of a robot", f"subject.images={images}", "subject.class_noun=robot")
        ran = pcs("3d", "create", "reference_reconstruction", *given, "--out", tmp_path / "asset", "--device", "none")
        assert ran.code == 2 and f"asset.training contains {read}, which is an input" in ran.err, ran.err


def test_an_asset_and_the_state_of_its_run_are_locked(sd, tmp_path):
    files, how = AssetFiles(tmp_path / "asset", resume=True), recipe("dreamfusion", *FEW)
    for path in (files.out, files.workdir):
        with locked_elsewhere(path) as message, pytest.raises(ValueError, match=message):
            create(Runner3D(sd), how, files, export=wrote)
    checkpoint.save(files.workdir, checkpoint.State(0, 1))
    with locked_elsewhere(files.workdir) as message, holding(), pytest.raises(ValueError, match=message):
        files.check()
    assert not files.check()


def test_an_asset_created_from_python_replaces_no_other_folder(sd, tmp_path):
    files, how = AssetFiles(tmp_path / "asset"), recipe("dreamfusion", *FEW)
    files.out.mkdir()
    (files.out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="asset already exists and contains 1 file"):
        create(Runner3D(sd), how, files, export=wrote)
    assert not files.workdir.exists(), "nothing was made"


def test_a_runner_can_replace_a_task(sd, tmp_path):
    seen = []

    class Watched(Distill):
        def updates(self, step, micro):
            seen.append(step)
            yield from super().updates(step, micro)

    class Mine(Runner3D):
        tasks = {**Runner3D.tasks, DistillTask: Watched}

    Mine(sd).create(recipe("dreamfusion", *FEW), tmp_path / "run", tensorboard=False)
    assert seen == [0, 1]


def test_the_command_refuses_the_output_setting_and_names_the_option_to_use_instead(tmp_path):
    from typer.testing import CliRunner

    from pcs_3d.commands.three_d import app

    asked = [
        "create",
        "dreamfusion",
        "prompt=a photo of a mug",
        f"output={tmp_path / 'a'}",
        "--out",
        str(tmp_path / "b"),
    ]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code and "--out" in str(result.exception) and not list(tmp_path.iterdir())


def test_the_recipe_is_adapted_to_the_model_that_the_concept_was_learned_on(tiny_sd, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from pcs_3d.commands.three_d import app
    from shared.backbones import load_backbone
    from shared.concept import Provenance, capture, save
    from shared.modifiers import LearnableToken

    monkeypatch.setenv("PCS_CACHE", str(tmp_path / "cache"))
    tiny_sd.save_pretrained(tmp_path / "sd")
    model, modifier = load_backbone(tmp_path / "sd"), LearnableToken()
    modifier.attach(model, "my-mug", "mug")
    concept = capture(model, "my-mug", Provenance(class_noun="mug", modifier=modifier))
    save(concept, tmp_path / "my-mug.concept")
    few = [s for s in (*SMALL, *FEW) if not s.startswith(("backbone", "prompt"))] + ["export=null"]
    asked = ["create", "dreamfusion", "prompt=a photo of a <my-mug>", *few, "--out", str(tmp_path / "asset")]
    done = CliRunner().invoke(app, [*asked, "--concept", str(tmp_path / "my-mug.concept")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    samples = tmp_path / "asset.training" / "samples"
    assert f"previews: {samples}" in done.output and len(list(samples.glob("*.png"))) == 1
    made = json.loads((tmp_path / "asset" / ABOUT).read_text())["recipe"]
    elsewhere, toybox = (load("dreamfusion", [*few, *m], "3d", Recipe3D) for m in (["backbone=sd"], []))
    assert made["backbone"] == "sd" and made["guidance"] == dump(elsewhere)["guidance"] != dump(toybox)["guidance"]
