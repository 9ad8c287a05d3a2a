"""Turns a backbone that generates pictures into a backbone that generates clips."""

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
    """Returns `backbone` itself if it already generates clips. Otherwise, returns a backbone that generates clips with
    the same networks. This is possible for Stable Diffusion and the toybox.

    Args:
        folder: a folder with a diffusers `MotionAdapter`, or "none" for no motion modules (`PictureClipsBackbone`). If None,
            the toybox's own adapter is used, which fits only the toybox

    Raises:
        ValueError: when the backbone generates pictures and no folder is given, when the folder has no motion module or
            one for a different U-Net, or when a folder is given but the backbone already generates clips
    """
    if backbone.frames is not None:
        if folder is not None:
            raise ValueError(
                f"motion_adapter={folder}: {backbone.name} already generates clips; leave motion_adapter out"
            )
        return backbone
    if not isinstance(backbone, StableDiffusionBackbone):
        raise ValueError(
            f"{backbone.name} ({backbone.family}) generates pictures, and motion modules cannot be added to it"
        )
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
            f"{backbone.name} generates pictures; give motion_adapter=FOLDER (--motion-adapter), the folder of a diffusers "
            "MotionAdapter for it, or an AnimateDiffPipeline's folder as the backbone. If subjects only need to follow "
            "trajectories, motion_adapter=none is enough."
        )
    from shared.toybox.weights import motion_adapter_path

    return motion_adapter_path()


def _adapter(folder: Path, dtype: Any) -> Any:
    from diffusers import MotionAdapter  # pyright: ignore[reportPrivateImportUsage]

    if not (folder / "config.json").is_file():
        raise ValueError(f"motion_adapter={folder} is not a diffusers MotionAdapter, because it has no config.json")
    return load_network(MotionAdapter, folder, dtype=dtype)
