"""Turns an image backbone into one for clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcs_video.backbones.animatediff import AnimateDiffBackbone, with_motion
from pcs_video.backbones.picture_clips import NONE, PictureClipsBackbone
from shared.backbones import Backbone
from shared.backbones.built_on import AddedNetwork
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.config import expanded
from shared.io.model_folders import load_network

_TOYBOX_FIND = ("from shared.toybox.weights import motion_adapter_path", "motion_adapter_path()")


def with_motion_adapter(backbone: Backbone, folder: str | Path | None = None) -> Backbone:
    """Returns `backbone` itself if it already makes clips, otherwise one with motion modules (Stable Diffusion, the toybox).

    Args:
        folder: contains a diffusers `MotionAdapter`; "none": no motion modules, see `PictureClipsBackbone`; None: the toybox's
            own, for the toybox only

    Raises:
        ValueError: the backbone makes pictures and no folder is given; the folder has no motion module, or one for another
            U-Net; or a folder is given but the backbone already makes clips
    """
    if backbone.frames is not None:
        if folder is not None:
            raise ValueError(f"motion_adapter={folder}: {backbone.name} already makes clips; leave motion_adapter out")
        return backbone
    if not isinstance(backbone, StableDiffusionBackbone):
        raise ValueError(f"{backbone.name} ({backbone.family}) makes pictures, and motion modules do not support it")
    if folder is not None and str(folder) == NONE:
        made = PictureClipsBackbone(backbone.pipeline(), backbone.name)
    else:
        adapter = _adapter(_folder(backbone, folder), backbone.dtype)
        made = AnimateDiffBackbone(with_motion(backbone.pipeline(), adapter), backbone.name)
        made.added = (AddedNetwork("motion_adapter", "MotionAdapter", _TOYBOX_FIND if folder is None else None),)
    made.world = backbone.world
    made.default_guidance, made.default_steps = backbone.default_guidance, backbone.default_steps
    return made


def _folder(backbone: Backbone, folder: str | Path | None) -> Path:
    if folder is not None:
        return expanded(folder)
    if backbone.world is None:
        raise ValueError(
            f"{backbone.name} makes pictures: give motion_adapter=FOLDER (--motion-adapter), a diffusers MotionAdapter "
            "for it, or an AnimateDiffPipeline's folder as the backbone; for a trajectory alone, "
            "motion_adapter=none is enough"
        )
    from shared.toybox.weights import motion_adapter_path

    return motion_adapter_path()


def _adapter(folder: Path, dtype: Any) -> Any:
    from diffusers import MotionAdapter  # pyright: ignore[reportPrivateImportUsage]

    if not (folder / "config.json").is_file():
        raise ValueError(f"motion_adapter={folder}: not a diffusers MotionAdapter, because it has no config.json")
    return load_network(MotionAdapter, folder, dtype=dtype)
