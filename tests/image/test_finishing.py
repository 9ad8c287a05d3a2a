"""No learned state is lost if a run fails or is interrupted near its end, for example while generating its preview."""

from __future__ import annotations

import contextlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from PIL import Image

from shared.concept import read
from shared.runner import learn as learn_module


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory.\nTried 2 GiB"),
        ValueError("out of memory"),
        MemoryError(),
    ],
)
def test_the_concept_is_saved_even_if_its_preview_fails(pcs, learn, tmp_path, monkeypatch, error):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    out = tmp_path / "x.concept"
    with (
        monkeypatch.context() as patch,
        pytest.warns(UserWarning, match=r"preview of 'x' could not be .*out of memory"),
    ):
        patch.setattr(learn_module, "preview", fail)
        assert pcs(*learn("textual_inversion", f"output={out}")).code == 0
    assert not (out / "preview.png").exists() and read(out).preview is None
    assert not list((tmp_path / "x.training").glob("checkpoint-*"))
    ran = pcs("image", "generate", "a <x>", "--concept", out, "--steps", 1, "--out", tmp_path / "o")
    assert ran.code == 0, ran.err
    assert pcs(*learn("textual_inversion", f"output={out}"), "--overwrite").code == 0
    assert read(out).preview == out / "preview.png"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(9)])
def test_a_run_stopped_during_its_preview_is_completed_when_resumed(pcs, learn, photos, tmp_path, monkeypatch, error):
    """Resuming works even if one of two concepts already exists, because the state is kept until both are complete."""

    def stop(*arguments: Any) -> Any:
        if arguments[1] == "b":
            raise error
        return painted(*arguments)

    painted, other = learn_module.preview, ("subjects.a.images", "subjects.b.images")
    two = [f"{key}={photos}" for key in other] + ["subjects.a.class_noun=mug", "subjects.b.class_noun=mug"]
    arguments = [*learn("pivotal_tuning", f"output={tmp_path / 'both'}", *two, images=None)]
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(learn_module, "preview", stop)
        assert pcs(*arguments).code == 130
    assert (tmp_path / "both/a.concept/preview.png").is_file() and not (tmp_path / "both/b.concept").exists()
    log = (tmp_path / "both.training/log.jsonl").read_text()
    resumed = pcs(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    assert (tmp_path / "both/b.concept/preview.png").is_file()
    assert (tmp_path / "both.training/log.jsonl").read_text() == log, "the resumed run trained nothing"
    assert not list((tmp_path / "both.training").glob("*checkpoint*"))


def test_resuming_a_finished_run_reports_it_and_trains_nothing(pcs, learn, painted, tmp_path):
    photos = painted(tmp_path / "photos")
    out = tmp_path / "x.concept"
    arguments = learn("textual_inversion", f"output={out}", images=photos)
    assert pcs(*arguments).code == 0
    left = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    again = pcs(*arguments, "--resume", "preview.num=1")
    assert (again.code, again.out) == (0, f"already finished: <x> is in {out}\n")
    other = pcs(*arguments, "--resume", "train.steps=9")
    assert other.code == 2 and "the finished run had train.steps = 2, but this one has 9" in other.err
    (photos / "9.png").write_bytes((photos / "0.png").read_bytes())
    more = pcs(*arguments, "--resume")
    assert more.code == 2 and "is finished, but was learned from other pictures" in more.err
    assert {p: p.stat().st_mtime_ns for p in left} == left


def test_the_preview_has_the_training_resolution_and_can_be_switched_off(pcs, learn, tmp_path):
    def size(name: str, *settings: str) -> tuple[int, int] | None:
        out = tmp_path / f"{name}.concept"
        ran = pcs(*learn("textual_inversion", f"output={out}", *settings))
        assert (ran.code == 0 and "preview of" in ran.err) or "preview.num=0" in settings, ran.err
        with Image.open(out / "preview.png") if (out / "preview.png").exists() else nullcontext() as sheet:
            return sheet.size if sheet else None

    small, large, one = size("a"), size("b", "train.resolution=64"), size("c", "preview.num=1")
    assert small and large and one and one[0] < small[0]
    assert size("d", "preview.num=0") is None
    assert size("e", "train.resolution=64", "preview.resolution=32") == small
    refused = pcs(*learn("textual_inversion", f"output={tmp_path / 'f.concept'}", "preview.resolution=33"))
    assert refused.code == 2 and "33" in refused.err and not (tmp_path / "f.training").exists()
