"""Incomplete model folders of backbones and instruments are refused. The error names the file and the key."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.backbones import load_backbone
from shared.backbones.load import check_filled
from shared.metrics.encoders import load_clip, load_dino
from shared.toybox.evaluators.clip import load_clip as load_toybox_clip
from shared.toybox.evaluators.convnet import WEIGHTS
from shared.toybox.evaluators.identity import load_identity
from shared.toybox.evaluators.recognizer import load_recognizer
from tests.conftest import build_clip_tokenizer


@pytest.fixture(scope="session")
def saved(tmp_path_factory, make_tiny_sd, make_tiny_flux) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    make_tiny_sd().save_pretrained(root / "sd")
    make_tiny_flux().save_pretrained(root / "flux")
    make_tiny_flux().save_pretrained(root / "shards", max_shard_size="40KB")
    make_tiny_sd().to(torch.float16).save_pretrained(root / "half", variant="fp16")
    return {p.name: p for p in root.iterdir()}


@pytest.fixture
def folder(saved, tmp_path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(saved[name], tmp_path / name))


def edit(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    """Changes a file's tensors. Returns the key that came first alphabetically before the change."""
    tensors = load_file(file)
    first = min(tensors)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return first


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[min(tensors)]


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)] = torch.zeros(3)


PARTS = [("sd", "unet"), ("sd", "text_encoder"), ("sd", "vae"), ("half", "unet"), ("half", "text_encoder")]
PARTS += [("flux", part) for part in ("transformer", "text_encoder", "text_encoder_2", "vae")]


def tail(key: str) -> str:
    """Returns a pattern that matches the key as transformers names it, without the prefix found in older files."""
    return key.removeprefix("text_model.").replace(".", r"\.")


@pytest.mark.parametrize(("model", "part"), PARTS)
def test_a_key_that_is_missing_or_has_the_wrong_shape_is_named(folder, model, part):
    root = folder(model)
    file = next((root / part).glob("*.safetensors"))
    key = edit(file, reshape)
    with pytest.raises(ValueError, match=rf"{part}/{file.name}.*{tail(key)} is \[3\]"):
        load_backbone(root)
    edit(file, drop)
    with pytest.raises(ValueError, match=rf"{part}/{file.name} lacks .*{tail(key)}"):
        load_backbone(root)


def test_missing_weights_are_not_filled_with_random_numbers(folder):
    root = folder("sd")
    for part in ("text_encoder", "unet", "vae"):
        file = next((root / part).glob("*.safetensors"))
        kept = file.read_bytes()
        edit(file, lambda tensors: tensors.update({f"other.{k}": tensors.pop(k) for k in list(tensors)}))
        with pytest.raises(ValueError, match=rf"{part}/.* lacks .* and \d+ more keys"):
            load_backbone(root)
        file.write_bytes(kept)
    load_backbone(root)


def test_an_unexpected_key_causes_a_warning_unless_it_is_known_to_be_harmless(folder):
    root = folder("sd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_backbone(root)
        edit(
            root / "text_encoder" / "model.safetensors",
            lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(32)}),
        )
        load_backbone(root)
    edit(root / "unet" / "diffusion_pytorch_model.safetensors", lambda t: t.update({"extra.weight": torch.zeros(2)}))
    with pytest.warns(UserWarning, match=r"unet/.*contains extra\.weight, which a UNet2DConditionModel does not have"):
        load_backbone(root)


def test_a_sharded_model_loads_and_a_missing_shard_is_named(folder):
    root = folder("shards")
    shards = sorted((root / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    load_backbone(root)
    key = edit(shards[0], drop)
    with pytest.raises(ValueError, match=rf"transformer/.*index\.json lacks {tail(key)}"):
        load_backbone(root)
    shards[0].unlink()
    with pytest.raises(ValueError, match=r"cannot load .*/transformer"):
        load_backbone(root)


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",), ("vocab.json",)])
@pytest.mark.parametrize(("model", "part"), [("sd", "tokenizer"), ("flux", "tokenizer"), ("flux", "tokenizer_2")])
def test_a_tokenizer_without_its_files_is_refused(folder, model, part, kept):
    root = folder(model)
    for file in (root / part).iterdir():
        if file.name not in kept:
            file.unlink()
    with pytest.raises(ValueError, match=rf"{part}|CLIPTokenizer|vocab"):
        load_backbone(root)


def test_a_tokenizer_from_another_model_is_refused(folder):
    from shared.toybox.tokenizer import build

    root = folder("sd")
    for words in (["mug"], [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(10) for j in range(10)]):
        shutil.rmtree(root / "tokenizer")
        build(words).save_pretrained(root / "tokenizer")
        with pytest.raises(ValueError, match=r"/tokenizer: the tokenizer has \d+ tokens, but .* 611"):
            load_backbone(root)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder, part):
    root = folder("sd")
    index = root / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, part: [None, None]}))
    with pytest.raises(ValueError, match=f"has no {part}"):
        load_backbone(root)
    index.write_text(json.dumps(content))
    shutil.rmtree(root / part)
    with pytest.raises(ValueError, match=f"has no {part}"):
        load_backbone(root)


# --- instruments -------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path) -> Path:
    from shared.toybox.evaluators.clip import ClipConfig, new_clip, new_processor, save_clip

    config = ClipConfig(vision_width=16, vision_layers=1, text_width=16, text_layers=1, dimensions=8)
    tokenizer = build_clip_tokenizer()
    save_clip(new_clip(config, tokenizer), new_processor(config, tokenizer), tmp_path / "clip")
    return tmp_path / "clip"


def test_an_old_clip_model_stays_until_the_new_one_takes_its_place(clip, monkeypatch):
    from shared.toybox.evaluators.clip import save_clip

    replace = os.replace

    def watched(old, new):
        replace(old, new)
        assert clip.exists(), "a process killed here would leave no model"

    model, processor = load_toybox_clip.__wrapped__(clip)
    (clip / "old.txt").touch()
    monkeypatch.setattr(os, "replace", watched)
    save_clip(model, processor, clip)
    assert not (clip / "old.txt").exists() and [p.name for p in clip.parent.iterdir()] == ["clip"]


@pytest.mark.parametrize("load", [load_clip, load_toybox_clip.__wrapped__])
def test_an_incomplete_clip_model_is_refused(clip, load):
    load(clip)
    file = clip / "model.safetensors"
    kept = file.read_bytes()
    edit(file, drop)
    with pytest.raises(ValueError, match=r"clip/model\.safetensors lacks logit_scale"):
        load(clip)
    file.write_bytes(kept)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (clip / name).unlink()
    with pytest.raises(ValueError, match=r"/clip: the tokenizer has"):
        load(clip)


def test_a_dino_model_may_lack_only_its_pooler(tmp_path):
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", lambda t: [t.pop(k) for k in list(t) if k.startswith("pooler")])
    load_dino(tmp_path)
    edit(tmp_path / "model.safetensors", drop)
    with pytest.raises(ValueError, match=r"model\.safetensors lacks embeddings\.cls_token"):
        load_dino(tmp_path)


@pytest.mark.parametrize(("name", "load"), [("recognizer", load_recognizer), ("identity", load_identity)])
def test_toybox_instruments_refuse_incomplete_or_unexpected_weights(tmp_path, name, load):
    folder = Path(shutil.copytree(WEIGHTS / name, tmp_path / name))
    load.__wrapped__(folder)
    edit(folder / "model.safetensors", lambda tensors: tensors.update(aaa=torch.zeros(1)))
    with pytest.raises(ValueError, match=rf"{name}/model\.safetensors contains aaa, which the model does not have"):
        load.__wrapped__(folder)
    edit(folder / "model.safetensors", lambda tensors: tensors.pop("aaa"))
    for change, message in ((reshape, r"is \[3\]"), (drop, "lacks")):
        key = edit(folder / "model.safetensors", change)
        with pytest.raises(ValueError, match=rf"{name}/model\.safetensors.*{message}") as refused:
            load.__wrapped__(folder)
        assert key in str(refused.value)
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=rf"cannot read .*{name}/model\.safetensors"):
        load.__wrapped__(folder)


def test_a_file_that_leaves_parameters_without_values_is_reported_as_incomplete(tiny_sd):
    check_filled(tiny_sd.components, Path("model.safetensors"))
    tiny_sd.unet.conv_in.to("meta")
    with pytest.raises(
        ValueError, match=r"model\.safetensors is incomplete: it lacks 2 keys of the unet, for example conv_in\.weight"
    ):
        check_filled(tiny_sd.components, Path("model.safetensors"))
