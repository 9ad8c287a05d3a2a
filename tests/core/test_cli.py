"""`pcs` starts quickly, has complete help, and exits with the right codes."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from shared.cli import build, run
from shared.recipe.catalog import recipe_files
from shared.recipe.resolve import load, written
from shared.recipe.schema import dump
from shared.recipe.taxonomy import taxonomy_of


def ran(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_waiting_unless_the_user_chooses_otherwise(monkeypatch, given, used):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    code = (
        "import atexit, os, sys; from shared.cli import main; "
        "atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)); main(['--help'])"
    )
    assert ran("-c", code)[1].splitlines()[-1] == f"{used} False"  # set before torch is imported


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


TREE = sorted(commands(typer.main.get_command(build())))


LOADED = "import sys; print('LOADED', *sorted({m.partition('.')[0] for m in sys.modules}))"


def test_help_imports_nothing_but_the_cli_library():
    """This keeps help almost as fast as the library itself. Module names are compared, because timings are noisy."""
    code, out, err = ran(
        "-c", f"from shared.cli import build, run; code = run(build(), ['--help']); {LOADED}; sys.exit(code)"
    )
    assert code == 0, err
    for name in ("concept", "demo", "doctor", "image", "methods", "toybox"):
        assert f"\n  {name}" in out
    library = set(ran("-c", f"import typer, typer.main; {LOADED}")[1].split())
    loaded = set(out.splitlines()[-1].split())
    assert loaded - library - set(sys.stdlib_module_names) == {"shared", "pcs_image", "pcs_video", "pcs_3d"}


@pytest.mark.parametrize("path", TREE, ids=lambda p: " ".join(p) or "pcs")
def test_every_command_has_help(capsys, path):
    assert run(build(), [*path, "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Usage: ") and len(output.splitlines()) > 4
    assert (*path,) == () or path[-1] in output.splitlines()[0]


def test_all_main_commands_exist():
    for path in (
        *(
            ("image", "personalize"),
            ("image", "generate"),
            ("image", "evaluate"),
            ("concept", "show"),
            ("concept", "export"),
        ),
        *(
            ("methods", "show"),
            ("toybox", "train"),
            ("toybox", "evaluate"),
            ("toybox", "sheet"),
            ("toybox", "subjects"),
        ),
        *(("doctor",), ("demo",)),
    ):
        assert path in TREE


@pytest.mark.parametrize("long", [False, True])
def test_methods_are_readable_at_80_columns(capsys, monkeypatch, long):
    """Every value of every recipe is printed in full, and long values are broken between words."""
    monkeypatch.setenv("COLUMNS", "80")
    assert run(build(), ["methods", *(["--long"] if long else [])]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert "test-time fine-tuning" in output and "…" not in output and max(map(len, lines)) <= 80
    starts = {line.split()[0]: i for i, line in enumerate(lines) if line[:2] == "  " and line[2:3].strip()}
    for name in recipe_files("image"):
        recipe = written(name, "image")
        place = taxonomy_of(recipe)
        values = [recipe.title, place.trains, *((place.modifier, place.regularization, place.mask) if long else ())]
        end = next((i for i in sorted(starts.values()) if i > starts[name]), len(lines))
        words = " ".join(lines[starts[name] : end]).split()
        assert not {word for value in values for word in value.split()} - set(words), name


@pytest.mark.parametrize("name", sorted(recipe_files("image")))
def test_methods_show_prints_the_resolved_recipe(capsys, name):
    assert run(build(), ["methods", "show", name, "backbone=x", "train.steps=7"]) == 0
    out = capsys.readouterr().out
    assert (
        yaml.safe_load(out) == dump(load(name, ["backbone=x", "train.steps=7"])) and "values for the toybox" not in out
    )
    assert run(build(), ["methods", "show", name]) == 0
    assert capsys.readouterr().out.startswith("# values for the toybox")


@pytest.mark.parametrize("arguments", [["methods", "show", "nothing"], ["methods", "show", "dreambooth_lora", "a=1"]])
def test_a_user_error_prints_one_line_and_exits_with_code_2(capsys, arguments):
    assert run(build(), arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("pcs: ") and captured.out == "" and len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("wrong: a=1"), 2, "pcs: wrong: a=1"),
        (FileNotFoundError(2, "No such file", "x"), 1, "pcs: x: No such file or directory"),
        (KeyboardInterrupt(), 130, "stopped"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_each_kind_of_exception_has_its_exit_code_and_message(capsys, error, code, message):
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    assert run(app, []) == code
    assert capsys.readouterr().err.strip() == message


def test_every_count_has_an_upper_limit():
    """For example, a request for 10**12 pictures is rejected immediately."""
    app = build()
    groups = [group.typer_instance for group in app.registered_groups]
    made = [command.callback for group in groups for command in group.registered_commands if command.callback]
    options = [(f.__name__, p) for f in made for p in inspect.signature(f).parameters.values() if p.annotation == "int"]
    assert len(options) > 30
    most = {"seed": 2**62, "threads": 1024, "batch": 4096}  # by default, 10**8, since each item takes time or memory
    assert [(command, p.name) for command, p in options if (p.default.max or 2**99) > most.get(p.name, 10**8)] == []


@pytest.mark.parametrize(
    "setting",
    ["train.batch_size=1e5", "train.steps=1e12", "train.resolution=1e6", "sampling.steps=1e9", "preview.num=1e6",
     "sources.class_pictures.num_images=1e11", "trainable.lora.rank=1e9", "train.validation.num=1e9"],
)  # fmt: skip
def test_every_count_in_a_recipe_has_an_upper_limit(setting):
    key = re.escape(setting.partition("=")[0])
    with pytest.raises(ValueError, match=rf"^(\S*: )?{key} = .*less than or equal to"):
        load("dreambooth_lora", [setting])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.batch_size=4096", "train.resolution=8192"],
         "train.batch_size = 4096 with train.resolution = 8192 needs 274,877,906,944 pixels at once, above the limit"),
        (["preview.num=1000", "preview.resolution=8192"], "preview.num = 1000 with preview.resolution = 8192 needs"),
    ],
)  # fmt: skip
def test_a_count_and_a_size_that_are_too_large_together_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        load("dreambooth_lora", settings)
    load("dreambooth_lora", settings[:1])
    load("dreambooth_lora", settings[1:])


def test_a_huge_or_deeply_nested_recipe_file_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("title: " + 1_100_000 * "x")
    with pytest.raises(ValueError, match=r"mine\.yaml is 1,100,007 bytes, and the limit is 1,000,000"):
        load(str(path), [])
    path.write_text("title: " + 1000 * "[")
    with pytest.raises(ValueError, match=r"mine\.yaml is not readable YAML: it is nested too deeply"):
        load(str(path), [])


def test_every_command_refuses_an_argument_that_is_not_utf8(capsys):
    app = build()
    for path in TREE:
        assert run(app, [*path, "a \udcff mug"]) == 2
        assert "'a \\udcff mug' is not UTF-8 text" in capsys.readouterr().err


def test_an_unexpected_exception_is_not_caught():
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        run(app, [])


def test_a_package_that_cannot_be_loaded_does_not_break_the_others(capsys, monkeypatch):
    from importlib import metadata

    from shared.cli import GROUP

    broken = metadata.EntryPoint("broken", "shared.no_such_module:app", GROUP)
    entry_points = metadata.entry_points

    def offered(group: str) -> list[metadata.EntryPoint]:
        return [*entry_points(group=group), *([broken] if group == GROUP else [])]

    monkeypatch.setattr(metadata, "entry_points", offered)
    assert run(build(), ["methods", "show", "dreambooth_lora"]) == 0
    assert "the command 'broken' cannot be loaded" in capsys.readouterr().err


def test_the_installed_command_works():
    script = Path(sys.executable).with_name("pcs")
    done = subprocess.run([script, "methods", "show", "nothing"], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2 and done.stderr.startswith("pcs: unknown recipe 'nothing'")
