"""By default, pictures are generated with the steps, guidance and scheduler of the concept's recipe."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from PIL import Image

from pcs_image.runner import ImageRunner
from shared.backbones import load_backbone
from shared.cli import build, run
from shared.concept import read
from shared.sampling.settings import SamplingSettings

OWN = {"steps": 3, "guidance": 1.5, "scheduler": "dpm++"}


@pytest.fixture(scope="module")
def folder(learn, tmp_path_factory):
    """Learns two concepts. Returns the folder that contains both.

    The recipe of "rex" sets all three sampling settings; that of "max" sets only the steps.
    """
    out = tmp_path_factory.mktemp("own")
    for name, more in (
        ("rex", [f"sampling.{key}={value}" for key, value in OWN.items()]),
        ("max", ["sampling.steps=2"]),
    ):
        settings = (f"output={out / name}.concept", "preview.num=0", f"modifier.token={name}", *more)
        assert run(build(), learn("dreambooth_lora", *settings)) == 0
    return out


def used(folder: Any) -> dict[str, Any]:
    """Returns the sampling settings stored in a picture's metadata."""
    text = json.loads(Image.open(folder / "000-seed0.png").text["pcs"])  # type: ignore[attr-defined]
    return {key: text.get(key) for key in OWN}


def test_the_command_uses_the_sampling_settings_of_the_recipe(pcs, folder, tmp_path):
    command = ("image", "generate", "a photo of a <rex>", "--concept", folder / "rex.concept")
    assert pcs(*command, "--out", tmp_path / "own").code == 0
    assert used(tmp_path / "own") == OWN
    assert pcs(*command, "--steps", 2, "--guidance", 2, "--out", tmp_path / "given").code == 0
    assert used(tmp_path / "given") == {**OWN, "steps": 2, "guidance": 2.0}


def test_sampling_settings_come_from_the_first_concept_unless_a_motion_is_loaded(folder, tiny_folder, tmp_path):
    class AnyRunner(ImageRunner):
        uses_motions = True

    runner = AnyRunner(load_backbone(str(tiny_folder)))
    rex, max_ = (read(folder / f"{name}.concept") for name in ("rex", "max"))
    assert runner.with_own_sampling(SamplingSettings()) == SamplingSettings()
    runner.load(max_)
    runner.load(rex)
    found = runner.with_own_sampling(SamplingSettings(guidance=4.0))
    assert (found.steps, found.guidance, found.scheduler) == (2, 4.0, None)
    runner.unload("rex")
    shutil.copytree(rex.path, tmp_path / "rex.concept")
    file = tmp_path / "rex.concept" / "concept.json"
    file.write_text(file.read_text().replace('"kind": "subject"', '"kind": "motion"', 1))
    runner.load(read(tmp_path / "rex.concept"))
    assert runner.with_own_sampling(SamplingSettings()) == SamplingSettings(**OWN)
