"""Defines the layout of a training run's folder, and reads its files.

tokenizer/                              the tokenizer that the run uses
vae/                                    the finished autoencoder (frozen, normalised, fp32)
latents/                                the U-Net's training data (`latent_cache`)
training/{vae,decoder,reader,unet}/     checkpoint and log.jsonl of each network
training/unet/snapshots/                intermediate averages of the denoiser's parameters
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.io.foreign_files import claim
from shared.io.outputs import atomic_write
from shared.pretrain.run_task import refuse_older
from shared.pretrain.task import average_of
from shared.train import checkpoint

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

VAE_FOLDER = "vae"
TOKENIZER_FOLDER = "tokenizer"
TRAININGS = ("vae", "decoder", "reader", "unet")


def training_folder(out: Path, name: str) -> Path:
    """Returns the folder with the checkpoint and log of `name`, one of `TRAININGS`. Raises ValueError if `out`
    contains a checkpoint from an earlier version."""
    assert name in TRAININGS, name
    refuse_older(out / f"{name}.safetensors")
    return out / "training" / name


def log_of(out: Path, name: str) -> Path:
    """Returns the log file of `name`, one of `TRAININGS`."""
    return training_folder(out, name) / "log.jsonl"


def tokenizer_of(out: Path) -> CLIPTokenizer:
    """Returns the tokenizer saved in the run's folder. If the folder has none, saves the current one there first."""
    from transformers import CLIPTokenizer

    from shared.toybox import tokenizer

    folder = out / TOKENIZER_FOLDER
    if not (folder / "tokenizer.json").is_file():
        tokenizer.save(tokenizer.build(), folder)
    return CLIPTokenizer.from_pretrained(str(folder))


def has_vae(out: Path) -> bool:
    """Returns whether the run's autoencoder is finished."""
    return (out / VAE_FOLDER / "config.json").is_file()


def frozen_vae(out: Path) -> AutoencoderKL:
    """Loads the run's finished autoencoder, in fp32 and without gradients. Raises ValueError if there is none."""
    from diffusers import AutoencoderKL

    if not has_vae(out):
        raise ValueError(f"no finished autoencoder in {out / VAE_FOLDER}: train it first (`pcs toybox train vae`)")
    return AutoencoderKL.from_pretrained(str(out / VAE_FOLDER)).eval().requires_grad_(False)


def denoiser_facts(state: checkpoint.State) -> dict[str, Any]:
    """Returns the step, the number of pictures and the networks' sizes from a checkpoint of the denoiser."""
    return {"step": state.step, "sizes": state.info["facts"]["sizes"], "pictures": state.info["pictures"]}


def snapshots(out: Path) -> list[Path]:
    """Lists the denoiser's intermediate averages, earliest first."""
    return sorted((training_folder(out, "unet") / "snapshots").glob("*.safetensors"))


def save_snapshot(folder: Path, average: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Atomically saves an average of the denoiser's parameters in fp16, with facts such as `denoiser_facts` returns."""
    path = folder / "snapshots" / f"step-{facts['step']:07d}.safetensors"
    claim(folder, f"snapshots/{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file(
            {name: tensor.half().contiguous() for name, tensor in average.items()},
            str(temporary),
            metadata={"facts": json.dumps(dict(facts))},
        )
    return path


def load_snapshot(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Loads a snapshot. Returns the averages by parameter name, and the facts."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _facts(file)  # noqa: SIM118 - not iterable


def snapshot_facts(path: Path) -> dict[str, Any]:
    """Reads a snapshot's facts without loading its tensors."""
    with safe_open(str(path), framework="pt") as file:
        return _facts(file)


def denoiser_average(out: Path, snapshot: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Loads the denoiser's averaged parameters and facts from `snapshot` or, if that is None, from the newest
    checkpoint. Returns None if there is no checkpoint."""
    if snapshot is not None:
        return load_snapshot(snapshot)
    state = checkpoint.load(training_folder(out, "unet"))
    return None if state is None else (average_of(state.learned), denoiser_facts(state))


def _facts(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {})["facts"])
