"""Draws contact sheets of the toybox's pictures (`pcs toybox sheet`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.config import unknown
from shared.io.contact_sheets import check_tiles, write_picture
from shared.io.outputs import check_file
from shared.pretrain.evaluators.judge_backbone import generate
from shared.pretrain.evaluators.reconstructions import load_vae, round_trip
from shared.pretrain.toybox.evaluate_backbone import open_pipeline
from shared.toybox.captioned_sheet import sheet
from shared.toybox.captions import caption
from shared.toybox.render import render
from shared.toybox.weights import backbone_path, sampling_defaults
from shared.toybox.world import sample_scene

SOURCES = ("world", "model", "vae")


@dataclass(frozen=True)
class SheetSettings:
    """Settings for a sheet, which shows renders (`world`), the model's pictures (`model`), or renders next to their
    reconstructions by the autoencoder (`vae`).

    Raises ValueError if the source is unknown, or if options of the model (`guidance`, `prompts`) are set for another
    source.
    """

    source: str = "world"
    rows: int = 4
    columns: int = 8
    seed: int = 0
    guidance: float | None = None  # by default, that of the shipped model
    prompts: Sequence[str] = ()  # instead of random captions

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(unknown(self.source, SOURCES, "source"))
        given = {"--prompt": bool(self.prompts), "--guidance": self.guidance is not None}
        unheeded = " and ".join(name for name, is_given in given.items() if is_given)
        if self.source != "model" and unheeded:
            raise ValueError(f"{unheeded} with --source {self.source}: only supported with --source model")


def draw_sheet(out: Path, settings: SheetSettings, overwrite: bool = False) -> Path:
    """Writes a captioned sheet. Raises ValueError if `out` is not a PNG, or may not be written or overwritten."""
    if out.suffix.lower() != ".png" and not out.is_dir():
        raise ValueError(f"{out}: a sheet is a PNG, so its name must end in .png")
    check_tiles(settings.rows * settings.columns, f"--rows {settings.rows} --columns {settings.columns}")
    check_file(out, overwrite)
    rng, source = np.random.default_rng(settings.seed), settings.source
    scenes = [sample_scene(rng) for _ in range(settings.rows * settings.columns)]
    texts = [caption(s, rng, full=source == "model" and len(s.things) == 1) for s in scenes]
    if source == "model":
        texts = list(settings.prompts) or texts
        defaults = sampling_defaults()
        guidance = defaults["guidance"] if settings.guidance is None else settings.guidance
        pixels = generate(open_pipeline(None), texts, guidance, defaults["steps"], settings.seed)
    else:
        pixels = render(scenes).pixels
    if source == "vae":
        pixels, texts = _beside(pixels), [t for t in texts for _ in range(2)]
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_picture(sheet(pixels, settings.columns, texts), out)


def _beside(pixels: Tensor) -> Tensor:
    """Returns the N pictures, each followed by its reconstruction, [2 N, …]."""
    decoded = round_trip(load_vae(backbone_path() / "vae"), pixels)
    return torch.stack([pixels, decoded], 1).flatten(0, 1)
