"""Going on from the shipped weights where a run's own folder is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from shared.toybox import weights
from shared.toybox.train import common


def adopt(out: Path) -> bool:
    """Fill a run's folder from the shipped backbone: tokenizer, autoencoder, and the averaged networks as a checkpoint.

    The optimizer starts anew; steps count on. Returns whether anything was adopted: a folder that has a checkpoint of
    its own, or an installation without weights, is left alone.
    """
    from diffusers import StableDiffusionPipeline

    source = weights.WEIGHTS / "backbone"
    if (out / weights.UNET_CHECKPOINT).exists() or not (source / "training.json").is_file():
        return False
    out.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(str(source))
    facts = json.loads((source / "training.json").read_text(encoding="utf-8"))
    shutil.copytree(source / "tokenizer", out / weights.TOKENIZER_FOLDER, dirs_exist_ok=True)
    if not (out / weights.VAE_FOLDER / "config.json").exists():
        pipe.vae.float().save_pretrained(str(out / weights.VAE_FOLDER))
    networks = {"text_encoder": pipe.text_encoder, "unet": pipe.unet}
    state = {f"{n}.{k}": v.float() for n, m in networks.items() for k, v in m.state_dict().items()}
    average = {f"{n}.{k}": p.detach().float() for n, m in networks.items() for k, p in m.named_parameters()}
    tree = {"model": state, "ema": average}
    common.save_checkpoint(out / weights.UNET_CHECKPOINT, tree, {k: facts[k] for k in ("step", "sizes", "pictures")})
    return True
