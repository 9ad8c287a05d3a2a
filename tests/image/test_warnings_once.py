"""A command that reads unusual pictures prints each warning only once, however often it reads the pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image


def test_each_warning_is_printed_once(learn, painted, tmp_path):
    photos = painted(tmp_path / "photos", 2)
    frames = [Image.new("RGB", (48, 48), color) for color in ("red", "green", "blue")]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (90, 160), "red").save(photos / "tall.png")
    (photos / "0.txt").write_text("on a table")
    arguments = learn("textual_inversion", f"output={tmp_path / 'x.concept'}", images=photos)
    done = subprocess.run(
        [sys.executable, "-m", "shared.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "moving.gif has 3 frames",
        "tall.png is 90x160, and the crop",
        "3 of 4 pictures have no caption: 1.png",
    ):
        assert done.stderr.count(words) == 1, done.stderr
