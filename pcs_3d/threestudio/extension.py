"""Registers `pcs-prompt-processor`, `pcs-guidance`, `pcs-volume-renderer` and `pcs-exporter` with threestudio.

A checkout's `custom/pcs` imports this module when its `launch.py` starts. Outside a checkout, threestudio cannot be
imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from threestudio import info, register  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
from threestudio.models.exporters.base import Exporter, ExporterOutput  # pyright: ignore[reportMissingImports]
from threestudio.models.renderers.base import VolumeRenderer  # pyright: ignore[reportMissingImports]
from threestudio.utils.base import BaseObject  # pyright: ignore[reportMissingImports]
from torch import Tensor

from pcs_3d.export.asset import export_asset
from pcs_3d.export.settings import ExportSettings
from pcs_3d.schedules import Moment
from pcs_3d.threestudio.guide import cameras_of, losses
from pcs_3d.threestudio.lifted import Lifted
from pcs_3d.threestudio.march import March, Parts, Rays, check_cameras
from pcs_3d.threestudio.teacher import Asked, Prompts, Teacher, open_teacher

NAMES = ("pcs-prompt-processor", "pcs-guidance", "pcs-volume-renderer", "pcs-exporter")


def _teacher(cfg: Any, device: torch.device) -> Teacher:
    return open_teacher(Asked.of(cfg.backbone, cfg.concepts, cfg.recipe, cfg.settings, str(device), cfg.precision))


@register("pcs-prompt-processor")
class PersonalizedPromptProcessor(BaseObject):
    """Processes a prompt that refers to concepts as `<name>`, and adds the recipe's view words.

    Encodings are cached only in memory, and the concepts' contents are part of the cache key. threestudio's own
    guidance can also use this processor, but then only the concepts' learned words take effect, not their adapters or
    weights.
    """

    @dataclass
    class Config(BaseObject.Config):
        prompt: str = ""
        negative_prompt: str | None = None  # if null, the recipe's negative prompt
        backbone: str = ""
        concepts: dict[str, float] = field(default_factory=dict)
        recipe: str = "dreamfusion"
        settings: list[str] = field(default_factory=list)
        precision: str = "auto"

    cfg: Config

    def configure(self) -> None:
        self.prompts = Prompts(_teacher(self.cfg, self.device), self.cfg.prompt, self.cfg.negative_prompt)

    def __call__(self) -> Prompts:
        return self.prompts


@register("pcs-guidance")
class PersonalizedGuidance(BaseObject):
    """Computes the guidance of any single-phase recipe. `pcs methods` lists the recipes.

    concepts: maps each concept's folder to its strength.
    steps: the run's total number of steps, on which schedules depend.
    """

    @dataclass
    class Config(BaseObject.Config):
        # a folder, a file or a hub id; by default, the first concept's model or, without concepts, the toybox
        backbone: str = ""
        concepts: dict[str, float] = field(default_factory=dict)
        recipe: str = "dreamfusion"
        settings: list[str] = field(default_factory=list)  # applied on top of the recipe, such as guidance.scale=50
        precision: str = "auto"
        steps: int = 10000
        seed: int = 0

    cfg: Config

    def configure(self) -> None:
        self.teacher = _teacher(self.cfg, self.device)
        self.step = 0

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self.step = global_step

    def __call__(
        self,
        rgb: Tensor,
        prompt_utils: Prompts,
        elevation: Tensor,
        azimuth: Tensor,
        camera_distances: Tensor,
        rgb_as_latents: bool = False,
        guidance_eval: bool = False,
        **batch: Any,
    ) -> dict[str, Any]:
        if guidance_eval:
            raise ValueError("pcs-guidance does not produce evaluation images: set freq.guidance_eval to 0")
        cameras = cameras_of(elevation, azimuth, camera_distances, batch.get("fovy"))
        moment = Moment(self.step, self.cfg.steps)
        return losses(self.teacher, prompt_utils, rgb, cameras, moment, self.cfg.seed, rgb_as_latents)


@register("pcs-volume-renderer")
class BatchedVolumeRenderer(VolumeRenderer):
    """Renders any geometry that has a density by marching rays through it, on any device."""

    @dataclass
    class Config(VolumeRenderer.Config):
        samples: int = 64
        importance: int = 0
        hidden: float = 5e-4
        chunk: int = 4096

    cfg: Config

    def forward(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        light_positions: Tensor,
        bg_color: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if "c2w" in kwargs:
            check_cameras(kwargs["c2w"])
        if bg_color is not None and bg_color.ndim == 2:  # one colour per view or per ray
            whole = len(bg_color) == rays_d[..., 0].numel()
            bg_color = bg_color.reshape(*rays_d.shape[:3], -1) if whole else bg_color[:, None, None]
        how = March(self.cfg.radius, self.cfg.samples, self.cfg.importance, self.cfg.hidden, self.cfg.chunk)
        parts = Parts(self.geometry, self.material, self.background, kwargs if self.training else {})
        draw = None
        if self.training:  # reproducible, because launch.py sets the seed
            draw = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        return how.render(parts, Rays(rays_o, rays_d, light_positions, bg_color), self.training, draw)


@register("pcs-exporter")
class AssetExporter(Exporter):
    """Writes GLB, OBJ (with MTL and PNG) and PLY files, and reads each file back to check it. Needs no rasterizer."""

    @dataclass
    class Config(Exporter.Config):
        save_name: str = "asset"
        resolution: int = 96
        threshold: float | None = None  # if null, found automatically
        faces: int = 20_000
        texture: int = 512

    cfg: Config

    def __call__(self) -> list[Any]:
        cfg = self.cfg
        how = ExportSettings(resolution=cfg.resolution, threshold=cfg.threshold, faces=cfg.faces, texture=cfg.texture)
        self.folder = TemporaryDirectory()  # kept alive, because threestudio copies the files after this method returns
        made = export_asset(Lifted(self.geometry, self.material), Path(self.folder.name), how, cfg.save_name)
        for note in made.notes:
            info(note)
        return [ExporterOutput(f.name, "file", {"src_path": str(f)}) for f in made.files]
