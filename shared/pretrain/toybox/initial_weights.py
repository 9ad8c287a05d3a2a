"""Lets a run without a checkpoint continue from the shipped weights, by writing them as the run's first checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.io.foreign_files import claim
from shared.pretrain.run_task import checkpoint_info
from shared.pretrain.task import state_of
from shared.pretrain.toybox import models
from shared.pretrain.toybox.run_folder import (
    TOKENIZER_FOLDER,
    VAE_FOLDER,
    frozen_vae,
    has_vae,
    log_of,
    training_folder,
)
from shared.toybox import weights
from shared.train import checkpoint


def adopt_vae(out: Path) -> bool:
    """Copies the shipped autoencoder into a run's folder, unless the run trains its own autoencoder or already has one.

    Returns whether the run uses the shipped autoencoder, possibly with a different decoder. The shipped encoder must
    not change, because the U-Net and the motion module were trained on its latents.
    """
    from diffusers import AutoencoderKL

    source = weights.WEIGHTS / "backbone" / "vae"
    if checkpoint.load(training_folder(out, "vae")) is not None or not (source / "config.json").is_file():
        return False
    if not has_vae(out):
        AutoencoderKL.from_pretrained(str(source), torch_dtype=torch.float32).save_pretrained(str(out / VAE_FOLDER))
    return True


def adopt_backbone(out: Path, size: models.UnetSize = models.UnetSize()) -> bool:
    """Copies the shipped backbone into a run's folder. The tokenizer is copied unchanged, and so is the autoencoder,
    unless the run already has one. The text model and the U-Net are written as a checkpoint.

    The optimizer starts from scratch, but the step count continues. Nothing is copied if the folder has its own
    checkpoint, or if the installation has no weights. Returns whether anything was copied.

    Raises:
        ValueError: if the size of the shipped U-Net is not `size`, or if the shipped U-Net is incompatible with the
            latents of the autoencoder in `out`
    """
    from diffusers import StableDiffusionPipeline

    source, folder = weights.WEIGHTS / "backbone", training_folder(out, "unet")
    if checkpoint.load(folder) is not None or not (source / "training.json").is_file():
        return False
    facts = json.loads((source / "training.json").read_text(encoding="utf-8"))
    _check_fits(models.size_from(models.UnetSize, facts["sizes"]["unet"]), size, out)
    out.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(str(source))
    shutil.copytree(source / "tokenizer", out / TOKENIZER_FOLDER, dirs_exist_ok=True)
    if not has_vae(out):
        pipe.vae.float().save_pretrained(str(out / VAE_FOLDER))
    # The model card needs these lines if a network is not trained further.
    for name, line in facts.get("last", {}).items():
        if line and not (log := log_of(out, name)).exists():
            claim(log.parent, log.name)
            log.write_text(json.dumps(line) + "\n", encoding="utf-8")
    info = checkpoint_info({"sizes": facts["sizes"]}, facts["pictures"])
    _write(folder, {"text_encoder.": pipe.text_encoder, "unet.": pipe.unet}, info, facts["step"])
    return True


def _check_fits(shipped: models.UnetSize, size: models.UnetSize, out: Path) -> None:
    if shipped != size:
        raise ValueError(f"the shipped U-Net has {shipped}, but the run requires {size}; start the run with --fresh")
    channels = frozen_vae(out).config["latent_channels"] if has_vae(out) else shipped.latent_channels
    if channels != shipped.latent_channels:
        raise ValueError(
            f"the shipped U-Net reads {shipped.latent_channels} latent channels, but the autoencoder in {out / VAE_FOLDER} "
            f"has {channels}; train a U-Net for this autoencoder with --fresh, or use another --work folder"
        )


def adopted_steps() -> int:
    """Returns the step at which a run starts if it continues from the shipped backbone, or 0 if there is no shipped
    backbone."""
    facts = weights.WEIGHTS / "backbone" / "training.json"
    return int(json.loads(facts.read_text(encoding="utf-8"))["step"]) if facts.is_file() else 0


def _write(folder: Path, networks: Mapping[str, nn.Module], info: dict[str, Any], step: int) -> None:
    """Writes a checkpoint without optimizer state. Both its weights and its averages are taken from `networks`, which
    maps prefixes of parameter names to modules."""
    model = {f"{prefix}{k}": v.float() for prefix, m in networks.items() for k, v in m.state_dict().items()}
    average = {f"{p}{k}": v.detach().float().cpu() for p, m in networks.items() for k, v in m.named_parameters()}
    checkpoint.save(folder, checkpoint.State(0, step, state_of({"model": model}, average), info=info))
