"""The model that a concept was learned on is found again, and `pcs concept show` prints the training steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.backbones import load_backbone
from shared.cli import build, run
from shared.concept import Provenance, capture, lines, load_backbone_of, read, save
from shared.modifiers import LearnableToken
from shared.recipe.resolve import load
from shared.recipe.schema import dump


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PCS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def learned(backbone: Any, **fields: Any) -> Any:
    modifier = LearnableToken()
    modifier.attach(backbone, "x", "mug")
    return capture(backbone, "x", Provenance(class_noun="mug", modifier=modifier, **fields))


def test_a_model_given_by_a_relative_path_is_found_from_another_folder(
    tiny_sd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_sd.save_pretrained(tmp_path / "here" / "sd")
    monkeypatch.chdir(tmp_path / "here")
    recipe = {"method": "x", "backbone": "./sd"}
    concept = read(save(learned(load_backbone("./sd"), recipe=recipe), tmp_path / "x.concept").path or "")
    assert concept.meta.backbone.name == concept.meta.recipe["backbone"] == "sd"
    assert str(tmp_path) not in (tmp_path / "x.concept" / "concept.json").read_text(), (
        "a concept may be shared, so it must contain no local path"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_backbone_of(concept).checkpoint == concept.meta.backbone.checkpoint


def test_a_moved_model_needs_to_be_located_only_once(
    tiny_sd: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    tiny_sd.save_pretrained(tmp_path / "sd")
    concept = save(learned(load_backbone(tmp_path / "sd")), tmp_path / "x.concept")
    shutil.move(tmp_path / "sd", tmp_path / "moved")
    asked = r"the concept 'x' was learned on sd \(stable_diffusion\), and that model is not known on this machine\..*--backbone"
    with pytest.raises(ValueError, match=asked):
        load_backbone_of(concept)
    arguments = ["concept", "export", str(tmp_path / "x.concept"), "--out", str(tmp_path / "out")]
    assert run(build(), arguments) == 2 and not (tmp_path / "out").exists()
    assert "the concept 'x' was learned on" in capsys.readouterr().err
    assert load_backbone_of(concept, str(tmp_path / "moved")).checkpoint == concept.meta.backbone.checkpoint
    assert run(build(), arguments) == 0, "the new path was not remembered"


def test_a_damaged_or_unwritable_index_is_not_an_error(
    tiny_sd: Any, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_sd.save_pretrained(tmp_path / "sd")
    own_cache.mkdir()
    for text in ("{", "[]", '{"a": 1}', "\xff"):
        (own_cache / "models.json").write_text(text, encoding="latin-1")
        concept = learned(load_backbone(tmp_path / "sd"))
        assert load_backbone_of(concept).name == str(tmp_path / "sd")
    file = tmp_path / "a file"
    file.write_text("a file where the cache folder should be")
    monkeypatch.setenv("PCS_CACHE", str(file / "cache"))
    concept = learned(load_backbone(tmp_path / "sd"))
    with pytest.raises(ValueError, match="not known on this machine"):
        load_backbone_of(concept)


def test_a_model_that_a_concept_names_is_never_downloaded(
    new_sd: Callable[..., Any], tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client is replaced by one that fails the test, because no concept may cause a download."""
    import huggingface_hub

    for call in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, call, lambda *a, **k: pytest.fail("the hub was asked for a model"))
    backbone = new_sd()
    for name in ("owner/name", "nowhere", "https://example.org/model", "more"):
        backbone.name = name if name != "more" else "owner/name/more"  # a path, because hub names have only one slash
        concept = learned(backbone)
        backbone.remove("x")
        with pytest.raises(ValueError, match=rf"learned on {name} .*not known on this machine.*--backbone PATH"):
            load_backbone_of(concept)


def test_a_folder_with_only_half_precision_files_loads(tiny_sd: Any, tmp_path: Path) -> None:
    tiny_sd.save_pretrained(tmp_path / "both")
    tiny_sd.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half" / "unet").glob("diffusion_pytorch_model.safetensors"))
    half, whole = load_backbone(tmp_path / "half"), load_backbone(tmp_path / "both")
    assert half.checkpoint == whole.checkpoint and half.dtype == torch.float32
    shutil.copytree(tmp_path / "both" / "vae", tmp_path / "half" / "vae", dirs_exist_ok=True)
    assert load_backbone(tmp_path / "half").checkpoint == whole.checkpoint, (
        "the additional full-precision files of the VAE changed the identity"
    )


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        (
            load("pivotal_tuning", ["train.batch_size=3", "phases.pivot.train.steps=20", "phases.tune.train.steps=25"]),
            "pivotal_tuning, pivot 20 steps then tune 25 steps, batch 3",
        ),
        (load("textual_inversion", ["train.steps=7"]), "textual_inversion, 7 steps, batch 4"),
        (
            {"method": "m", "train": {"steps": 5}, "phases": {"a": {}, "b": {"train": {"steps": 2}}}},
            "m, a 5 steps then b 2 steps",
        ),
        ({"method": "m", "phases": {"a": None}}, "m, a"),
    ],
    ids=["phases", "plain", "a phase without its own steps", "no steps stated"],
)
def test_steps_are_shown_for_each_phase(new_sd: Callable[..., Any], recipe: Any, steps: str) -> None:
    plain = recipe if isinstance(recipe, dict) else dump(recipe)
    shown_lines = lines(learned(new_sd(), recipe=plain))
    assert next(line for line in shown_lines if line.startswith("recipe")).removeprefix("recipe").strip() == steps
