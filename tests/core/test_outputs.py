"""Outputs are written completely or not at all, and replace only files that pcs itself wrote."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from shared.io import outputs
from shared.io.contact_sheets import write_picture
from shared.io.find_pictures import list_pictures
from shared.io.foreign_files import MARK, claim, foreign_files
from shared.io.outputs import atomic_folder, atomic_write, check_file, check_output, check_resumable, write_text
from shared.train import checkpoint
from shared.train.log import Log


def earlier(target: Path) -> Path:
    """Makes a folder with one file, as an earlier run of pcs would have, and returns it."""
    with atomic_folder(target) as folder:
        (folder / "old").write_text("old")
    return target


def seen(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != MARK)


def test_an_output_must_be_a_new_or_empty_folder(tmp_path: Path) -> None:
    assert check_output(tmp_path / "new/deep") == tmp_path / "new/deep"
    assert check_output(tmp_path) == tmp_path  # empty
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=rf"{tmp_path} already exists and contains 1 file"):
        check_output(tmp_path)
    with pytest.raises(ValueError, match=r"a\.txt is an existing file"):
        check_output(tmp_path / "a.txt")
    with pytest.raises(
        ValueError, match=r"it contains files that pcs did not write \(a\.txt\), which would be deleted"
    ):
        check_output(tmp_path, overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is an existing file, but the output must be a folder"):
            check_output(tmp_path / "a.txt", overwrite)
    with pytest.raises(ValueError, match=r"cannot be written: .*a\.txt is a file, not a folder"):
        check_output(tmp_path / "a.txt/out")
    with pytest.raises(ValueError, match="'/' cannot be the output"):
        check_output("/", overwrite=True)


def test_a_folder_containing_the_home_or_working_folder_is_never_overwritten(tmp_path: Path, monkeypatch: Any) -> None:
    home, working = tmp_path / "people" / "home", tmp_path / "work" / "here"
    home.mkdir(parents=True)
    working.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(working)
    for path in (home, "~", home.parent, working, ".", "..", "out/.."):
        with pytest.raises(ValueError, match="cannot be the output"):
            check_output(path, overwrite=True)
    assert check_output("out", overwrite=True) == Path("out") and check_output("~/out") == home / "out"


def test_an_atomic_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "sub/my.concept"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [p.name for p in target.parent.iterdir()] == ["my.concept"]
    with pytest.raises(ValueError, match=r"my\.concept already exists"), atomic_folder(target):
        raise AssertionError("must not start")


def test_an_atomic_folder_leaves_nothing_behind_after_an_error(tmp_path: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), atomic_folder(tmp_path / "x") as folder:
            (folder / "half").write_text("1")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = earlier(tmp_path / "x")
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
        raise RuntimeError
    assert seen(target) == ["old"]
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert seen(target) == ["new"] and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_overwriting_puts_the_old_folder_back_when_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = earlier(tmp_path / "x"), Path.rename

    def fails(self: Path, to: Path) -> Path:
        if (self / "new").exists():
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    monkeypatch.setattr(outputs, "exchanged", lambda *_: False)  # as on a system that cannot exchange folders
    with pytest.raises(OSError, match="no"), atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and seen(target) == ["old"]


def test_an_output_always_exists_while_it_is_being_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = earlier(tmp_path / "x"), Path.rename

    def watched(self: Path, to: Path) -> Path:
        out = rename(self, to)
        assert target.exists(), "a process killed here would leave no output"
        return out

    monkeypatch.setattr(Path, "rename", watched)
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert seen(target) == ["new"] and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_links_are_followed_and_dangling_links_are_refused(tmp_path: Path) -> None:
    place = earlier(tmp_path / "disk" / "big")
    (tmp_path / "x").symlink_to(place)
    with atomic_folder(tmp_path / "x", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "x").is_symlink() and seen(place) == ["new"] and seen(tmp_path / "disk") == ["big"]
    (tmp_path / "note.txt").symlink_to(place / "new")
    write_text(tmp_path / "note.txt", "newer")
    assert (tmp_path / "note.txt").is_symlink() and (place / "new").read_text() == "newer"
    (tmp_path / "dangling").symlink_to(tmp_path / "unplugged")
    (tmp_path / "loop").symlink_to(tmp_path / "pool")
    (tmp_path / "pool").symlink_to(tmp_path / "loop")
    for name in ("dangling", "loop", "loop/x", "dangling/a/b"):
        for check in (check_output, check_file):
            with pytest.raises(ValueError, match=f"the output {tmp_path / name} leads nowhere: .* is a link to"):
                check(tmp_path / name, overwrite=True)
    with pytest.raises(ValueError, match="lies inside"):
        check_output(place / "y", inputs=[tmp_path / "loop", tmp_path / "x"])


def test_an_atomic_write_replaces_a_file_completely_or_not_at_all(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.json", "één")
    assert path.read_text(encoding="utf-8") == "één"
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        assert (
            temporary.suffix == ".partial" and temporary.parent == tmp_path
        )  # no program mistakes it for the finished file
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "één" and len(list(tmp_path.iterdir())) == 1
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # unlike most temporary files, it can be read by other users


# --- what may be overwritten --------------------------------------------------------------------


def photos(folder: Path) -> Path:
    """Makes a folder of the user's own pictures and returns it."""
    folder.mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (32, 32), "red").save(folder / name)
    return folder


def test_the_users_own_folders_are_never_overwritten(tmp_path: Path) -> None:
    user_photos = photos(tmp_path / "mine" / "photos")
    (tmp_path / "work").mkdir()
    for name in ("report.json", "concept.json", "export.json", "cell.json", "comparison.md", "index.html"):
        (tmp_path / "work" / name).write_text('{"files": ["me.txt"], "mine": true}')
    for folder, named in (
        (user_photos, r"a\.png, b\.jpg"),
        (user_photos.parent, r"photos/a\.png"),
        (tmp_path / "work", "comparison"),
    ):
        with pytest.raises(
            ValueError, match=f"cannot be overwritten: it contains files that pcs did not write.*{named}"
        ):
            check_output(folder, overwrite=True)
        with pytest.raises(ValueError, match="did not write"), atomic_folder(folder, overwrite=True):
            raise AssertionError("must not start")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "there").symlink_to(user_photos)
    assert foreign_files(tmp_path / "linked") == ["there"]
    assert sorted(p.name for p in user_photos.iterdir()) == ["a.png", "b.jpg"]


def test_folders_that_pcs_wrote_are_overwritten_unless_something_was_added(tmp_path: Path) -> None:
    made = earlier(tmp_path / "made")
    pictures = tmp_path / "pictures"
    with atomic_folder(pictures) as folder:
        write_picture(torch.zeros(3, 20, 20), folder / "000-seed0.png", {"pcs": "{}"})
        write_picture(torch.zeros(3, 20, 20), folder / "grid.png", {"pcs": "{}"})
    assert seen(pictures) == ["000-seed0.png", "grid.png"] and not (pictures / MARK).exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").touch()
    for folder in (made, pictures, tmp_path / "empty"):
        assert check_output(folder, overwrite=True) == folder
        (folder / "diary.txt").write_text("mine")
        with pytest.raises(ValueError, match=r"did not write \(diary\.txt\)"):
            check_output(folder, overwrite=True)


def test_a_folder_that_contains_only_pcs_outputs_may_be_overwritten(tmp_path: Path) -> None:
    """The folder contains a demo's outputs, namely an album, a concept, a training folder, a report and a page."""
    demo = tmp_path / "demo"
    write_picture(torch.zeros(3, 20, 20), demo / "references/00.png", {"toybox-subject": "development-duck"})
    write_picture(torch.zeros(3, 20, 20), demo / "references/masks/00.png")
    (demo / "references/00.txt").write_text("a photo of a duck")
    content: dict[str, Any] = {"schema_version": 1, "adapter_id": "", "files": {"adapter.safetensors": "0"}}
    (demo / "my-duck.concept").mkdir()
    (demo / "my-duck.concept/concept.json").write_text(json.dumps(content))
    for name in ("adapter.safetensors", "preview.png"):
        (demo / "my-duck.concept" / name).touch()
    log = Log(demo / "my-duck.training")
    log.scalars(1, {"loss": 0.5})
    log.samples(1, torch.zeros(1, 3, 20, 20))
    log.close()
    checkpoint.save(demo / "my-duck.training", checkpoint.State(0, 1, {"rows": torch.ones(2)}))
    (demo / "report/pictures").mkdir(parents=True)
    rows = {"schema_version": 1, "pictures": [{"file": "pictures/0.png"}], "references": ["pictures/r.png"]}
    (demo / "report/report.json").write_text(json.dumps(rows))
    for name in ("pictures/0.png", "pictures/r.png", "index.html", "pictures.csv", "prompts.csv"):
        (demo / "report" / name).touch()
    for name in ("index.html", "contact-sheet.png"):
        claim(demo, name)
        (demo / name).touch()
    assert check_output(demo, overwrite=True) == demo
    for mine in (
        "references/holiday.jpg",
        "my-duck.training/samples/mine.png",
        "my-duck.training/tensorboard/events.1",
    ):
        (demo / mine).write_text("mine")
        with pytest.raises(ValueError, match=rf"\({re.escape(mine)}\)"):
            check_output(demo, overwrite=True)
        (demo / mine).unlink()


def test_an_output_must_not_overlap_with_an_input(tmp_path: Path) -> None:
    user_photos = photos(tmp_path / "mine" / "photos")
    (tmp_path / "link").symlink_to(user_photos)
    for path, how in (
        (user_photos, "is"),
        (user_photos.parent, "contains"),
        (user_photos / "out", "lies inside"),
        (tmp_path / "link", "is"),
    ):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=rf"the output {path} {how} {user_photos}, which is an input"):
                check_output(path, overwrite, inputs=[user_photos])
    with pytest.raises(ValueError, match="contains"):
        check_output(user_photos, inputs=[tmp_path / "else", user_photos / "a.png"])
    with pytest.raises(ValueError, match="is"), atomic_folder(user_photos, True, [user_photos]):
        raise AssertionError("must not start")
    concept = earlier(tmp_path / "d.concept")
    with pytest.raises(ValueError, match="which is an input"):
        check_output(concept, overwrite=True, inputs=[concept])
    assert check_output(tmp_path / "mine" / "out", inputs=[user_photos]) == tmp_path / "mine" / "out"


def test_files_added_while_the_folder_is_being_written_are_not_replaced(tmp_path: Path) -> None:
    for overwrite in (False, True):
        target = tmp_path / f"x{overwrite}"
        with pytest.raises(ValueError, match="x(True|False) "), atomic_folder(target, overwrite) as folder:
            (folder / "new").touch()
            target.mkdir()
            (target / "mine.txt").write_text("keep me")
        assert seen(target) == ["mine.txt"]
    assert seen(tmp_path) == ["xFalse", "xTrue"]


def test_the_list_of_files_that_pcs_wrote_is_not_reported_as_a_stray_file(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "x") as folder:
        Image.new("RGB", (32, 32)).save(folder / "a.png")
    assert (tmp_path / "x" / MARK).is_file() and list_pictures(tmp_path / "x")[1] == []


def test_a_resumable_output_must_be_new_or_empty_or_from_an_earlier_call(tmp_path: Path) -> None:
    def check(name: str) -> Path:
        return check_resumable(tmp_path / name, "album", lambda folder: (folder / "album.json").is_file())

    (tmp_path / "empty").mkdir()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "album.json").write_text("{}")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "unplugged")
    for name in ("new", "empty", "ours"):
        assert check(name) == tmp_path / name
    for name, why in (
        ("photos", "contains 1 file, but no album"),
        ("photos/a.jpg", "is an existing file"),
        ("gone", "leads nowhere"),
        ("gone/x", "leads nowhere"),
    ):
        with pytest.raises(ValueError, match=why):
            check(name)
    with pytest.raises(ValueError, match="lies inside"):
        check_resumable(tmp_path / "ours" / "x", "album", lambda _: True, [tmp_path / "ours"])


def test_an_output_file_must_be_new_and_not_a_folder(tmp_path: Path) -> None:
    assert check_file(tmp_path / "a" / "b.png") == tmp_path / "a" / "b.png"
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"a\.png already exists: choose another output"):
        check_file(tmp_path / "a.png")
    assert check_file(tmp_path / "a.png", overwrite=True) == tmp_path / "a.png"
    (tmp_path / "folder").mkdir()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="folder is a folder; give the path of a file"):
            check_file(tmp_path / "folder", overwrite)
    with pytest.raises(ValueError, match=r"a\.png is a file, not a folder"):
        check_file(tmp_path / "a.png" / "b.png")


# --- file modes, and leftovers from killed processes ----------------------------------------------------


def test_every_file_has_the_mode_set_by_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "sub").mkdir()
        save_file({"a": torch.zeros(2)}, folder / "sub" / "a.safetensors")
        (folder / "sub" / "a.safetensors").chmod(0o600)
    with atomic_write(tmp_path / "b.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
        temporary.chmod(0o600)
    for file in ("x/sub/a.safetensors", "b.safetensors"):
        assert (tmp_path / file).stat().st_mode == usual, file


WAITS = """
import sys, time
from pathlib import Path
from shared.io.outputs import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "half").touch()
    print("writing", flush=True)
    time.sleep(100)
"""


def test_leftovers_from_a_killed_process_are_removed_by_the_next_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS, tmp_path / "x"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    with atomic_folder(tmp_path / "y") as folder:
        (folder / "a").touch()
    alive = [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")]
    assert len(alive) == 1 and f"-{process.pid}-" in alive[0], "files that are still being written are kept"
    process.kill()
    process.wait()
    foreign = tmp_path / ".z.000000-999999999-01234567.partial"
    foreign.touch()
    with atomic_folder(tmp_path / "z") as folder:
        (folder / "a").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == [foreign.name, "y", "z"], "files from other machines are kept"


def test_an_output_that_was_moved_aside_is_restored(tmp_path: Path) -> None:
    from shared.io.temporary_names import replaced

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    aside = replaced(tmp_path / "x.concept").name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    (tmp_path / aside).mkdir()
    (tmp_path / aside / "old").touch()
    write_text(tmp_path / "note.txt", "x")
    assert seen(tmp_path) == ["note.txt", "x.concept"] and seen(tmp_path / "x.concept") == ["old"]


TERMINATED = """
import sys, typer
import shared.cli as cli
app = typer.Typer()
@app.command()
def wait() -> None:
    exec(open(sys.argv[1]).read().replace("sys.argv[1]", "sys.argv[2]"))
cli.build = lambda: app
cli.main([])
"""


def test_a_terminated_command_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "code").write_text(WAITS)
    arguments = [sys.executable, "-c", TERMINATED, tmp_path / "code", tmp_path / "x"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and stderr == "stopped\n"
    assert [p.name for p in tmp_path.iterdir()] == ["code"]
