"""Going on from the shipped weights where a run's own folder is gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shared.pretrain.toybox import assemble, common, models
from shared.toybox import weights

if TYPE_CHECKING:
    from torch import nn


def adopt_vae(out: Path) -> bool:
    """Begin the autoencoder's checkpoint from the shipped one.

    The optimizer starts anew. Returns whether it was adopted: a folder that has a checkpoint of its own, or an
    installation without weights, is left alone.
    """
    from diffusers import AutoencoderKL

    source = weights.WEIGHTS / "backbone" / "vae"
    if (out / assemble.VAE_CHECKPOINT).exists() or not (source / "config.json").is_file():
        return False
    vae: Any = AutoencoderKL.from_pretrained(str(source), torch_dtype=torch.float32)
    known = vae.config
    size = models.VaeSize(
        tuple(known.block_out_channels), known.layers_per_block, known.norm_num_groups, known.sample_size
    )
    common.save_checkpoint(out / assemble.VAE_CHECKPOINT, _tree({"": vae}), {"step": 0, "size": asdict(size)})
    return True


def adopt(out: Path) -> bool:
    """Fill a run's folder from the shipped backbone: tokenizer, autoencoder, and the averaged networks as a checkpoint.

    The optimizer starts anew; steps count on. Returns whether anything was adopted: a folder that has a checkpoint of
    its own, or an installation without weights, is left alone.
    """
    from diffusers import StableDiffusionPipeline

    source = weights.WEIGHTS / "backbone"
    if (out / assemble.UNET_CHECKPOINT).exists() or not (source / "training.json").is_file():
        return False
    out.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(str(source))
    facts = json.loads((source / "training.json").read_text(encoding="utf-8"))
    shutil.copytree(source / "tokenizer", out / assemble.TOKENIZER_FOLDER, dirs_exist_ok=True)
    if not (out / assemble.VAE_FOLDER / "config.json").exists():
        pipe.vae.float().save_pretrained(str(out / assemble.VAE_FOLDER))
    for name, line in facts.get("last", {}).items():  # what the card says of trainings that are not repeated here
        if line and not (log := out / f"{name}_log.jsonl").exists():
            log.write_text(json.dumps(line) + "\n", encoding="utf-8")
    tree = _tree({"text_encoder.": pipe.text_encoder, "unet.": pipe.unet})
    common.save_checkpoint(out / assemble.UNET_CHECKPOINT, tree, {k: facts[k] for k in ("step", "sizes", "pictures")})
    return True


def _tree(networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What a checkpoint without its optimizer holds of modules, by the prefix of their names."""
    return {
        "model": {f"{prefix}{k}": v.float() for prefix, m in networks.items() for k, v in m.state_dict().items()},
        "ema": {f"{prefix}{k}": p.detach().float() for prefix, m in networks.items() for k, p in m.named_parameters()},
    }
