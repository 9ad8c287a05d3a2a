"""Single-file checkpoints of Stable Diffusion 1.x load with the configuration and tokenizer in this package."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shared.backbones import load_backbone, single_file
from shared.backbones.single_file import is_version_1, write_version_1
from tests.core.single_files import write_single_file

#: The configuration with the same structure at tiny size. The vocabulary keeps its size.
TINY = {
    "unet/config.json": {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 4,
                         "cross_attention_dim": 16, "attention_head_dim": 2, "sample_size": 8},
    "vae/config.json": {"block_out_channels": [4, 4, 4, 4], "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 64},
    "text_encoder/config.json": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                                 "num_attention_heads": 2, "projection_dim": 16},
}  # fmt: skip


def networks(folder: Path) -> dict[str, nn.Module]:
    """Builds the networks of a folder's configuration."""
    unet, vae, text = (
        json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        for name in ("unet", "vae", "text_encoder")
    )
    return {
        "unet": UNet2DConditionModel.from_config(unet),  # pyright: ignore[reportReturnType]
        "vae": AutoencoderKL.from_config(vae),  # pyright: ignore[reportReturnType]
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
    }


def test_the_configuration_is_that_of_stable_diffusion_1(tmp_path: Path) -> None:
    """The networks have as many parameters as the published ones, and the noise schedule ends where theirs does."""
    folder = write_version_1(tmp_path)
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks(folder).items()}
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    scheduler = PNDMScheduler.from_pretrained(folder / "scheduler")
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.00466, abs=1e-5)  # pyright: ignore


def test_the_tokenizer_is_clips(tmp_path: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(write_version_1(tmp_path) / "tokenizer")
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A photo of a  CAT").input_ids == tokenizer("a photo of a cat").input_ids
    assert tokenizer.decode(tokenizer("café ☃ 12").input_ids[1:-1]).split() == ["café", "☃", "1", "2"]


def test_a_file_loads_without_the_hub_and_without_a_folder_next_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {name: {**config, **TINY.get(name, {})} for name, config in single_file._CONFIGS.items()}
    monkeypatch.setattr(single_file, "_CONFIGS", configs)
    folder = write_version_1(tmp_path / "folder")
    torch.manual_seed(0)
    made: Any = SimpleNamespace(**{name: network.eval() for name, network in networks(folder).items()})
    file = write_single_file(made, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="Except for Stable Diffusion 1.x, a single file also needs"):
        load_backbone(file)  # this is not a network of version 1
    monkeypatch.setattr(single_file, "_SHAPES", {single_file._TEXT: [8, 16], single_file._FIRST: [8, 4, 3, 3]})
    backbone = load_backbone(file)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    with torch.no_grad():
        conditioning = backbone.encode(["a photo of a cat"])
        ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")("a photo of a cat", padding="max_length").input_ids
        context = made.text_encoder(torch.tensor([ids])).last_hidden_state
        torch.testing.assert_close(conditioning.context, context)
        torch.testing.assert_close(backbone.predict(x, t, conditioning), made.unet(x, t, context).sample)
    assert backbone.resolution == 64 and [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["folder"]


def test_other_files_do_not_count_as_version_1(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    assert not is_version_1(tmp_path / "broken.safetensors")
