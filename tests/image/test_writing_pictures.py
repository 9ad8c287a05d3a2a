"""Pictures are written once they are done, so that memory use does not grow with their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pcs_image.pictures import PictureFolder, generate
from pcs_image.runner import ImageRunner
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.io.contact_sheets import MOST_SHEET, grid, to_image
from shared.io.decode import read_picture
from shared.sampling.settings import SamplingSettings

TINY = SamplingSettings(steps=1, height=32, width=32)


@pytest.fixture
def runner(tiny_sd: Any) -> ImageRunner:
    return ImageRunner(StableDiffusionBackbone(tiny_sd, "tiny"))


def test_pictures_are_written_before_the_next_ones_are_made(runner: ImageRunner, tmp_path: Path) -> None:
    written: list[int] = []
    paths = generate(
        runner, ["a mug", "a duck"], PictureFolder(tmp_path / "out", with_grid=True), TINY, seeds=range(10),
        progress=lambda done, of: written.append(len([*tmp_path.rglob("*-seed*.png")])),
    )  # fmt: skip
    assert written == [0, 8, 16]
    assert [p.name for p in paths[::20]] == ["000-seed0.png", "grid.png"] and len(paths) == 21
    pixels = runner.generate(["a mug"] * 10 + ["a duck"] * 10, [*range(10)] * 2, TINY)
    assert to_image(read_picture(paths[13]).pixels) == to_image(pixels[13])
    assert to_image(read_picture(paths[20]).pixels) == grid(pixels, columns=10)


def test_nothing_is_left_if_a_later_picture_fails(runner: ImageRunner, tmp_path: Path) -> None:
    def stop(done: int, of: int) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(runner, ["a mug"], PictureFolder(tmp_path / "out"), TINY, seeds=range(9), progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_too_long_is_refused_before_any_picture_is_made(runner: ImageRunner, tmp_path: Path) -> None:
    made: list[int] = []
    prompts = ["a mug", "a mug " * 200]
    with pytest.raises(ValueError, match="tokens"):
        generate(
            runner, prompts, PictureFolder(tmp_path / "out"), TINY, seeds=range(8), progress=lambda *_: made.append(1)
        )
    assert not made


def test_a_grid_too_large_for_memory_is_refused_before_any_picture_is_made(runner: ImageRunner, tmp_path: Path) -> None:
    made: list[int] = []
    seeds = range(MOST_SHEET // 512**2 + 1)
    large = SamplingSettings(steps=1, height=512, width=512)
    with pytest.raises(
        ValueError, match=r"--grid: 1,025 pictures of 512x512 pixels .*; choose a lower --num, or leave out"
    ):
        generate(
            runner, ["a mug"], PictureFolder(tmp_path / "out", with_grid=True), large, seeds=seeds,
            progress=lambda *_: made.append(1),
        )  # fmt: skip
    assert not made and list(tmp_path.iterdir()) == []
