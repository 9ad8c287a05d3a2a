"""Generates pictures from prompts and writes them to a folder as PNGs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pcs_image.runner import ImageRunner
from shared.io.contact_sheets import grid, write_picture
from shared.io.denoising_progress import Steps
from shared.io.outputs import atomic_folder, check_output
from shared.runner.png_metadata import metadata
from shared.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class PictureFolder:
    """The folder to which pictures are written."""

    path: Path
    overwrite: bool = False
    with_grid: bool = False  # whether to also write all pictures as one grid


def generate(
    runner: ImageRunner,
    prompts: Sequence[str],
    out: PictureFolder,
    settings: SamplingSettings = SamplingSettings(),
    *,
    seeds: Sequence[int] = (0,),
    progress: Steps | None = None,
) -> list[Path]:
    """Writes one PNG for each prompt and seed, with the metadata needed to reproduce it. Returns the paths."""
    check_output(out.path, out.overwrite)
    settings = runner.with_own_sampling(settings)
    shots = [(p, s) for p in prompts for s in seeds]
    pixels = runner.generate([p for p, _ in shots], [s for _, s in shots], settings, progress=progress)
    paths = []
    with atomic_folder(out.path, overwrite=out.overwrite) as folder:
        for index, ((prompt, number), picture) in enumerate(zip(shots, pixels, strict=True)):
            name = f"{index:03d}-seed{number}.png"
            write_picture(picture, folder / name, metadata(prompt, number, runner, settings))
            paths.append(out.path / name)
        if out.with_grid:
            write_picture(
                grid(pixels, columns=len(seeds)), folder / "grid.png", {"pcs": json.dumps({"columns": len(seeds)})}
            )
            paths.append(out.path / "grid.png")
    return paths
