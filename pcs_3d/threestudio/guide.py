"""Computes one step of guidance on views rendered by a threestudio system."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras
from pcs_3d.guidance.engine import guide, surrogate
from pcs_3d.guidance.pixel_loss import pixel_loss
from pcs_3d.schedules import Moment
from pcs_3d.threestudio.teacher import Prompts, Teacher
from shared.train.loop import generator


def cameras_of(elevation: Tensor, azimuth: Tensor, distances: Tensor, fovy: Tensor | None = None) -> Cameras:
    """Returns the cameras of a threestudio batch. `elevation` and `azimuth` are in degrees, and `fovy` is in radians.
    threestudio uses the same axes as this package: x points to the front, and z points up."""
    fov_deg = torch.full_like(distances, 45.0) if fovy is None else fovy * (180 / math.pi)
    return Cameras.of(azimuth.cpu(), elevation.cpu(), distances.cpu(), fov_deg.cpu())


def losses(
    teacher: Teacher, prompts: Any, rgb: Tensor, cameras: Cameras, moment: Moment, seed: int, latents: bool = False
) -> dict[str, Any]:
    """Returns `loss_sds`, a scalar whose gradient is the guidance's gradient, and further values to log. If the teacher
    has a student, also trains it.

    Args:
        rgb: pixels [B, H, W, 3] in [0, 1] or, if `latents` is set, latents [B, h, w, C], which are resized to the
            backbone's latent size but not encoded

    Raises:
        ValueError: the prompts are from a different processor or teacher, the latents have the wrong number of
            channels, or the recipe has a pixel loss but only latents are given
    """
    if not isinstance(prompts, Prompts) or prompts.teacher is not teacher:
        raise ValueError(
            "prompt_processor: pcs-guidance needs pcs-prompt-processor with the same backbone, concepts, recipe and "
            "settings; refer to them in the YAML file, as in concepts: ${system.guidance.concepts}"
        )
    settings, scores, draw = teacher.recipe.guidance, prompts.scores, generator(seed, moment.step)
    with torch.autocast(rgb.device.type, enabled=False):
        pixels = rgb.permute(0, 3, 1, 2).float()
        z = _as_latents(pixels, teacher) if latents else scores.encode(pixels)
        views = prompts.scene.views(cameras, draw)
        guided = guide(settings, scores, z.detach(), views, prompts.scene, moment, draw)
        loss = surrogate(z, guided.grad.to(z))
        weight = moment.of(settings.pixel_weight)
        if weight and latents:
            raise ValueError(
                "guidance.pixel_weight needs pixels to compare, but the renderer outputs latents: add "
                "guidance.pixel_weight=0 to settings, or render colours"
            )
        if weight:
            loss = loss + weight * pixel_loss(settings, scores, guided, pixels)
    said = {"grad_norm": guided.grad.norm(), "noise_level": guided.noised.t.float().mean() / 1000}
    if teacher.student is not None:
        said["student"] = teacher.student.learn(scores, z, views, moment, seed)
    return {"loss_sds": loss, **said}


def _as_latents(given: Tensor, teacher: Teacher) -> Tensor:
    backbone = teacher.runner.backbone
    channels, *size = backbone.latent_shape(backbone.resolution, backbone.resolution)
    if given.shape[1] != channels:
        raise ValueError(
            f"the renderer outputs latents with {given.shape[1]} channels, but {backbone.name} needs {channels}: set "
            "material.n_output_dims and background.n_output_dims"
        )
    return given if list(given.shape[-2:]) == size else F.interpolate(given, size, mode="bilinear")
