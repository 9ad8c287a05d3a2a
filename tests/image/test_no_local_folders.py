"""No file that is made to be shared names the folders of the user who made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.benchmark.experiment import Experiment, benchmark, pictures
from shared.concept.provenance import portable_text


def naming(folder: Path, root: Path) -> list[str]:
    """Returns the files under a folder that contain the path `root`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    assert files
    return [p.name for p in files if str(root).encode() in p.read_bytes()]


def test_concepts_exports_pictures_and_clips_name_no_local_folder(
    pcs: Any, concepts: dict[str, Path], tiny_folder: Path, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    root, mug = tmp_path_factory.getbasetemp(), concepts["mug"]
    monkeypatch.setenv("HOME", str(root))
    picture = next(photos.glob("*.png"))
    asked = ("--concept", mug, "--steps", 2, "--backbone", tiny_folder)
    for command in (
        ("concept", "export", mug, "--out", tmp_path / "export", "--backbone", tiny_folder),
        ("image", "generate", "a <mug>", *asked, "--out", tmp_path / "pictures", "--invert", picture, "--grid"),
        *(
            ("video", "generate", "a <mug>", *asked, "--out", tmp_path / f"clips/a.{kind}", "--first-frame", picture,
             "--frames", 2, "--motion-adapter", "none")
            for kind in ("mp4", "gif", "webp")
        ),
    ):  # fmt: skip
        ran = pcs(*command)
        assert ran.code == 0, ran.err
    assert {"export.json", "a.mp4", "000-seed0.png"} <= {p.name for p in tmp_path.rglob("*")}
    assert naming(tmp_path, root) == [] and naming(mug, root) == []
    (tmp_path / "leak.txt").write_text(f"learned on {tiny_folder}")
    assert naming(tmp_path, root) == ["leak.txt"]


def test_a_benchmark_names_no_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(recipe: str, subject: str, folder: Path) -> Any:
        raise ValueError(f"{tmp_path / 'jane' / 'model'} has no model_index.json; {tmp_path}: see the log")

    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = {"backbone": str(tmp_path / "jane" / "model"), "subject": {"images": str(tmp_path / "jane" / "photos")}}
    table: Any = pictures()
    settings = {"clip": str(tmp_path / "clip")}
    found = benchmark(fail, Experiment({"a": recipe}, ["mug"], "two", [0], settings), tmp_path / "out", table)
    (kept,) = (tmp_path / "out").rglob("cell.json")
    cell = json.loads(kept.read_text())
    assert cell["inputs"]["recipe"] == {"backbone": "model", "subject": {"images": "photos"}}
    assert cell["inputs"]["settings"]["clip"] == "clip"
    assert list(found.failures.values()) == ["ValueError: ~/jane/model has no model_index.json; ~: see the log"]
    assert 'File "shared/benchmark/experiment.py", line ' in cell["traceback"]
    assert naming(tmp_path / "out", tmp_path) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cannot read '/data/jane/My Pictures/a.png': no", "cannot read 'My Pictures/a.png': no"),
        ("C:\\Users\\jane\\a.png is damaged", "a.png is damaged"),
        ("~/a.png, /imagine a cat and/or a dog", "~/a.png, /imagine a cat and/or a dog"),
        ("see https://a.org/b/c and runwayml/sd", "see https://a.org/b/c and runwayml/sd"),
        ("a.png/b/c: Not a directory: 1/2", "a.png/b/c: Not a directory: 1/2"),
    ],
)
def test_only_the_folders_of_absolute_paths_are_removed_from_a_text(text: str, said: str) -> None:
    assert portable_text(text) == said


def test_modules_in_a_traceback_start_at_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("/opt/jane/site-packages")
    assert portable_text('File "/opt/jane/site-packages/torch/nn/a.py", line 3') == 'File "torch/nn/a.py", line 3'
