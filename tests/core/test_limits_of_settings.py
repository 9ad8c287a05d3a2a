"""Every number in a recipe or on the command line is limited, so that typos cannot cause an overflow or fill memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import typer
from pydantic_core import SchemaValidator, ValidationError

from pcs_3d.recipe import Recipe3D
from pcs_video.recipe import VideoRecipe
from shared.cli import build
from shared.config import validate
from shared.recipe.schema import Recipe

RECIPES = (Recipe, VideoRecipe, Recipe3D)
#: For each type, the values that every setting of that type must refuse.
REFUSED = {
    "int": (10**12, -(10**12)),
    "float": (float("nan"), float("inf"), float("-inf"), 1e300, -1e300),
}


def numbers(
    schema: Mapping[str, Any], key: str = "", config: Any = None
) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
    """Yields the key, the pydantic schema and the model configuration of every number in a schema.

    In a key, "*" stands for any name or index, and a part's kind is in brackets.
    """
    if schema["type"] in REFUSED:
        yield key, schema, config
        return
    if schema["type"] == "model":
        config = schema.get("config")
    choices = schema.get("choices", ())
    if isinstance(choices, Mapping):
        for kind, inner in choices.items():
            yield from numbers(inner, f"{key}[{kind}]", config)
    elif schema["type"] == "union":
        for inner in choices:
            yield from numbers(inner[0] if isinstance(inner, tuple) else inner, key, config)
    if schema["type"] == "model-fields":
        for name, field in schema["fields"].items():
            yield from numbers(field["schema"], f"{key}.{name}".lstrip("."), config)
    for inside in ("schema", "items_schema", "keys_schema", "values_schema", "lax_schema", "strict_schema"):
        inner = schema.get(inside, ())
        place = f"{key}.*" if inside in ("items_schema", "values_schema") else key
        for each in inner if isinstance(inner, list) else [inner] if inner else []:
            yield from numbers(each, place, config)


def unlimited(model: Any) -> list[str]:
    found = []
    for key, schema, config in numbers(model.__pydantic_core_schema__):
        validator = SchemaValidator(dict(schema), config)
        for value in REFUSED[schema["type"]]:
            try:
                validator.validate_python(value)
            except ValidationError:
                continue
            found.append(f"{key} ({schema['type']}) accepts {value}")
    return found


@pytest.mark.parametrize("model", RECIPES)
def test_every_number_in_a_recipe_has_a_limit(model):
    assert unlimited(model) == []


def test_the_search_for_numbers_reaches_every_kind_of_slot():
    keys = {key for model in RECIPES for key, _, _ in numbers(model.__pydantic_core_schema__)}
    assert {
        "seed",
        "train.optimizers.*[lbfgs].history_size",
        "sources.*[frozen_clips].pictures[references].repeats",
        "sources.*[clips].window.stride",
        "trainable.*[peft].settings.*.*",
        "sampling.trajectory.points.*.*",
        "guidance.noiser[inversion].steps",
        "guidance.regions.*[box].lo.*",
        "field[hash_grid].start[phase].faces",
        "penalties.*[sparsity].weight.*",
        "cameras.azimuth_deg.*",
    } <= keys


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (Recipe, {"objective": {"min_snr_gamma": 1e300}}, "objective.min_snr_gamma = 1e+300: Input should be less than"),
        (Recipe, {"objective": {"min_snr_gamma": "nan"}}, "objective.min_snr_gamma = 'nan': Input should be a finite"),
        (Recipe, {"sampling": {"guidance": "inf"}}, "sampling.guidance = 'inf': Input should be a finite"),
        (Recipe, {"sources": {"references": {"repeats": 10**9}}}, "sources.references.repeats = 1000000000: Input should"),
        (Recipe3D, {"guidance": {"scale": 1e300}}, "guidance.scale = 1e+300: Input should be less than"),
        (Recipe3D, {"guidance": {"weight": [0, 1, float("nan"), 9]}}, "guidance.weight.2 = nan: Input should be a finite"),
    ],
)  # fmt: skip
def test_the_message_names_the_key_and_the_value(model, settings, message):
    with pytest.raises(ValueError) as error:
        validate(model, settings)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def options(app: typer.Typer, name: str = "pcs") -> Iterator[tuple[str, str, Any]]:
    """Yields the name, annotation and settings of every option and argument of every command."""
    for command in app.registered_commands:
        assert command.callback is not None
        for key, parameter in inspect.signature(command.callback).parameters.items():
            yield f"{name} {command.callback.__name__} {key}", str(parameter.annotation), parameter.default
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from options(group.typer_instance, f"{name} {group.name}")


def test_every_number_on_the_command_line_has_a_limit():
    found = list(options(build()))
    assert {"pcs toybox sheet rows", "pcs video generate fps", "pcs image generate height"} <= {
        name for name, *_ in found
    }
    assert not [n for n, kind, how in found if kind == "int" and None in (how.min, how.max)]
    assert not [n for n, kind, how in found if kind == "float" and not how.parser], "use `shared.commands.numbers`"
