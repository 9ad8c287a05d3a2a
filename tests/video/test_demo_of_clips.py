"""The clip part of the demo learns a motion and shows the subject in clips of it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from pcs_video import demo
from shared.demo import Asked, Bars, Exhibit
from shared.io.clips.open_frames import open_frames

QUICK = """
base: animatediff_motion_lora
train: {steps: 1}
sources: {clips: {window: {length: 2}}}
sampling: {steps: 1, guidance: 1}
preview: {num: 0}
"""


def test_a_motion_is_learned_and_shown_in_two_places(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(QUICK)
    asked = Asked(tmp_path, "development-robot", "t_lora", "development-zigzag", str(tmp_path / "quick.yaml"), "hifa")
    demo.check(asked)
    shown = list(demo.show(asked, Bars(nullcontext, nullcontext)))
    lines = [made for made in shown if isinstance(made, str)]
    assert [line.split()[0] for line in lines] == ["clips", "motion", "clip", "clip"]
    assert (tmp_path / "zigzag.concept" / "concept.json").is_file()
    exhibits = [made for made in shown if isinstance(made, Exhibit)]
    # nothing was learned from pictures, so the prompt names the class
    assert [e.text for e in exhibits] == [f"“a photo of a robot <zigzag> {p}”" for p in ("on the beach", "in the snow")]
    for exhibit in exhibits:
        assert exhibit.file.suffix == ".webp" and all(file.is_file() for file in exhibit.more.values())
        assert open_frames(exhibit.file).count == 16
        assert exhibit.shots is not None and exhibit.shots.shape[:2] == (5, 3)
