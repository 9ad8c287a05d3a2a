"""Determines from a model's folder which frame counts the model supports, so that errors are reported before the model
is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pcs_video.backbones.causal_latents import check_causal_frames
from pcs_video.backbones.framewise import check_framewise_frames
from pcs_video.backbones.picture_clips import NONE, PictureClipsBackbone
from shared.backbones.load import TOYBOX
from shared.config import expanded

Check = Callable[[int], object]  # raises ValueError if the model does not support this frame count


def frame_check(source: str | Path | None, motion_adapter: str | Path | None = None) -> Check | None:
    """Returns a function that rejects frame counts that the model does not support, as the model's `latent_shape` does.

    Args:
        source: the model, as for `load_backbone`. If None, the toybox is used
        motion_adapter: for an image model, a folder with a diffusers `MotionAdapter`, or "none"

    Returns:
        The function, or None if the files do not show which frame counts are valid (because the model is not
        downloaded, is a single file, or belongs to another package's family). The frame count is then checked when the
        model is opened.
    """
    if source is None or str(source) == TOYBOX:
        from shared.toybox.weights import backbone_path, motion_adapter_path

        source = backbone_path()
        motion_adapter = motion_adapter or motion_adapter_path()
    folder = expanded(source)
    kind = _json(folder / "model_index.json").get("_class_name")
    if kind in ("WanPipeline", "LTXPipeline"):
        vae = _json(folder / "vae" / "config.json")
        factor = vae.get("scale_factor_temporal", 4) if kind == "WanPipeline" else _ltx_factor(vae)
        family = kind.removesuffix("Pipeline").lower()
        return lambda frames: check_causal_frames(family, frames, factor)
    if kind == "AnimateDiffPipeline":
        adapter = {**_json(folder / "motion_adapter" / "config.json"), **_json(folder / "unet" / "config.json")}
    elif kind == "StableDiffusionPipeline" and str(motion_adapter) == NONE:
        adapter = {"motion_max_seq_length": PictureClipsBackbone.most_frames}
    elif kind == "StableDiffusionPipeline" and motion_adapter is not None:
        adapter = _json(expanded(motion_adapter) / "config.json")
    else:
        return None
    most = adapter.get("motion_max_seq_length")
    return None if most is None else lambda frames: check_framewise_frames("animatediff", frames, most)


def _ltx_factor(vae: Mapping[str, Any]) -> int:
    """Returns the same temporal compression factor as `AutoencoderKLLTXVideo`. If the configuration does not state the
    factor, it is computed from the length of a patch in frames and the number of levels that halve the frame count."""
    stated = vae.get("temporal_compression_ratio")
    halved = vae.get("spatio_temporal_scaling", (True, True, True, False))
    return stated or vae.get("patch_size_t", 1) * 2 ** sum(halved)


def _json(path: Path) -> Mapping[str, Any]:
    """Reads a configuration. Returns an empty configuration if the file cannot be read, because the error is reported
    when the model is opened."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
