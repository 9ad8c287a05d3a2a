"""Requests that cannot work are refused before a model is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pcs_image.pictures import PictureFolder, generate
from shared.runner import open_runner
from tests.core.test_locks import locked_elsewhere


@pytest.fixture(autouse=True)
def unloaded(monkeypatch) -> None:
    """Fails the test if a command loads a model."""

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(open_runner, "load_backbone", fail)
    monkeypatch.setattr(open_runner, "load_backbone_of", fail)
    monkeypatch.setattr("shared.backbones.load_backbone", fail)


@pytest.mark.parametrize(
    "arguments",
    [
        ("image", "personalize", "t_lora", "subject.images=photos", "output=x.concept", "backbone="),
        ("image", "generate", "a mug", "--backbone", "", "--out", "x"),
        ("video", "personalize", "motion_director", "subject.clips=photos", "output=x.concept", "motion_adapter="),
        ("video", "generate", "a mug", "--motion-adapter", "", "--out", "x.mp4"),
        ("3d", "create", "dreamfusion", "prompt=a mug", "backbone=", "--out", "x"),
    ],
)
def test_an_empty_model_name_is_reported_as_empty(pcs, arguments, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, tmp_path / "photos")
    ran = pcs(*arguments)
    assert ran.code == 2 and "is empty (perhaps it was given as a shell variable that is not set)" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_a_concept_given_twice_is_refused_even_if_its_folder_was_copied(pcs, concepts, tmp_path):
    copied = shutil.copytree(concepts["mug"], tmp_path / "copy of mug.concept")
    for other in (concepts["mug"], copied):
        ran = pcs(
            "image", "generate", "a <mug>", "--concept", concepts["mug"], "--concept", other, "--out", tmp_path / "x"
        )
        assert ran.code == 2 and f"{other} are both called 'mug': give only one of them" in ran.err


def test_an_imported_concept_needs_a_valid_name(pcs, concepts, tmp_path):
    out = tmp_path / "My Múg!.concept"
    ran = pcs("concept", "import", concepts["rex"] / "adapter.safetensors", "--token", "sks dog", "--out", out)
    assert ran.code == 2 and f"--out {out}: a concept cannot be called 'My Múg!'" in ran.err


def test_an_asset_needs_a_prompt_that_names_only_its_concepts(pcs, concepts, tmp_path):
    for prompt, message in (("", "prompt is empty"), ("a <mug> and a <nope>", "names <nope>, which is not loaded")):
        asked = (
            "3d",
            "create",
            "dreamfusion",
            f"prompt={prompt}",
            "--concept",
            concepts["mug"],
            "--out",
            tmp_path / "x",
        )
        ran = pcs(*asked)
        assert ran.code == 2 and message in ran.err and "previews" not in ran.out


def test_a_box_outside_the_field_is_refused(pcs, tmp_path):
    box = ("guidance.regions.hat.kind=box", "guidance.regions.hat.lo=[5,5,5]", "guidance.regions.hat.hi=[6,6,6]")
    ran = pcs("3d", "create", "dreamfusion", "prompt=a mug", *box, "--out", tmp_path / "x")
    assert ran.code == 2 and "guidance.regions.hat: the box lies outside the field" in ran.err


def test_an_asset_from_pictures_needs_their_masks(pcs, photos, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(photos, bare, ignore=shutil.ignore_patterns("masks"))
    asked = [f"subject.images={bare}", "subject.class_noun=mug", "prompt=a photo of a mug", "--out", tmp_path / "x"]
    ran = pcs("3d", "create", "reference_reconstruction", *asked)
    assert ran.code == 2 and "needs masks, but" in ran.err and "put masks/NAME.png next to the pictures" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["bare"]


def test_generating_pictures_from_python_locks_the_folder_first(tmp_path: Path) -> None:
    unused: Any = None
    with locked_elsewhere(tmp_path / "out") as message, pytest.raises(ValueError, match=message):
        generate(unused, ["a mug"], PictureFolder(tmp_path / "out"))
