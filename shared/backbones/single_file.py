"""The configuration and tokenizer of Stable Diffusion 1.x, so that a single-file checkpoint, which contains only weights,
loads without the hub."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

#: A projection whose shape tells the versions apart: its input is the text encoder's width, 768 in version 1 and 1024 in 2.
_TEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
_SHAPES = {_TEXT: [320, 768], _FIRST: [320, 4, 3, 3]}

#: The merges of CLIP's byte-pair encoding (https://github.com/openai/CLIP, MIT licence), most frequent first. The
#: vocabulary follows from them.
_MERGES = Path(__file__).with_name("clip_merges.txt.gz")
_START, _END = "<|startoftext|>", "<|endoftext|>"

_BLOCKS = 4
_CONFIGS: dict[str, dict[str, Any]] = {
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "sample_size": 512,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * _BLOCKS,
        "up_block_types": ["UpDecoderBlock2D"] * _BLOCKS,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    },
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
    "tokenizer/tokenizer_config.json": {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _END,
        "unk_token": _END,
    },
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    },
}


def is_version_1(path: Path) -> bool:
    """Whether a `.safetensors` file contains Stable Diffusion 1.x for pictures. Inpainting models, whose input has more
    channels, do not count. Returns False if the file cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            return all(name in names and file.get_slice(name).get_shape() == shape for name, shape in _SHAPES.items())
    except SafetensorError:
        return False


def write_version_1(folder: Path) -> Path:
    """Writes a diffusers folder of Stable Diffusion 1.5 without weights. Returns the folder."""
    for name, config in _CONFIGS.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config), encoding="utf-8")
    merges = gzip.decompress(_MERGES.read_bytes()).decode("utf-8")
    (folder / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    vocabulary = json.dumps({token: number for number, token in enumerate(_vocabulary(merges.splitlines()))})
    (folder / "tokenizer" / "vocab.json").write_text(vocabulary, encoding="utf-8")
    return folder


def _vocabulary(merges: list[str]) -> list[str]:
    """Returns the tokens in order: one for each byte, the same at the end of a word, one for each merge, and the two that
    enclose a text."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = 256 - len(printable)  # bytes without a visible character are shown as the characters from 256 on
    characters = [chr(code) for code in (*printable, *range(256, 256 + hidden))]
    ended = [f"{character}</w>" for character in characters]
    return [*characters, *ended, *("".join(merge.split()) for merge in merges), _START, _END]
