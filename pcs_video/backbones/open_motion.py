"""From a backbone of pictures to one of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcs_video.backbones.animatediff import AnimateDiffBackbone, with_motion
from shared.backbones import Backbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.config import expanded
from shared.io.model_folders import load_network


def with_motion_adapter(backbone: Backbone, folder: str | Path | None = None) -> Backbone:
    """`backbone` where it makes clips already; a Stable Diffusion or the toybox with motion modules.

    Args:
        folder: of a diffusers `MotionAdapter`; None: the toybox's own on the toybox

    Raises:
        ValueError: it makes pictures and no folder is given, the folder holds no motion module, or one of another U-Net;
            a folder is given and it makes clips already
    """
    if backbone.frames is not None:
        if folder is not None:
            raise ValueError(f"motion_adapter={folder}: {backbone.name} makes clips already; leave it out")
        return backbone
    if not isinstance(backbone, StableDiffusionBackbone):
        raise ValueError(f"{backbone.name} ({backbone.family}) makes pictures, and no motion module is made for it")
    where = _folder(backbone, folder)
    made = AnimateDiffBackbone(with_motion(backbone.pipeline(), _adapter(where, backbone.dtype)), backbone.name)
    made.world = backbone.world
    made.default_guidance, made.default_steps = backbone.default_guidance, backbone.default_steps
    return made


def _folder(backbone: Backbone, folder: str | Path | None) -> Path:
    if folder is not None:
        return expanded(folder)
    if backbone.world is None:
        raise ValueError(
            f"{backbone.name} makes pictures: give motion_adapter=FOLDER (--motion-adapter), a diffusers MotionAdapter "
            "for it, or a folder of an AnimateDiffPipeline as the backbone"
        )
    from shared.toybox.weights import motion_adapter_path

    return motion_adapter_path()


def _adapter(folder: Path, dtype: Any) -> Any:
    from diffusers import MotionAdapter  # pyright: ignore[reportPrivateImportUsage]

    if not (folder / "config.json").is_file():
        raise ValueError(f"motion_adapter={folder}: there is no diffusers MotionAdapter (no config.json)")
    return load_network(MotionAdapter, folder, dtype=dtype)
