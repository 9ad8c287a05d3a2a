"""Tiny video-transformer backbones, and helpers for testing them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcs_video.backbones.ltx import LTXBackbone
from pcs_video.backbones.wan import WanBackbone
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.recipe.resolve import load
from shared.runner.plan import plan
from shared.train.training_run import TrainingRun
from shared.trainable.lora import Lora
from tests.video.conftest import FAST
from tests.video.transformer_models import build_ltx, build_wan

FAMILIES: dict[str, Callable[[], Any]] = {
    "wan": lambda: WanBackbone(build_wan(), "tiny"),
    "wan 2.2": lambda: WanBackbone(build_wan(experts=2), "tiny"),
    "ltx": lambda: LTXBackbone(build_ltx(), "tiny"),
}
TIMES = torch.tensor([900, 300])  # on both sides of the boundary between Wan 2.2's experts


def frames_of(backbone: Any) -> int:
    return backbone.frame_factor + 1


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ask(backbone: Any, prompts: tuple[str, ...] = ("a mug", "a dog on the beach"), seed: int = 0) -> Tensor:
    return backbone.predict(noise(2, 4, 2, 4, 4, seed=seed), TIMES, backbone.encode(list(prompts)))


def networks(backbone: Any) -> list[str]:
    return list(backbone.noise_ranges)


def learn(backbone: Any, name: str = "my-mug", slot: str = "lora", **settings: Any) -> None:
    group = Lora(**{"roles": ("cross_attention", "self_attention"), "rank": 3, **settings}).inject(
        backbone, name, slot, 0
    )
    draw = torch.Generator().manual_seed(1)
    for parameter in group.parameters:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)


def run_on_clips(
    backbone: Any, folder: Path, tmp_path: Path, length: int, recipe: str = "animatediff_motion_lora", *settings: str
) -> TrainingRun:
    asked = [f"subject.clips={folder}", f"output={tmp_path / 'm.concept'}", *FAST, "trainable.temporal.rank=2"]
    asked += [f"sources.clips.window.length={length}", "train.steps=1", *settings]
    planned = plan(load(recipe, asked, "video", VideoRecipe))
    return TrainingRun(
        backbone, planned.recipe, planned.subjects, planned.workdir, tmp_path / "cache", tensorboard=False,
        tasks=VideoRunner.tasks,
    )  # fmt: skip


def nothing(site: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, rows: Any) -> Any:
    return q, k, v, bias


def pipeline_clips(pipe: Any, frames: int, **options: Any) -> Tensor:
    """Samples two clips with a diffusers pipeline. Returns them as `[2, 3, F, 32, 32]` in [-1, 1]."""
    pipe.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 4, "negative_prompt": ["blurry"] * 2}
    made = pipe(
        ["a red mug", "a dog"], height=32, width=32, num_frames=frames, output_type="pt", max_sequence_length=48,
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)], **{**asked, **options},
    ).frames  # fmt: skip
    return torch.as_tensor(made).transpose(1, 2).float() * 2 - 1
