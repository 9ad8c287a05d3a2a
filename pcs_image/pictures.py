"""Generates pictures from prompts and writes them to a folder as PNGs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pcs_image.runner import ImageRunner
from shared.io.contact_sheets import Grid, check_sheet, write_picture
from shared.io.denoising_progress import Steps
from shared.io.locks import holding
from shared.io.outputs import atomic_folder, check_output
from shared.runner.png_metadata import metadata
from shared.sampling.sampler import output_size
from shared.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class PictureFolder:
    """The folder to which pictures are written."""

    path: Path
    overwrite: bool = False
    with_grid: bool = False  # whether to also write all pictures as one grid


@holding()
def generate(
    runner: ImageRunner,
    prompts: Sequence[str],
    out: PictureFolder,
    settings: SamplingSettings = SamplingSettings(),
    *,
    seeds: Sequence[int] = (0,),
    progress: Steps | None = None,
) -> list[Path]:
    """Writes one PNG for each prompt and seed, with the metadata needed to reproduce it. Returns the paths. Pictures are
    written once they are done, so memory use does not grow with their number."""
    check_output(out.path, out.overwrite)
    settings = runner.with_own_sampling(settings)
    shots = [(p, s) for p in prompts for s in seeds]
    *_, height, width = output_size(runner.backbone, settings)
    if out.with_grid:
        check_sheet("--grid", len(shots), (height, width))
    grid = Grid(len(shots), len(seeds), (height, width)) if out.with_grid else None
    names = [f"{index:03d}-seed{number}.png" for index, (_, number) in enumerate(shots)]
    made = runner.generate_each([p for p, _ in shots], [s for _, s in shots], settings, progress=progress)
    with atomic_folder(out.path, overwrite=out.overwrite) as folder, closing(made):
        for rows, pixels in made:
            for row, picture in zip(rows, pixels, strict=True):
                write_picture(picture, folder / names[row], metadata(*shots[row], runner, settings))
                if grid:
                    grid.add(row, picture)
        if grid:
            write_picture(grid.sheet, folder / "grid.png", {"pcs": json.dumps({"columns": len(seeds)})})
            names.append("grid.png")
    return [out.path / name for name in names]
