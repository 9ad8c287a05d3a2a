"""Going on from the shipped weights where a run's own folder is gone: they become its first checkpoint."""

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
    """Puts the shipped autoencoder into a run's folder that trains none of its own and has none yet.

    Returns whether the run's autoencoder is (up to its decoder) the shipped one, which stays as it is: U-Net and motion
    module know its latents.
    """
    from diffusers import AutoencoderKL

    source = weights.WEIGHTS / "backbone" / "vae"
    if checkpoint.load(training_folder(out, "vae")) is not None or not (source / "config.json").is_file():
        return False
    if not has_vae(out):
        AutoencoderKL.from_pretrained(str(source), torch_dtype=torch.float32).save_pretrained(str(out / VAE_FOLDER))
    return True


def adopt_backbone(out: Path, size: models.UnetSize = models.UnetSize()) -> bool:
    """Fills a run's folder from the shipped backbone: tokenizer, autoencoder, and the averaged networks as a checkpoint.

    The optimizer starts anew; steps count on. Returns whether anything was adopted: a folder that has a checkpoint of
    its own, or an installation without weights, is left alone.

    Raises:
        ValueError: the shipped U-Net is not of `size`, or does not read the latents of an autoencoder that `out` has
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
    for name, line in facts.get("last", {}).items():  # what the card says of trainings that are not repeated here
        if line and not (log := log_of(out, name)).exists():
            claim(log.parent, log.name)
            log.write_text(json.dumps(line) + "\n", encoding="utf-8")
    info = checkpoint_info({"sizes": facts["sizes"]}, facts["pictures"])
    _write(folder, {"text_encoder.": pipe.text_encoder, "unet.": pipe.unet}, info, facts["step"])
    return True


def _check_fits(shipped: models.UnetSize, size: models.UnetSize, out: Path) -> None:
    if shipped != size:
        raise ValueError(f"the shipped U-Net is {shipped}, and the run asks for {size}: begin it with --fresh")
    channels = frozen_vae(out).config["latent_channels"] if has_vae(out) else shipped.latent_channels
    if channels != shipped.latent_channels:
        raise ValueError(
            f"the shipped U-Net reads {shipped.latent_channels} latent channels, and the autoencoder in {out / VAE_FOLDER} "
            f"has {channels}: train a U-Net for it with --fresh, or use another --work"
        )


def adopted_steps() -> int:
    """The step that a training which goes on from the shipped backbone starts at; 0 where there are no weights."""
    facts = weights.WEIGHTS / "backbone" / "training.json"
    return int(json.loads(facts.read_text(encoding="utf-8"))["step"]) if facts.is_file() else 0


def _write(folder: Path, networks: Mapping[str, nn.Module], info: dict[str, Any], step: int) -> None:
    """A checkpoint without an optimizer, of modules by the prefix of their names: they are both weights and average."""
    model = {f"{prefix}{k}": v.float() for prefix, m in networks.items() for k, v in m.state_dict().items()}
    average = {f"{p}{k}": v.detach().float().cpu() for p, m in networks.items() for k, v in m.named_parameters()}
    checkpoint.save(folder, checkpoint.State(0, step, state_of({"model": model}, average), info=info))
