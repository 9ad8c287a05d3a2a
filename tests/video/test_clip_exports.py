"""Subjects and motions work together, in `VideoRunner` and as exports that diffusers' AnimateDiffPipeline loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_video.backbones.animatediff import AnimateDiffBackbone
from pcs_video.backbones.open_motion import with_motion_adapter
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.backbones import load_backbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.cli import build, run
from shared.concept import Concept, Provenance, capture, read, save
from shared.concept.export_formats import export
from shared.modifiers import PlainText
from shared.recipe.resolve import load
from shared.sampling.hooks import StrengthSchedule
from shared.sampling.sampler import sample
from shared.sampling.settings import SamplingSettings
from shared.trainable.lora import Lora
from tests.video.clip_models import build_animatediff

SETTINGS = SamplingSettings("", 4.0, 3, height=32, width=32, frames=4)
ROLES = {
    "mug": ("cross_attention", "self_attention"),
    "dog": ("cross_attention",),
    "spin": ("temporal_attention", "temporal_feed_forward"),  # as in motion_director
    "hop": ("temporal_attention",),
}


def learned(backbone: Any, name: str, folder: Path, kind: str = "subject", recipe: Any = None) -> Concept:
    """Saves a concept with a random LoRA, removes it from the backbone, and returns the concept read from disk."""
    noun = name if kind == "subject" else ""
    PlainText().attach(backbone, name, noun)
    group = Lora(roles=ROLES[name], rank=2, alpha=2).inject(backbone, name, "lora", 0)
    draw = torch.Generator().manual_seed(len(name) + sum(name.encode()))
    for parameter in group.parameters:
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=draw)
    provenance = Provenance(class_noun=noun, kind=kind, modifier=PlainText(), recipe=recipe)
    concept = capture(backbone, name, provenance)
    backbone.remove(name)
    return read(save(concept, folder / f"{name}.concept").path)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def concepts(make_tiny_sd: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Concept]:
    """Returns two subjects learned on the image U-Net and two motions learned on motion modules."""
    folder = tmp_path_factory.mktemp("concepts")
    pictures = StableDiffusionBackbone(make_tiny_sd(), "tiny")
    clips = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
    made = {name: learned(pictures, name, folder) for name in ("mug", "dog")}
    return {**made, "spin": learned(clips, "spin", folder, "motion"), "hop": learned(clips, "hop", folder, "motion")}


def test_two_subjects_and_a_motion_take_effect_in_one_clip(concepts: dict[str, Concept], make_tiny_sd: Any) -> None:
    runner = VideoRunner(AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny"))
    names = ("mug", "dog", "spin")
    for name in names:
        runner.load(concepts[name])

    def ask(**strengths: float) -> Tensor:
        for name in names:
            runner.backbone.set_strength(name, strengths.get(name, 1.0))
        return runner.generate(["a <mug> and a <dog> <spin>"], [3], SETTINGS)

    together = ask()
    for name in names:
        assert (ask(**{name: 0.0}) - together).abs().max() > 1e-3, name
    assert torch.equal(ask(), together)
    with pytest.raises(ValueError, match="dog"):  # prompts must name all loaded subjects, but motions are optional
        runner.generate(["a <mug>"], [3], SETTINGS)
    two = {"spin": 0.5}
    assert (ask(**two) - together).abs().max() > 1e-3


def test_two_motions_add_up(concepts: dict[str, Concept], make_tiny_sd: Any) -> None:
    """Each motion takes effect at its own strength, even if the prompt does not name it.

    The order of loading does not matter, and a motion cannot be loaded twice.
    """

    def made(**strengths: float) -> Tensor:
        runner = VideoRunner(AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny"))
        for name, strength in strengths.items():
            runner.load(concepts[name], strength)
        with pytest.raises(ValueError, match="is already attached"):
            runner.load(concepts["spin"])
        return runner.generate(["a mug"], [3], SETTINGS)

    both, spin = made(spin=1.0, hop=0.5), made(spin=1.0)
    torch.testing.assert_close(both, made(hop=0.5, spin=1.0), atol=1e-4, rtol=0)
    assert torch.equal(made(spin=1.0, hop=0.0), spin) and (both - spin).abs().max() > 1e-3
    assert (both - made(spin=0.0, hop=0.5)).abs().max() > 1e-3


def test_a_subject_is_weaker_in_the_first_steps_which_determine_the_motion(
    concepts: dict[str, Concept], make_tiny_sd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The concept's recipe sets a strength for each step, as in CustomCrafter, unless an explicit schedule is given."""
    settings = ["sampling.strength=0.4@0,0.8@0.1", "subject.images=photos", "output=mug.concept", "backbone=tiny"]
    recipe = load("subject_lora", settings, "video", VideoRecipe)
    pictures = StableDiffusionBackbone(make_tiny_sd(), "tiny")
    own = learned(pictures, "mug", tmp_path, recipe=recipe)
    runner = VideoRunner(AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny"))
    runner.load(own)
    runner.load(concepts["spin"])
    seen: list[float] = []
    predict = runner.backbone.predict_guided

    def watched(*arguments: Any) -> Tensor:
        seen.append(runner.backbone.strengths["mug"])
        return predict(*arguments)

    monkeypatch.setattr(runner.backbone, "predict_guided", watched)

    def made(*hooks: Any) -> Tensor:
        seen.clear()
        how = SamplingSettings("", 1.0, 10, height=32, width=32, frames=2, hooks=hooks)
        return runner.generate(["a <mug>"], [3], how)

    plain = made()
    assert seen == [0.4, *[0.8] * 9] and runner.backbone.strengths == {"mug": 1.0, "spin": 1.0}
    assert torch.equal(plain, made(StrengthSchedule.parse("mug=0.4@0,0.8@0.1")))
    assert not torch.equal(plain, made(StrengthSchedule.parse("mug=1@0"))) and seen == [1.0] * 10


@torch.no_grad()
def test_diffusers_loads_a_motion_alongside_a_subject(
    concepts: dict[str, Concept], make_tiny_sd: Any, tmp_path: Path
) -> None:
    clips = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
    pictures = StableDiffusionBackbone(make_tiny_sd(), "tiny")
    reports = {
        "mug": export(concepts["mug"], tmp_path / "mug", backbone=pictures),
        "spin": export(concepts["spin"], tmp_path / "spin", backbone=clips),
    }
    assert any(".ff.net." in layer for layers in concepts["spin"].meta.layers.values() for layer in layers)
    runner = VideoRunner(clips)
    for name, strength in (("mug", 1.0), ("spin", 0.7)):
        runner.load(concepts[name], strength)
    ours = sample(clips, ["a mug on a table"], seeds=[3], settings=SETTINGS)
    runner.unload("mug")
    runner.unload("spin")
    plain = sample(clips, ["a mug on a table"], seeds=[3], settings=SETTINGS)
    pipe = clips.pipeline()
    pipe.set_progress_bar_config(disable=True)
    for name, report in reports.items():
        (file,) = report["lora"]["files"]
        pipe.load_lora_weights(str(tmp_path / name), weight_name=file, adapter_name=name)
    pipe.set_adapters(["mug", "spin"], [1.0, 0.7])
    frames = pipe(
        "a mug on a table", 4, 32, 32, 3, 4.0, negative_prompt="", output_type="pt",
        generator=[torch.Generator().manual_seed(3)],
    ).frames  # fmt: skip
    theirs = torch.as_tensor(frames).transpose(1, 2).float() * 2 - 1
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
    assert (ours - plain).abs().max() > 0.01


def test_a_motion_is_exported_with_its_motion_adapter_and_the_code_in_the_readme_loads_both(
    picture_model: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = with_motion_adapter(load_backbone(picture_model), adapter_folder)
    learned(backbone, "spin", tmp_path, "motion")
    command = ["concept", "export", str(tmp_path / "spin.concept"), "--backbone", str(picture_model)]
    assert run(build(), [*command, "--out", str(tmp_path / "without")]) == 2
    assert "give motion_adapter=FOLDER (--motion-adapter)" in capsys.readouterr().err
    added, out = ["--motion-adapter", str(adapter_folder)], tmp_path / "out"
    assert run(build(), [*command, *added, "--out", str(out)]) == 0
    text = (out / "README.txt").read_text()
    assert "{motion_adapter} with the folder of the MotionAdapter" in text and str(tmp_path) not in text
    code = "\n".join(re.findall(r"^    (.*)$", text, re.M))
    for name, folder in {"folder": out, "model": picture_model, "motion_adapter": adapter_folder}.items():
        code = code.replace(f"{{{name}}}", str(folder))
    *load, _, use = code.splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(load), names)  # safe, because these lines come from our own template
    assert use == "export_to_video(pipe(\"a photo of a mug\").frames[0], 'clip.mp4')"
    (name,) = names["pipe"].unet.peft_config
    theirs = names["pipe"].unet.state_dict()
    key = next(
        k for k in theirs if k.endswith(f"motion_modules.0.transformer_blocks.0.attn1.to_q.lora_A.{name}.weight")
    )
    ours = read(tmp_path / "spin.concept").tensors["adapter"]
    assert any(torch.equal(theirs[key], tensor) for tensor in ours.values())


def test_a_concept_learned_on_pictures_cannot_be_exported_with_a_motion_adapter(
    concepts: dict[str, Concept], adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["concept", "export", str(concepts["mug"].path), "--motion-adapter", str(adapter_folder)]
    assert run(build(), [*command, "--out", str(tmp_path / "out")]) == 2
    assert "a concept learned on stable_diffusion has no motion module" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
