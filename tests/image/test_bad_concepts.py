"""A missing, damaged, hostile or unsuitable concept gives one clear error message, and nothing in it is executed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.image.refusing import refusing


@pytest.fixture
def refused(pcs, tmp_path) -> Callable[..., str]:
    return refusing(pcs, tmp_path)


# --- concepts --------------------------------------------------------------------------------


def test_a_folder_without_a_concept_is_refused(refused, tmp_path):
    generate = ("image", "generate", "a <x>", "--out", tmp_path / "o", "--concept")
    assert "does not exist: a concept is a folder" in refused(*generate, tmp_path / "x.concept")
    (tmp_path / "x.concept").mkdir()
    assert "is not a concept: it has no concept.json" in refused(*generate, tmp_path / "x.concept")
    assert "is not a concept" in refused("concept", "show", tmp_path / "x.concept")


def test_a_concept_from_an_incompatible_model_is_refused(refused, concepts, make_tiny_sd, make_tiny_flux, tmp_path):
    from diffusers import UNet2DConditionModel

    pipe = make_tiny_sd()
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "down_block_types": blocks})
    pipe.save_pretrained(tmp_path / "other")
    make_tiny_flux().save_pretrained(tmp_path / "flux")
    generate = ("image", "generate", "a <mug>", "--concept", concepts["mug"], "--out", tmp_path / "o", "--backbone")
    message = refused(*generate, tmp_path / "other")
    assert (
        "'mug' does not fit" in message
        and "layers of unet that it changes do not exist here (for example, down_blocks.0" in message
    )
    message = refused(*generate, tmp_path / "flux")
    assert "learned on stable_diffusion" in message and "this backbone is flux" in message


def _described(concepts, tmp_path, change) -> Path:
    folder = tmp_path / "mug.concept"
    shutil.copytree(concepts["mug"], folder)
    meta = json.loads((folder / "concept.json").read_text())
    change(meta)
    (folder / "concept.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["recipe"].update(sampling=True), "recipe.sampling"),
        (lambda m: m["recipe"]["sampling"].update(steps="x"), "recipe.sampling.steps = 'x'"),
        (lambda m: m["metrics"].update(training_seconds=float("nan")), "metrics.training_seconds = nan"),
        (
            lambda m: m.update(schema_version=1),
            "has schema 1: it was made by an older version of pcs; learn the concept again",
        ),
    ],
    ids=["sampling", "steps", "metrics", "older"],
)
def test_an_unusable_description_is_reported_before_anything_else(
    refused, concepts, tiny_folder, tmp_path, change, message
):
    folder = _described(concepts, tmp_path, change)
    for command in (
        ("image", "generate", "a <mug>", "--concept", folder, "--out", tmp_path / "o", "--backbone", tiny_folder),
        ("image", "evaluate", "--concept", folder, "--out", tmp_path / "o", "--backbone", tiny_folder),
        ("concept", "show", folder),
    ):
        error = refused(*command)
        assert f"{folder / 'concept.json'}" in error and message in error


def test_a_model_named_by_an_untrusted_concept_is_not_downloaded(refused, concepts, tmp_path, monkeypatch):
    import huggingface_hub

    for call in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, call, lambda *a, **k: pytest.fail("a model was requested from the hub"))
    folder = _described(concepts, tmp_path, lambda m: m["backbone"].update(name="owner/name", checkpoint="another"))
    message = refused("image", "generate", "a <mug>", "--concept", folder, "--out", tmp_path / "o")
    assert "'mug' was learned on owner/name" in message and "--backbone PATH" in message


def test_two_concepts_that_use_the_same_words_are_refused(refused, concepts, tiny_folder, tmp_path):
    twin = tmp_path / "twin.concept"
    shutil.copytree(concepts["rex"], twin)
    meta = json.loads((twin / "concept.json").read_text())
    (twin / "concept.json").write_text(json.dumps({**meta, "name": "twin"}))
    both = ("--concept", concepts["rex"], "--concept", twin, "--backbone", tiny_folder)
    message = refused("image", "generate", "a <rex> and a <twin>", *both, "--out", tmp_path / "o")
    assert "'twin' and 'rex' cannot be loaded together" in message and "'sks dog' and 'sks dog'" in message


def test_an_invalid_concept_name_is_refused_before_training(tiny_sd, photos, tmp_path):
    from pcs_image.runner import Runner
    from shared.backbones.stable_diffusion import StableDiffusionBackbone
    from shared.io.read_subject import read_subject
    from shared.recipe.resolve import load

    runner = Runner(StableDiffusionBackbone(tiny_sd, "tiny"))
    with pytest.raises(ValueError, match="cannot be called 'my mug'"):
        runner.personalize({"my mug": read_subject(photos, "mug")}, load("textual_inversion"), tmp_path / "work")
    assert not (tmp_path / "work").exists()


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.mark}",)


def _cut(folder: Path, mark: Path) -> None:
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _changed(folder: Path, mark: Path) -> None:
    file = folder / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-10] ^= 255
    file.write_bytes(bytes(data))


def _lying(folder: Path, mark: Path) -> None:
    (folder / "adapter.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def _pickle_as_tensors(folder: Path, mark: Path) -> None:
    (folder / "adapter.safetensors").write_bytes(pickle.dumps(Evil(mark)))


def _pickle_beside(folder: Path, mark: Path) -> None:
    (folder / "extra.pt").write_bytes(pickle.dumps(Evil(mark)))


def _yaml(folder: Path, mark: Path) -> None:
    (folder / "recipe.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {mark}']")


def _json(folder: Path, mark: Path) -> None:
    (folder / "concept.json").write_text((folder / "concept.json").read_text()[:200])


def _way_out(folder: Path, mark: Path) -> None:
    meta = json.loads((folder / "concept.json").read_text())
    meta["files"]["../../secret.safetensors"] = meta["files"].pop("adapter.safetensors")
    (folder / "concept.json").write_text(json.dumps(meta))


def _other_shape(folder: Path, mark: Path) -> None:
    from shared.io.checksums import sha256

    save_file({"lora.unet.x": torch.zeros(3)}, folder / "adapter.safetensors")
    meta = json.loads((folder / "concept.json").read_text())
    meta["files"]["adapter.safetensors"] = sha256(folder / "adapter.safetensors")
    (folder / "concept.json").write_text(json.dumps(meta))


def _missing(folder: Path, mark: Path) -> None:
    (folder / "embeddings.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_cut, "adapter.safetensors is damaged"),
        (_changed, "adapter.safetensors is not the file that concept.json describes"),
        (_lying, "adapter.safetensors is truncated, or not a safetensors file"),
        (_pickle_as_tensors, "adapter.safetensors is truncated, or not a safetensors file"),
        (_pickle_beside, "extra.pt can contain code (.pt)"),
        (_yaml, "recipe.yaml is YAML with tags"),
        (_json, "concept.json is damaged: it is not readable JSON"),
        (_way_out, "../../secret.safetensors"),
        (_other_shape, "adapter_id does not match the tensors"),
        (_missing, "embeddings.safetensors is missing"),
    ],
)
def test_a_damaged_or_hostile_concept_is_refused(refused, concepts, tmp_path, harm, message):
    folder, mark = tmp_path / "mug.concept", tmp_path / "mark"
    shutil.copytree(concepts["mug"], folder)
    harm(folder, mark)
    for arguments in (
        ("image", "generate", "a <mug>", "--concept", folder, "--out", tmp_path / "o"),
        ("concept", "show", folder),
    ):
        assert message in refused(*arguments)
    assert not mark.exists()
