"""Generates pictures for `pcs concept evaluate`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pcs_image.runner import ImageRunner
from shared.benchmark.modality import Asked, Made
from shared.benchmark.modality_shots import shots_of
from shared.io.contact_sheets import write_picture
from shared.runner.bars import Bars
from shared.runner.open_runner import open_runner


def check(asked: Asked) -> None:
    """Raises ValueError if the model does not generate pictures, or if the concept does not fit it."""
    _opened(asked)


def make(asked: Asked, bars: Bars) -> Made:
    """Generates a picture for each standard prompt and each seed."""
    return shots_of(_opened(asked), asked.inside("pictures"), bars, _write)


def _opened(asked: Asked) -> ImageRunner:
    runner = open_runner(ImageRunner, asked.backbone, [asked.concept], asked.device, "auto", asked.download)
    if runner.backbone.frames is not None:
        raise ValueError(f"{runner.backbone.name} generates clips, not pictures")
    return runner


def _write(pixels: Tensor, path: Path) -> Path:
    file = path.with_name(f"{path.name}.png")
    write_picture(pixels, file)
    return file
