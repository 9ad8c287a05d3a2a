"""Tests what `pcs toybox` refuses before it writes anything, and how it writes pictures in held-out styles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.cli import build, run
from shared.io.contact_sheets import read_metadata
from shared.io.decode import read_picture
from shared.io.read_subject import read_subject
from shared.toybox import captions, reference_sets, subjects, world
from shared.toybox.motions import reference_clips
from shared.toybox.motions.held_out import motion_names
from shared.toybox.render import render


@pytest.fixture
def toybox(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(build(), ["toybox", *map(str, arguments)])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@pytest.fixture
def refused(toybox, tmp_path: Path) -> Callable[..., str]:
    """Returns a function that runs a command and returns its error message.

    The command must exit with code 2 and write nothing.
    """

    def call(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = toybox(*arguments)
        assert (code, out) == (2, "") and err.splitlines()[-1].startswith("pcs: ") and "Traceback" not in err, err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return call


def test_a_sheet_does_not_replace_a_file_by_default(toybox, refused, tmp_path: Path) -> None:
    keep = tmp_path / "keep.png"
    keep.write_text("mine")
    assert "keep.png already exists" in refused("sheet", keep, "--rows", 1)
    assert keep.read_text() == "mine"
    assert toybox("sheet", keep, "--rows", 1, "--columns", 2, "--overwrite")[0] == 0
    assert Image.open(keep).width > 200
    assert "is a folder; give the path of a file" in refused("sheet", tmp_path)
    assert "its name must end in .png" in refused("sheet", tmp_path / "sheet.txt")


def test_options_that_only_the_model_uses_are_refused_with_other_sources(refused, tmp_path: Path) -> None:
    for source in ("world", "vae"):
        message = refused("sheet", tmp_path / "a.png", "--source", source, "--prompt", "a duck", "--guidance", 0)
        assert f"--prompt and --guidance cannot be used with --source {source}, only with --source model" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sheet", "a.png", "--rows", 10_000, "--columns", 10_000), "that makes 100,000,000 pictures"),
        (("motions", "a.png", "--rows", 10_000), "--rows 10000 --columns 8: "),
        (("sheet", "a.png", "--source", "model", "--guidance", "1e300"), "1e300 is not a number between -1000 and 1000"),
        (("evaluate", "--guidance", "nan"), "nan is not a number between -1000 and 1000"),
        (("evaluate-clips", "--guidance", "inf"), "inf is not a number between -1000 and 1000"),
        (("evaluate-clips", "--work", "w", "--motion-adapter", "m"), "--work and --motion-adapter both name the motion module"),
        (("evaluate-clips", "--motion-adapter", "."), "--motion-adapter .: not a folder of a diffusers MotionAdapter"),
        (("curve", "--guidance", "1e300"), "1e300 is not a number between -1000 and 1000"),
        (("train", "unet", "--lr", "1e300"), "1e300 is not a number between 0 and 100"),
        (("train", "unet", "--lr", "nan"), "nan is not a number between 0 and 100"),
        (("train", "unet", "--minutes", "nan"), "nan is not a number between 0 and 1e+06"),
        (("train", "unet", "--minutes", "-1"), "-1 is not a number between 0"),
    ],
)  # fmt: skip
def test_invalid_options_are_refused_before_any_work_is_done(
    toybox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = toybox(*arguments)
    assert (code, out) == (2, "") and message in " ".join(error.split())
    assert list(tmp_path.iterdir()) == []


def test_guidance_0_is_not_replaced_by_the_default(toybox, tmp_path: Path) -> None:
    sheet = ("--source", "model", "--rows", 1, "--columns", 1, "--prompt", "a photo of a red duck on the beach")
    for name, guidance in (("stated", ()), ("none", ("--guidance", 0))):
        assert toybox("sheet", tmp_path / f"{name}.png", *sheet, *guidance)[0] == 0
    stated, none = (np.asarray(Image.open(tmp_path / f"{n}.png")).astype(float) for n in ("stated", "none"))
    assert np.abs(stated - none).mean() > 1


def test_a_folder_that_is_not_a_backbone_is_refused(refused, tmp_path: Path) -> None:
    evaluate = ("evaluate", "--out", tmp_path / "figures.json", "--backbone")
    assert f"--backbone '{tmp_path}/nope' is not a diffusers folder" in refused(*evaluate, tmp_path / "nope")
    (tmp_path / "model").mkdir()
    assert "it has no model_index.json" in refused(*evaluate, tmp_path / "model")
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "cannot be loaded: it is a FluxPipeline" in refused(*evaluate, tmp_path / "model")
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "cannot be loaded" in refused(*evaluate, tmp_path / "model")
    (tmp_path / "figures.json").write_text("mine")
    assert "figures.json already exists" in refused("evaluate", "--out", tmp_path / "figures.json")
    assert "dpm++" in refused("evaluate", "--scheduler", "dpmpp")


def test_an_output_inside_a_folder_that_is_read_is_refused(refused, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shared.toybox.weights.WEIGHTS", tmp_path)
    model = tmp_path / "backbone"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    for arguments in (
        ("evaluate", "--backbone", model, "--out", model / "model_index.json"),
        ("evaluate", "--out", model / "a.json"),
        ("evaluate-clips", "--backbone", model, "--motion-adapter", ".", "--out", model / "a.json"),
        ("evaluate-clips", "--motion-adapter", model, "--backbone", ".", "--out", model / "a.json"),
        ("evaluate-clips", "--work", model, "--backbone", ".", "--out", model / "a.json"),
        ("sheet", model / "a.png", "--source", "vae", "--rows", 1),
    ):
        assert f"{model}, which is an input" in refused(*arguments, "--overwrite")


def test_references_are_not_drawn_if_they_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("something was drawn")

    monkeypatch.setattr(reference_sets, "render", unexpected)
    monkeypatch.setattr(reference_clips, "sample_moving", unexpected)
    (tmp_path / "mine.txt").write_text("mine")
    for write, name in (
        (reference_sets.write_album, "development-duck"),
        (reference_sets.write_style, "development-thermal"),
        (reference_clips.write_motion, "development-zigzag"),
    ):
        with pytest.raises(ValueError, match="already exists and contains 1 file"):
            write(name, tmp_path)


def test_training_refuses_a_broken_link_and_a_folder_with_other_files(refused, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"mine")
    (tmp_path / "gone").symlink_to(tmp_path / "unplugged")
    train = ("train", "data", "--pictures", 64, "--work")
    assert f"{tmp_path / 'gone'} is a link to {tmp_path / 'unplugged'}" in refused(*train, tmp_path / "gone")
    assert "photos already exists and contains 1 file, but no training" in refused(*train, tmp_path / "photos")


def test_training_checks_the_device_before_it_writes_anything(refused, tmp_path: Path) -> None:
    for device in ("gpu", "tpu7", "cuda:99"):
        message = refused("train", "vae", "--work", tmp_path / "work", "--device", device)
        assert f"--device '{device}' cannot be used here" in message and "Available: cpu" in message


def test_the_list_of_subjects_contains_things_faces_styles_and_motions(toybox, refused) -> None:
    listed = [line.split()[0] for line in toybox("subjects")[1].splitlines()]
    for split in ("development", "reporting"):
        held = {h.name for h in (*subjects.subjects(split), *subjects.faces(split))}
        held |= {f"{split}-{style.replace(' ', '-')}" for style in subjects.styles(split)}
        assert len(held) == 20 and held <= set(listed)
    assert set(motion_names()) <= set(listed)
    assert len(listed) == 40 + len(motion_names()) == 52
    message = refused("subjects", "development-stained-glas")
    assert "Did you mean 'development-stained-glass'?" in message and "reporting-duck" in message


@pytest.mark.parametrize("name", list(subjects.style_names()))
def test_a_style_is_shown_on_a_different_thing_in_each_picture(name: str) -> None:
    scenes = subjects.style_scenes(name, 8, 3)
    assert scenes == subjects.style_scenes(name, 8, 3) != subjects.style_scenes(name, 8, 4)
    assert {s.style for s in scenes} == {subjects.style_names()[name]}
    assert len({s.things[0].class_name for s in scenes}) == len({s.background for s in scenes}) == 8
    assert all(t.pattern_seed is None and t.accessory == "none" for s in scenes for t in s.things)
    assert torch.isfinite(render(scenes).pixels).all()


def test_a_style_is_written_as_a_folder_of_captioned_pictures(toybox, refused, tmp_path: Path) -> None:
    out, name = tmp_path / "glass", "development-stained-glass"
    code, output, _ = toybox("subjects", name, "--out", out, "--num", 4)
    assert code == 0 and output.split() == [f"{out}/{i:02d}.png" for i in range(4)]
    scenes = subjects.style_scenes(name, 4, 0)
    subject = read_subject(out)
    assert len(subject.images) == len(subject.captions) == 4
    for scene, path, drawn in zip(scenes, subject.images, render(scenes).pixels, strict=True):
        assert read_metadata(path) == {"toybox-style": name}
        assert (read_picture(path).pixels - (drawn * 2 - 1)).abs().max() < 0.01
        text = subject.captions[path]
        assert text.startswith(f"a {scene.things[0].class_name} ") and scene.style not in text
        assert captions.background_phrase(scene.background) in text
    assert "already exists" in refused("subjects", name, "--out", out)
    assert toybox("subjects", name, "--out", out, "--num", 2, "--overwrite")[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["00.png", "00.txt", "01.png", "01.txt"]


def test_a_style_is_shown_only_on_things_that_occur_in_training() -> None:
    train = {world.identity_of(seed) for seed in world.SEEDS["train"]}
    for name in subjects.style_names():
        things = [t for s in subjects.style_scenes(name, 26, 0) for t in s.things]
        assert all(t.identity is None or t.identity in train for t in things)
