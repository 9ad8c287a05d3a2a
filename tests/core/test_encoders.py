"""Encoders match direct calls to transformers, and folders that are not models are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from shared.metrics import encoders, instruments
from tests.core.smooth_pictures import smooth_pictures


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    symbols = [chr(c) for c in range(97, 123)]
    vocab = {s: i for i, s in enumerate([*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(vocab),
        "max_position_embeddings": 12,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "pad_token_id": 53,
    }
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=10)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**cast(Any, size)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("models") / "tiny-dino"
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessorPil(**cast(Any, size)).save_pretrained(folder)
    return folder


def test_clip_matches_direct_calls_to_transformers(clip_folder: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    pixels = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    texts = ["a cat", "dog on a mat"]
    encoder = encoders.load_clip(clip_folder)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pictures = [Image.fromarray(((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for p in pixels]
    processor, tokenizer = (
        CLIPImageProcessorPil.from_pretrained(clip_folder),
        CLIPTokenizer.from_pretrained(clip_folder),
    )
    with torch.no_grad():
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        both = cast(Any, model)(**tokens, pixel_values=processor(pictures, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(encoder.images(pixels), both.image_embeds)
    torch.testing.assert_close(encoder.texts(texts), both.text_embeds)
    torch.testing.assert_close(
        encoder.images(pixels) @ encoder.texts(texts).T * model.logit_scale.exp(), both.logits_per_image
    )


def test_clip_warns_when_a_text_is_truncated(clip_folder: Path) -> None:
    with pytest.warns(UserWarning, match="reads at most 12 tokens"):
        encoders.load_clip(clip_folder).texts(["a very long prompt indeed"])


def test_dino_returns_the_normalized_cls_embedding(dino_folder: Path) -> None:
    from transformers import BitImageProcessorPil, Dinov2Model

    pixels = smooth_pictures(2, 50)
    pictures = [Image.fromarray(((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for p in pixels]
    values = BitImageProcessorPil.from_pretrained(dino_folder)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = Dinov2Model.from_pretrained(dino_folder).eval()(values).last_hidden_state
    torch.testing.assert_close(encoders.load_dino(dino_folder).images(pixels), F.normalize(hidden[:, 0], dim=1))


@pytest.mark.parametrize("old", ["CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast"])
def test_processors_with_old_or_fast_names_load_without_torchvision(
    clip_folder: Path, tmp_path: Path, old: str
) -> None:
    import shutil

    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    path = folder / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    raw.pop("image_processor_type", None)
    raw["feature_extractor_type" if "Feature" in old else "image_processor_type"] = old
    path.write_text(json.dumps(raw))
    pixels = smooth_pictures(1, 40)
    torch.testing.assert_close(
        encoders.load_clip(folder).images(pixels), encoders.load_clip(clip_folder).images(pixels)
    )


def test_folders_of_other_models_and_unreadable_folders_are_refused(
    clip_folder: Path, dino_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="not a model folder"):
        encoders.load_clip(tmp_path)
    with pytest.raises(ValueError, match="'dinov2'; expected clip"):
        encoders.load_clip(dino_folder)
    with pytest.raises(ValueError, match="'clip'; expected dinov2"):
        encoders.load_dino(clip_folder)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        encoders.load_dino(tmp_path)
    with pytest.raises(ValueError, match="nothing to measure with"):
        instruments.load_instruments()


def test_pictures_are_checked_and_centre_cropped() -> None:
    with pytest.raises(ValueError, match="not finite"):
        encoders.to_pil(torch.full((1, 3, 4, 4), math.nan))
    with pytest.raises(ValueError, match=r"expected \[N, 3, H, W\]"):
        encoders.to_pil(torch.zeros(3, 4, 4))
    wide = torch.cat([torch.full((1, 3, 8, 4), -1.0), torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 4), 1.0)], 3)
    assert encoders.resize01(wide, 8).unique().tolist() == pytest.approx([128 / 255])
