"""A recipe's default strength schedule is stored in the concept, used for generation, and can be overridden."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from pcs_image.runner import ImageRunner
from shared.backbones import load_backbone
from shared.concept import read
from shared.recipe.resolve import load
from shared.sampling.hooks import StrengthSchedule
from shared.sampling.settings import SamplingSettings

PROMPT = "a photo of a <rex> on the beach"


@pytest.fixture(scope="module")
def late(learn, tmp_path_factory):
    """Learns a concept whose recipe switches it off during the first half of the sampling steps."""
    from shared.cli import build, run

    path = tmp_path_factory.mktemp("own") / "rex.concept"
    settings = (f"output={path}", "trainable.lora.lr=0.05", "sampling.strength=0@0,1@0.5", "preview.num=0")
    assert run(build(), learn("dreambooth_lora", *settings)) == 0
    return path


@pytest.fixture
def runner(late, tiny_folder):
    out = ImageRunner(load_backbone(str(tiny_folder)))
    out.load(read(late))
    return out


def test_pictures_use_the_default_schedule_unless_another_is_given(runner):
    def made(*hooks: str, **how) -> torch.Tensor:
        parsed = tuple(StrengthSchedule.parse(h) for h in hooks)
        return runner.generate([PROMPT], [0], SamplingSettings(steps=4, hooks=parsed), **how)

    own, said = made(), made("rex=0@0,1@0.5")
    assert torch.equal(own, said) and not torch.equal(own, made("rex=1@0"))
    runner.backbone.set_strength("rex", 0.5)
    assert torch.equal(made(), made("rex=0@0,0.5@0.5")) and not torch.equal(made(), own)
    base = runner.generate([PROMPT], [0], SamplingSettings(steps=4), base=True)
    runner.unload("rex")
    assert torch.equal(base, runner.generate(["a photo of a mug on the beach"], [0], SamplingSettings(steps=4)))


def test_picture_metadata_contains_the_schedule(pcs, late, tmp_path):
    command = ("image", "generate", PROMPT, "--concept", late, "--steps", 2)
    for name, options in (("own", ()), ("said", ("--strength", "rex=1@0"))):
        assert pcs(*command, *options, "--out", tmp_path / name).code == 0
    texts = {n: json.loads(Image.open(tmp_path / n / "000-seed0.png").text["pcs"]) for n in ("own", "said")}  # type: ignore[attr-defined]
    assert [h["strengths"] for h in texts["own"]["hooks"]] == [{"rex": {"0.0": 0.0, "0.5": 1.0}}]
    assert [h["strengths"] for h in texts["said"]["hooks"]] == [{"rex": {"0.0": 1.0}}]


def test_validation_pictures_use_the_default_schedule(tiny_folder, photos, tmp_path, monkeypatch):
    from shared.io.read_subject import read_subject

    seen = []
    make = ImageRunner.make

    def watched(self, prompts, seeds, settings, progress=None):
        seen.append(settings.hooks)
        return make(self, prompts, seeds, settings, progress)

    monkeypatch.setattr(ImageRunner, "make", watched)
    small = ("train.steps=1", "train.resolution=32", "sampling.steps=2", "train.validation.every=1")
    recipe = load("dreambooth_lora_dop", [f"backbone={tiny_folder}", *small, "sampling.strength=0@0,1@0.5"])
    runner = ImageRunner(load_backbone(str(tiny_folder)))
    runner.personalize({"rex": read_subject(photos, "mug")}, recipe, tmp_path / "run", tensorboard=False)
    assert [h.strengths for hooks in seen for h in hooks] == [{"rex": {0.0: 0.0, 0.5: 1.0}}]


def test_an_invalid_strength_schedule_is_reported(late, tmp_path):
    with pytest.raises(ValueError, match=r"sampling\.strength.*'1@2' is not a strength schedule; write"):
        load("dreambooth_lora", ["sampling.strength=1@2"])
    import shutil

    shutil.copytree(late, tmp_path / "bad.concept")
    file = tmp_path / "bad.concept" / "concept.json"
    file.write_text(file.read_text().replace("0@0,1@0.5", "0@zero"))
    with pytest.raises(ValueError, match=r"recipe\.sampling\.strength"):
        read(tmp_path / "bad.concept")
