"""Files in the training folder that pcs did not write are kept. They are named before a run begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.image.refusing import refusing

MINE = ("samples/holiday.png", "tensorboard/events.out.tfevents.1.mine", "notes.txt", "log.jsonl", "checkpoint-00-1/x")


@pytest.mark.parametrize("mine", MINE)
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_training_refuses_a_folder_with_files_that_pcs_did_not_write(pcs, learn, tmp_path: Path, mine, flags) -> None:
    file = tmp_path / "toy.training" / mine
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    arguments = (*learn("textual_inversion", f"output={tmp_path / 'toy.concept'}"), *flags)
    message = refusing(pcs, tmp_path)(*arguments)
    assert str(tmp_path / "toy.training") in message and ("checkpoint-00-1 is damaged" in message or mine in message)


def test_a_second_run_deletes_only_the_files_of_the_first_run(pcs, learn, tmp_path: Path) -> None:
    validated = ("train.validation.every=1", "train.validation.num=1")
    arguments = learn("textual_inversion", f"output={tmp_path / 'toy.concept'}", *validated)
    assert pcs(*arguments).code == 0
    training = tmp_path / "toy.training"
    first = {p.name for p in training.rglob("*") if p.is_file()}
    assert {"log.jsonl", "step-000001.png", "step-000002.png"} < first
    assert pcs(*arguments, "--overwrite", "train.steps=1").code == 0
    second = {p.name for p in training.rglob("*") if p.is_file()}
    assert "step-000001.png" in second and "step-000002.png" not in second
    assert len([n for n in second if "tfevents" in n]) == 1
    (training / "samples" / "mine.png").write_text("mine")
    message = refusing(pcs, tmp_path)(*arguments, "--overwrite")
    assert "did not write (samples/mine.png)" in message


def test_pictures_inside_the_training_folder_are_refused(pcs, learn, painted, tmp_path: Path) -> None:
    painted(tmp_path / "toy.training" / "photos")
    images = tmp_path / "toy.training" / "photos"
    arguments = learn("textual_inversion", f"output={tmp_path / 'toy.concept'}", images=images)
    assert "toy.training" in refusing(pcs, tmp_path)(*arguments, "--overwrite")


def test_a_resumed_run_keeps_the_users_files_and_refuses_to_overwrite_them(
    pcs, interrupted, learn, tmp_path: Path
) -> None:
    arguments = learn("textual_inversion", f"output={tmp_path / 'toy.concept'}", "train.steps=3")
    training = tmp_path / "toy.training"
    assert interrupted(*arguments).code == 130 and list(training.glob("checkpoint-*"))
    (training / "notes.txt").write_text("mine")
    (training / "samples").mkdir()
    (training / "samples" / "step-000001.png").write_text("mine")
    message = refusing(pcs, tmp_path)(*arguments, "--resume")
    assert "samples/step-000001.png" in message and "notes.txt" not in message
    (training / "samples" / "step-000001.png").unlink()
    assert pcs(*arguments, "--resume").code == 0
    assert (training / "notes.txt").read_text() == "mine"
