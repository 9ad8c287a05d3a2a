"""How a training becomes the pipeline folder that is shipped.

A training run's folder holds: ``tokenizer/``, ``vae/`` (frozen, normalised, fp32), ``vae.safetensors``,
``decoder.safetensors`` and ``unet.safetensors`` (checkpoints with averages and optimizer), ``latents/`` (cache),
``*_log.jsonl``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTokenizer
from shared.io.temporary_names import replaced
from shared.toybox.weights import WEIGHTS

UNET_CHECKPOINT = "unet.safetensors"


VAE_CHECKPOINT = "vae.safetensors"


DECODER_CHECKPOINT = "decoder.safetensors"


VAE_FOLDER = "vae"


TOKENIZER_FOLDER = "tokenizer"


def tokenizer_of(out: Path) -> CLIPTokenizer:
    """The run's tokenizer: the saved one, or else today's, saved so that the run keeps it."""
    from transformers import CLIPTokenizer

    from shared.toybox import tokenizer

    folder = out / TOKENIZER_FOLDER
    if not (folder / "tokenizer.json").is_file():
        tokenizer.save(tokenizer.build(), folder)
    return CLIPTokenizer.from_pretrained(str(folder))


def frozen_vae(out: Path) -> AutoencoderKL:
    """The run's finished autoencoder, in fp32 and without gradients.

    Raises:
        ValueError: where the run has none yet
    """
    from diffusers import AutoencoderKL

    folder = out / VAE_FOLDER
    if not (folder / "config.json").is_file():
        raise ValueError(f"no finished autoencoder in {folder}: train it first (`pcs toybox train vae`)")
    return AutoencoderKL.from_pretrained(str(folder)).eval().requires_grad_(False)


def pipeline(out: Path, averaged: bool = True, checkpoint: Path | None = None) -> StableDiffusionPipeline:
    """The run's present state as a pipeline in fp32; what is not trained yet is freshly initialised (seed 0).

    Args:
        out: the run's folder
        averaged: the exponential moving average instead of the last weights
        checkpoint: one of ``out``'s snapshots instead of its checkpoint
    """
    from diffusers import StableDiffusionPipeline

    from shared.pretrain.toybox import common, models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tokenizer_of(out)
        vae = frozen_vae(out) if (out / VAE_FOLDER / "config.json").is_file() else models.build_vae()
        checkpoint = checkpoint or out / UNET_CHECKPOINT
        tree, facts = common.load_checkpoint(checkpoint) if checkpoint.is_file() else ({}, {})
        denoiser = models.build_denoiser(tokenizer, facts.get("sizes"))
        if averaged and tree:
            _write_average(denoiser, tree["ema"])
        elif tree:
            denoiser.load_state_dict(tree["model"])
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=denoiser.text_encoder.eval(),  # pyright: ignore[reportArgumentType]
        tokenizer=tokenizer,
        unet=denoiser.unet.eval(),  # pyright: ignore[reportArgumentType]
        scheduler=models.build_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


@torch.no_grad()
def _write_average(module: torch.nn.Module, average: dict[str, torch.Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(average[name])


def assemble(out: Path, target: Path | None = None) -> Path:
    """Packs the run's averaged weights in fp16 as a diffusers folder that needs nothing of this project.

    The folder is replaced in one rename; a failure leaves the old one as it was.

    Args:
        out: the run's folder
        target: the pipeline folder; the shipped one (``shared/toybox/weights/backbone``) where None

    Returns:
        ``target``
    """
    target = target or WEIGHTS / "backbone"
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        pipe = pipeline(out)
        pipe.to(torch.float16, silence_dtype_warnings=True)
        pipe.save_pretrained(str(fresh))
        _finish_tokenizer(fresh, out)
        _plain_configs(fresh)
        facts = json.dumps(training_facts(out), indent=2) + "\n"
        (fresh / "training.json").write_text(facts, encoding="utf-8")
        _readable(fresh)
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def training_facts(out: Path) -> dict[str, Any]:
    """How far the run is: step, pictures and sizes of the denoiser, and the last logged lines of all trainings."""
    from shared.pretrain.toybox import common

    checkpoint = out / UNET_CHECKPOINT
    facts = common.read_facts(checkpoint) if checkpoint.is_file() else {"step": 0, "pictures": 0, "sizes": None}
    last = {name: _last_line(out / f"{name}_log.jsonl") for name in ("vae", "decoder", "unet")}
    return {**facts, "last": last}


def _last_line(log: Path) -> dict[str, Any]:
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return json.loads(lines[-1]) if lines else {}


def _finish_tokenizer(folder: Path, out: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(out / TOKENIZER_FOLDER / name, folder / "tokenizer" / name)


def _plain_configs(folder: Path) -> None:
    """Removes local paths, and states fp32 as the type to compute in.

    transformers 5 loads in the configuration's type where none is asked for, diffusers in fp32: they must agree.
    """
    for path in folder.glob("**/*.json"):
        if path.name not in {"config.json", "model_index.json", "tokenizer_config.json"}:
            continue
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in ("_name_or_path", "name_or_path"):
            config.pop(key, None)
        if path.parent.name == "text_encoder":
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _readable(folder: Path) -> None:
    """The usual rights: a temporary folder and safetensors' files are closed to others."""
    folder.chmod(0o755)
    for path in folder.glob("**/*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _swap(fresh: Path, target: Path) -> None:
    old = replaced(target)
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)
