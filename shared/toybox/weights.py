"""Locates the toybox's weights and reads the recommended sampling settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"


def backbone_path() -> Path:
    """Returns the folder with the shipped diffusers pipeline.

    Raises:
        ValueError: if this installation does not include it
    """
    folder = WEIGHTS / "backbone"
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"no toybox backbone in {folder}; reinstall, or create it with `pcs toybox train`")
    return folder


def sampling_defaults() -> dict[str, Any]:
    """Returns the `guidance` and `steps` that are recommended for the shipped model (``weights/sampling.json``)."""
    path = WEIGHTS / "sampling.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"guidance": 4.0, "steps": 25}


def motion_adapter_path() -> Path:
    """Returns the folder with the shipped motion module, a diffusers `MotionAdapter` for the backbone's U-Net.

    Raises:
        ValueError: if this installation does not include it
    """
    folder = WEIGHTS / "motion_adapter"
    if not (folder / "config.json").is_file():
        raise ValueError(f"no toybox motion module in {folder}; reinstall, or create it with `pcs toybox train`")
    return folder
