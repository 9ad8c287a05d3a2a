"""`key=value` on the command line is read as text for text fields and as YAML otherwise. `~` is expanded in paths."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from shared.cli import build
from shared.commands.paths import PATH
from shared.config import Part, PathText, Slot, expanded, validate
from shared.io.outputs import check_output
from shared.io.read_subject import read_subject
from shared.recipe.overrides import parse_overrides
from shared.recipe.resolve import load
from shared.recipe.schema import Recipe
from tests.core.scenes import save, scene

#: Names that YAML or the expansion of `~` would turn into something else.
ODD = (
    *(
        "cats #1",
        "2024",
        "007",
        "12:30",
        "true",
        "null",
        "no",
        "[1] x",
        "@x",
        "`x`",
        "*x",
        "&x",
        "!x",
        "%x",
        "{x}",
        "'x",
    ),
    *("a: b", "- a", "? a", "|", ">", "1e-4", ".inf", "x ", " x", "~nobody here", "[a", "[a, b]"),
)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(
    "key",
    [
        *("subject.images", "subject.masks", "subject.captions", "output", "subjects.mug.images", "backbone"),
        *("sources.mine.images", "phases.tune.sources.mine.images", "subject.class_noun"),
        *("modifier.token", "sampling.scheduler", "phases.tune.sources.mine.prompt"),
    ],
)
def test_a_path_or_a_string_is_read_exactly_as_typed(tmp_path, monkeypatch, key: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    value = parse_overrides([f"{key}={name}"], Recipe)
    for part in key.split("."):
        value = value[part]
    assert value == (None if (name, key) == ("null", "sampling.scheduler") else name)


@pytest.mark.parametrize("name", ODD)
def test_a_recipe_uses_exactly_the_folder_that_was_typed(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    save(tmp_path / name / "a.png", scene(32, 32))
    settings = [f"subject.images={name}", f"output={name}/mug.concept", "sources.mine.kind=folder"]
    recipe = load("textual_inversion", [*settings, f"sources.mine.images={name}"])
    assert recipe.subject is not None and recipe.output is not None
    for images in (recipe.subject.images, recipe.sources["mine"].images):  # type: ignore[union-attr]
        assert read_subject(images).images[0].samefile(tmp_path / name / "a.png")  # type: ignore[arg-type]
    assert check_output(recipe.output).parent.samefile(tmp_path / name)


def test_a_bracketed_list_names_several_files_unless_it_is_itself_a_file_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def images(text: str):
        return parse_overrides([f"subject.images={text}"], Recipe)["subject"]["images"]

    assert images("[a.png, b c.png]") == ["a.png", "b c.png"]
    assert images("[2024, 007, true, ~, no]") == ["2024", "007", "true", "~", "no"], "all of them are strings"
    assert images(' ["a, b.png"]') == ["a, b.png"]
    assert images("[{a: 1}]") == "[{a: 1}]" and images("[]") == "[]" and images("[*a]") == "[*a]"
    (tmp_path / "[a.png, b c.png]").mkdir()
    assert images("[a.png, b c.png]") == "[a.png, b c.png]"
    assert parse_overrides(["subject.masks=[a, b]"], Recipe)["subject"]["masks"] == "[a, b]", (
        "the value is one folder, not several"
    )


def test_an_optional_field_is_unset_by_null_or_by_an_empty_value() -> None:
    def one(text: str):
        return load("dreambooth_lora", ["subject.images=x", "output=y.concept", "name=z", "subject.masks=m", text])

    assert (
        one("name=null").name is None and one("output=").output is None and one("subject.masks=").subject.masks is None
    )  # type: ignore[union-attr]
    assert one("output=null").output == Path("null") and one("sampling.scheduler=null").sampling.scheduler is None
    assert one("subject.class_noun=null").subject.class_noun == "null"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"subject\.images = '': must be the path of a file or folder"):
        one("subject.images=")


class One(Part):
    kind: Literal["one"] = "one"
    place: PathText | None = None
    amount: float | str = 0.0
    words: tuple[str, ...] = ()
    texts: str | tuple[str, ...] = ""


class Two(Part):
    kind: Literal["two"] = "two"
    place: int = 0


class Settings(Part):
    parts: Slot[Annotated[One | Two, Field(discriminator="kind")]] = {}


def test_values_of_fields_that_accept_more_than_text_are_read_as_yaml() -> None:
    parsed = parse_overrides(
        ["parts.x.amount=1e-4", "parts.x.words=[a, 1]", "parts={y: {kind: two}}", "no.such=1"], Settings
    )
    assert parsed["parts"]["y"] == {"kind": "two"} and parsed["no"] == {"such": 1}
    assert parsed["parts"]["x"] == {"amount": 1e-4, "words": ["a", 1]}
    assert parse_overrides(["parts.x.texts=007"], Settings) == {"parts": {"x": {"texts": "007"}}}
    assert parse_overrides(["parts.x.texts=[007, a]"], Settings) == {"parts": {"x": {"texts": ["007", "a"]}}}
    with pytest.raises(ValueError, match="cannot read the value of .*: it is nested too deeply"):
        parse_overrides([f"parts.x.amount={'[' * 10_000}"], Settings)
    assert parse_overrides(["parts.x.place=1: 2"], Settings) == {"parts": {"x": {"place": "1: 2"}}}


# --- paths with ~ -------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_path_is_expanded_only_once(home) -> None:
    assert expanded("~/x") == home / "x" and expanded("~") == home and expanded(Path("~/x")) == home / "x"
    for folder in ("./~", "./~/x", "~no-such-user/x"):
        path = expanded(folder)
        assert path == Path.cwd() / folder and expanded(path) == path == path.expanduser()


def test_every_path_in_a_recipe_is_expanded(home) -> None:
    (home / "own.yaml").write_text("trainable: {tokens: {lr: 0.1}}\nsubject: {masks: ~/masks}\n")
    keys = ("subject.images", "subject.captions", "output", "backbone", "sources.mine.images")
    recipe = load(
        "~/own.yaml", ["sources.mine.kind=folder", "modifier.kind=learnable_token", *(f"{k}=~/x" for k in keys)]
    )
    assert recipe.subject is not None and recipe.subject.masks == home / "masks"
    assert recipe.subject.images == recipe.subject.captions == recipe.output == home / "x"
    assert recipe.backbone == str(home / "x") and recipe.sources["mine"].images == home / "x"  # type: ignore[union-attr]
    listed = load("textual_inversion", ["subject.images=[~/a.png, b.png]"]).subject
    assert listed is not None and listed.images == (home / "a.png", Path("b.png"))


def test_every_option_that_is_a_path_is_expanded(home) -> None:
    seen, apps = 0, [build()]
    while apps:
        app = apps.pop()
        apps += [g.typer_instance for g in app.registered_groups if g.typer_instance is not None]
        for command in [*app.registered_commands, *filter(None, [app.registered_callback])]:
            for name, parameter in inspect.signature(command.callback or len).parameters.items():
                if "Path" in str(parameter.annotation):
                    assert parameter.default.parser is PATH["parser"], (command.callback, name)
                    seen += 1
    assert seen > 10 and PATH["parser"]("~/x") == home / "x" and os.fspath(PATH["parser"](Path("out"))) == "out"


def test_a_settings_file_with_a_path_that_is_not_text_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"images = 2024"):
        validate(Recipe, {"subject": {"images": 2024}})
