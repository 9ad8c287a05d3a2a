"""Where the toybox's weights lie, and how a training becomes the pipeline folder that is shipped.

A training run's folder holds: ``tokenizer/``, ``vae/`` (frozen, normalised, fp32), ``vae.safetensors``,
``decoder.safetensors`` and ``unet.safetensors`` (checkpoints with averages and optimizer), ``latents/`` (cache),
``*_log.jsonl``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

WEIGHTS = Path(__file__).parent / "weights"


def backbone_path() -> Path:
    """The shipped diffusers folder.

    Raises:
        ValueError: where this installation has none
    """
    folder = WEIGHTS / "backbone"
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"no toybox backbone in {folder}: reinstall, or make it with `pcs toybox train`")
    return folder


def sampling_defaults() -> dict[str, Any]:
    """The `guidance` and `steps` that the card states for the shipped model (``weights/sampling.json``)."""
    path = WEIGHTS / "sampling.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"guidance": 4.0, "steps": 25}
