"""Fixtures that write tiny clips and models to disk for tests that use clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.io.clips.write_clip import write_clip
from tests.video.clip_models import build_animatediff, motion_adapter

FRAMES = 4
FAST = ("train.steps=2", "train.resolution=32", "sampling.steps=2", "sources.clips.window.length=4", "preview.num=1")


def moving_square(seed: int = 0, frames: int = 6, side: int = 32) -> Tensor:
    """Returns a clip of a coloured square that slides over smooth noise, `[3, F, S, S]` in [-1, 1]."""
    draw = torch.Generator().manual_seed(seed)
    ground = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=draw), (side, side), mode="bicubic")[0]
    clip = ground[:, None].repeat(1, frames, 1, 1)
    colour = torch.rand(3, 1, 1, generator=draw)
    for i in range(frames):
        clip[:, i, 10:20, 3 * i : 3 * i + 10] = colour
    return clip.clamp(0, 1) * 2 - 1


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes two captioned clips of a sliding square, one as an MP4 file and the other as a folder of frames."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", moving_square(0), 8)
    write_clip(folder / "b", moving_square(1), 8)
    for name, text in (("a", "a red toy on the beach"), ("b", "a blue mug in the snow")):
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory: pytest.TempPathFactory, make_tiny_sd: Callable[..., Any]) -> Path:
    """Saves a tiny AnimateDiffPipeline as a folder."""
    folder = tmp_path_factory.mktemp("animatediff")
    build_animatediff(make_tiny_sd()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture_model(tmp_path_factory: pytest.TempPathFactory, make_tiny_sd: Callable[..., Any]) -> Path:
    """Saves a tiny StableDiffusionPipeline, which is the same model as `clip_model` without its motion modules."""
    folder = tmp_path_factory.mktemp("sd")
    make_tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves only the motion modules of `clip_model`, as a MotionAdapter."""
    folder = tmp_path_factory.mktemp("adapter")
    motion_adapter().save_pretrained(folder)
    return folder
