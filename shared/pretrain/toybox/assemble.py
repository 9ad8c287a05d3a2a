"""Packs the result of a training run into the shipped pipeline folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shared.io.outputs import take_place
from shared.pretrain.toybox import models
from shared.pretrain.toybox.run_folder import (
    TOKENIZER_FOLDER,
    denoiser_average,
    denoiser_facts,
    frozen_vae,
    has_vae,
    log_of,
    tokenizer_of,
    training_folder,
)
from shared.toybox.weights import WEIGHTS
from shared.train import checkpoint

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def pipeline(out: Path, snapshot: Path | None = None) -> StableDiffusionPipeline:
    """Builds a pipeline in fp32 from a run's averaged denoiser. Parts that have not been trained are initialised
    randomly, with seed 0.

    Args:
        out: the run's folder
        snapshot: a snapshot of the run, which is used instead of its checkpoint
    """
    from diffusers import StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tokenizer_of(out)
        vae = frozen_vae(out) if has_vae(out) else models.build_vae()
        average, facts = denoiser_average(out, snapshot) or ({}, {})
        untrained = replace(models.UnetSize(), latent_channels=int(vae.config["latent_channels"]))
        denoiser = models.build_denoiser(tokenizer, facts.get("sizes", {"unet": asdict(untrained)}))
        if average:
            _write_average(denoiser, average)
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
    """Packs the run's averaged weights in fp16 into a diffusers folder that can be used without this project.

    The folder is replaced only when the new one is complete, so a failure leaves the old one unchanged.

    Args:
        out: the run's folder
        target: the pipeline folder. If None, the shipped one (``shared/toybox/weights/backbone``) is replaced.

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
        plain_configs(fresh)
        facts = json.dumps(training_facts(out), indent=2) + "\n"
        (fresh / "training.json").write_text(facts, encoding="utf-8")
        readable(fresh)
        take_place(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def training_facts(out: Path) -> dict[str, Any]:
    """Returns the step of the run's denoiser, the number of pictures it has seen, its sizes, and the last line of each
    network's log."""
    state = checkpoint.load(training_folder(out, "unet"))
    facts = denoiser_facts(state) if state else {"step": 0, "pictures": 0, "sizes": None}
    return {**facts, "last": {name: _last_line(log_of(out, name)) for name in ("vae", "decoder", "unet")}}


def _last_line(log: Path) -> dict[str, Any]:
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return json.loads(lines[-1]) if lines else {}


def _finish_tokenizer(folder: Path, out: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(out / TOKENIZER_FOLDER / name, folder / "tokenizer" / name)


def plain_configs(folder: Path) -> None:
    """Removes local paths from a pipeline folder's configurations, and sets the text encoder's dtype to fp32.

    By default, transformers 5 loads weights in the dtype of the configuration, whereas diffusers loads them in fp32.
    Setting the dtype to fp32 makes the two agree.
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


def readable(folder: Path) -> None:
    """Makes a folder and its files readable by other users, which temporary folders and safetensors files are not."""
    folder.chmod(0o755)
    for path in folder.glob("**/*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
