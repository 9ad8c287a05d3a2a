"""Writes a Stable Diffusion pipeline as a single file with the key names of the original code.

This is the inverse of diffusers' conversion.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(pipe: Any, path: Path) -> Path:
    """Writes all weights of a StableDiffusionPipeline to one file."""
    layers = len(pipe.unet.down_blocks[0].resnets)
    tensors = {f"model.diffusion_model.{_unet(k, layers)}": t for k, t in pipe.unet.state_dict().items()}
    tensors |= {
        f"first_stage_model.{_vae(k, len(pipe.vae.decoder.up_blocks) - 1)}": _as_conv(k, t)
        for k, t in pipe.vae.state_dict().items()
    }
    prefix = "cond_stage_model.transformer."
    text = {
        k if k.startswith("text_model.") else f"text_model.{k}": t for k, t in pipe.text_encoder.state_dict().items()
    }
    tensors |= {prefix + k: t for k, t in text.items()}
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, path)
    return path


def _unet(key: str, layers: int) -> str:
    stem, _, kind = key.rpartition(".")
    if stem in _UNET:
        return f"{_UNET[stem]}.{kind}"
    side, block, part, layer, inside = re.fullmatch(
        r"(down|up|mid)_blocks?(?:\.(\d))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", key
    ).groups()  # type: ignore[union-attr]
    if part == "resnets":
        name, _, kind = inside.rpartition(".")
        inside = f"{_RESNET[name]}.{kind}"
    if side == "mid":
        return f"middle_block.{1 if part == 'attentions' else 2 * int(layer)}.{inside}"
    at = (layers + 1) * int(block)  # each block has one index for each layer, and one for its resampler or last layer
    if part == "downsamplers":
        return f"input_blocks.{at + layers + 1}.0.op.{inside.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{at + layers}.{1 if block == '0' else 2}.{inside}"
    row = f"input_blocks.{at + 1 + int(layer)}" if side == "down" else f"output_blocks.{at + int(layer)}"
    return f"{row}.{1 if part == 'attentions' else 0}.{inside}"


def _vae(key: str, top: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{top - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{top - int(m[1])}.upsample", key)
    if "mid_block.attentions.0." in key:
        head, inside = key.split("mid_block.attentions.0.")
        name, _, kind = inside.rpartition(".")
        key = f"{head}mid.attn_1.{_ATTENTION[name]}.{kind}"
    return key


def _as_conv(key: str, tensor: Tensor) -> Tensor:
    linear = "mid_block.attentions.0.to_" in key and key.endswith("weight")
    return tensor[:, :, None, None] if linear else tensor
