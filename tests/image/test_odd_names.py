"""Commands accept pictures with any name that the file system allows, and no file name makes a run lose its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.io.terminal import escaped_name
from tests.core.test_file_names import NAMES
from tests.image.test_interrupted import tensors

PRINTS = """
import shared.cli, typer
app = typer.Typer()
app.command()(lambda: print(chr(0xDCFF), chr(0x5199)))
shared.cli.build = lambda: app
shared.cli.main([])
"""


@pytest.fixture
def odd(painted, tmp_path: Path) -> Path:
    """Returns an oddly named folder of oddly named pictures, one of which has a caption."""
    folder = painted(tmp_path / "caf\udce9 \u202f#1", n=len(NAMES))
    for i, name in enumerate(NAMES):
        (folder / f"{i}.png").rename(folder / f"{name}.png")
    (folder / f"{NAMES[0]}.txt").write_text("a mug on a table")
    (folder / "not a \udcff picture").write_text("x")
    return folder


def test_a_concept_learned_from_pictures_with_any_name_can_be_shown_and_evaluated(
    pcs, learn, odd, dino, tmp_path: Path
) -> None:
    concept = tmp_path / "mug.concept"
    arguments = learn("pivotal_tuning", f"output={concept}", "train.validation.every=1", images=odd)
    ran = pcs(*arguments, "--dino", dino)
    assert ran.code == 0, ran.err
    meta = json.loads((concept / "concept.json").read_text(encoding="utf-8"))
    assert [r["file"] for r in meta["references"]] == sorted(escaped_name(f"{n}.png") for n in NAMES)
    assert pcs("concept", "show", concept).code == 0 and pcs("concept", "show", concept, "--json").code == 0
    report = tmp_path / "report"
    options = ("--limit", 1, "--num", 1, "--steps", 1, "--dino", dino, "--out", report)
    judged = pcs("image", "evaluate", "--concept", concept, *options)
    assert judged.code == 0, judged.err
    again = pcs(*arguments, "--dino", dino, "--resume")
    assert again.code == 0 and again.out.startswith("already finished"), again.err


def test_a_run_with_odd_names_can_be_interrupted_and_resumed(pcs, interrupted, learn, odd, tmp_path: Path) -> None:
    settings = (f"sources.mine.images={odd}", "sources.mine.kind=folder", "sources.mine.prompt=a mug", "train.steps=3")
    whole, cut = tmp_path / "whole.concept", tmp_path / "cut.concept"
    assert pcs(*learn("pivotal_tuning", f"output={whole}", *settings, images=odd)).code == 0
    arguments = learn("pivotal_tuning", f"output={cut}", *settings, "name=whole", images=odd)
    assert interrupted(*arguments).code == 130
    resumed = pcs(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    assert tensors(cut) == tensors(whole)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_odd_text_can_be_printed_on_any_terminal(tmp_path: Path, encoding: str) -> None:
    """Messages contain file names and prompts. Characters that a terminal cannot show are escaped."""
    (tmp_path / "\udcff").mkdir()
    (tmp_path / "\udcff" / "\u202f写.txt").write_text("x")
    arguments = ("image", "personalize", "textual_inversion", f"subject.images={tmp_path / chr(0xDCFF)}")
    command = [sys.executable, "-m", "shared.cli", *arguments, f"output={tmp_path / 'x.concept'}"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, timeout=120)
    stderr = done.stderr.decode(encoding)
    assert done.returncode == 2 and stderr.startswith("pcs: no pictures in") and "Traceback" not in stderr
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0 and done.stdout.startswith(b"\\udcff "), done.stderr
