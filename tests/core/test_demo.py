"""The demo runs its parts one after another and shows their results on one page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared import demo
from shared.io.clips.write_clip import write_clip
from shared.io.contact_sheets import write_picture

ASKED = demo.Asked(Path(), "development-robot", "pivotal_tuning", "development-zigzag", "motion_director", "hifa")
BARS = demo.Bars(nullcontext, nullcontext)


class Painter:
    """A demo part that shows a blank picture or clip."""

    def __init__(self, ending: str, refused: str = "") -> None:
        self.ending, self.refused = ending, refused

    def check(self, asked: demo.Asked) -> None:
        if asked.motion == self.refused:
            raise ValueError(f"no motion {asked.motion}")

    def show(self, asked: demo.Asked, bars: demo.Bars) -> Iterator[str | demo.Exhibit]:
        file = asked.out / f"made{self.ending}"
        if self.ending == ".png":
            write_picture(torch.zeros(3, 8, 500), file)
        else:
            write_clip(file, torch.zeros(3, 2, 8, 8), 8)
        yield f"made {self.ending}"
        yield demo.Exhibit("Title", file, "<b> & text", [("identity", "0.91")], {"the report": file})


def test_all_parts_share_one_subject_and_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "parts", lambda names: {"image": Painter(".png"), "video": Painter(".webp")})
    asked = replace(ASKED, out=tmp_path / "demo")
    lines = list(demo.run(asked, [], False, BARS))
    assert [line for line in lines if line.startswith("made")] == ["made .png", "made .webp"]
    page = (asked.out / "index.html").read_text("utf-8")
    assert page.count("data:image/png") == 6 and page.count("data:image/webp") == 1  # five references and one picture
    assert "&lt;b&gt; &amp; text" in page and 'href="made.webp"' in page and "0.91" in page
    assert asked.concept.name == "my-robot.concept"
    with pytest.raises(ValueError, match="exists"):
        next(demo.run(asked, [], False, BARS))


def test_unknown_names_are_refused_before_anything_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "demo"
    asked = replace(ASKED, out=kept)
    monkeypatch.setattr(demo, "parts", lambda names: {"image": Painter(".png"), "video": Painter(".webp", "none")})
    list(demo.run(asked, [], False, BARS))
    before = sorted(p.name for p in kept.iterdir())
    with pytest.raises(ValueError, match="no motion none"):
        next(demo.run(replace(asked, motion="none"), [], True, BARS))
    assert sorted(p.name for p in kept.iterdir()) == before


def test_a_failed_demo_keeps_the_earlier_one_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Painter):
        def show(self, asked: demo.Asked, bars: demo.Bars) -> Iterator[str | demo.Exhibit]:
            assert (out / "index.html").read_text("utf-8") == page, "the earlier demo stays while the new one runs"
            yield from super().show(asked, bars)
            raise MemoryError

    out, used = tmp_path / "demo", {"image": Painter(".png")}
    monkeypatch.setattr(demo, "parts", lambda names: used)
    list(demo.run(replace(ASKED, out=out), [], False, BARS))
    page = (out / "index.html").read_text("utf-8")
    used["video"] = Failing(".webp")
    for place, overwrite in ((out, True), (tmp_path / "new", False)):
        with pytest.raises(MemoryError):
            list(demo.run(replace(ASKED, out=place), [], overwrite, BARS))
    assert (out / "index.html").read_text("utf-8") == page and not (out / "made.webp").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_a_link_to_an_earlier_demo_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, link = tmp_path / "disk" / "demo", tmp_path / "link"
    monkeypatch.setattr(demo, "parts", lambda names: {"image": Painter(".png")})
    list(demo.run(replace(ASKED, out=place), [], False, BARS))
    link.symlink_to(place)
    monkeypatch.setattr(demo, "parts", lambda names: {"image": Painter(".webp")})
    lines = list(demo.run(replace(ASKED, out=link), [], True, BARS))
    assert f"page         {link / 'index.html'}" in lines and lines[0].endswith(f" in {link / 'references'}")
    assert link.is_symlink() and (place / "made.webp").is_file() and not (place / "made.png").exists()


def test_every_installed_package_provides_a_part_of_the_demo() -> None:
    found: Any = demo.parts()
    assert [part.__name__ for part in found.values()] == ["pcs_image.demo", "pcs_video.demo", "pcs_3d.demo"]
    assert list(demo.parts(["video"])) == ["video"]
    with pytest.raises(ValueError, match=r"--part: .*imag.*image"):
        demo.parts(["imag"])
    for part in found.values():
        part.check(ASKED)
        with pytest.raises(ValueError, match="recipe"):
            part.check(replace(ASKED, recipe="nonesuch", motion_recipe="nonesuch", asset_recipe="nonesuch"))


def test_the_overview_has_a_row_for_each_part_that_returns_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shown(Painter):
        def show(self, asked: demo.Asked, bars: demo.Bars) -> Iterator[str | demo.Exhibit]:
            for made in super().show(asked, bars):
                yield replace(made, shots=-torch.ones(7, 3, 128, 128)) if isinstance(made, demo.Exhibit) else made

    sizes = []
    for part in (Painter(".png"), Shown(".png")):
        monkeypatch.setattr(demo, "parts", lambda names, part=part: {"image": part})
        lines = list(demo.run(replace(ASKED, out=tmp_path / "demo"), [], True, BARS))
        assert any(line.startswith("overview") for line in lines)
        with Image.open(tmp_path / "demo" / "overview.png") as sheet:
            sizes.append(sheet.size)
            pixels = np.asarray(sheet.convert("RGB"))
    # The second overview has one more row of five pictures.
    assert sizes[1][0] == sizes[0][0] and sizes[1][1] > sizes[0][1] + 128
    assert (pixels[-100:-20, -600:-20] == 0).mean() > 0.9  # black pictures with gaps between them
