"""Pictures as files: from prompts to a folder of PNGs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pcs_image.runner import ImageRunner
from shared.io.contact_sheets import grid, write_picture
from shared.io.outputs import atomic_folder, check_output
from shared.runner.metadata import metadata
from shared.sampling.settings import SamplingSettings


def generate(
    runner: ImageRunner,
    prompts: Sequence[str],
    out: Path,
    settings: SamplingSettings = SamplingSettings(),
    *,
    num: int = 1,
    seed: int = 0,
    overwrite: bool = False,
    as_grid: bool = False,
) -> list[Path]:
    """`num` pictures per prompt with seeds seed, seed + 1, …: one PNG each, with all that made it inside."""
    check_output(out, overwrite)
    shots = [(p, seed + i) for p in prompts for i in range(num)]
    pixels = runner.generate([p for p, _ in shots], [s for _, s in shots], settings)
    paths = []
    with atomic_folder(out, overwrite=overwrite) as folder:
        for index, ((prompt, number), picture) in enumerate(zip(shots, pixels, strict=True)):
            name = f"{index:03d}-seed{number}.png"
            write_picture(picture, folder / name, metadata(prompt, number, runner, settings))
            paths.append(out / name)
        if as_grid:
            write_picture(grid(pixels, columns=num), folder / "grid.png", {"pcs": json.dumps({"columns": num})})
            paths.append(out / "grid.png")
    return paths
