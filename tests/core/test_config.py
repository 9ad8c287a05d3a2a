"""YAML layers and key=value overrides are merged as documented, and errors explain what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from shared.config import (
    Part,
    Slot,
    default_kind,
    default_kinds,
    merge,
    read_yaml,
    unknown,
    validate,
)
from shared.recipe import overrides


def parse_overrides(items):
    """Parses overrides for a model without fields, so that every value is read as YAML."""
    return overrides.parse_overrides(items, BaseModel)


class Wide(Part):
    kind: Literal["wide"] = "wide"
    rank: Annotated[int, Field(ge=1)] = 8
    roles: tuple[str, ...] = ()


class Deep(Part):
    kind: Literal["deep"] = "deep"
    layers: int = 2


class Group(Part):
    steps: Annotated[int, Field(ge=0)] = 5
    mode: Literal["slow", "fast"] = "slow"


class Settings(Part):
    parts: Slot[Annotated[Wide | Deep, Field(discriminator="kind")]] = {}
    one: Annotated[Wide | Deep, Field(discriminator="kind")] = Wide()
    group: Group = Group()


def build(data: dict) -> Settings:
    return validate(Settings, data)


# --- merge -----------------------------------------------------------------------------------


def test_merging_recurses_into_mappings_and_replaces_everything_else():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 2}
    over = {"a": {"y": [3]}, "c": {"d": {"e": 1}}}
    assert merge(base, over) == {"a": {"x": 1, "y": [3]}, "b": 2, "c": {"d": {"e": 1}}}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 2}, "merging must not change the layers themselves"


def test_changing_the_kind_drops_the_settings_of_the_old_kind():
    base = {"one": {"kind": "wide", "rank": 4}}
    assert merge(base, {"one": {"kind": "deep"}}) == {"one": {"kind": "deep"}}
    assert merge(base, {"one": {"kind": "wide", "roles": ["a"]}}) == {
        "one": {"kind": "wide", "rank": 4, "roles": ["a"]}
    }


def test_a_kind_implied_by_the_key_is_taken_into_account():
    base = {"parts": {"wide": {"rank": 4}}}
    assert merge(base, {"parts": {"wide": {"kind": "wide"}}}) == {"parts": {"wide": {"kind": "wide", "rank": 4}}}
    assert merge(base, {"parts": {"wide": {"kind": "deep"}}}) == {"parts": {"wide": {"kind": "deep"}}}


def test_a_single_part_without_a_kind_has_the_default_kind():
    class Single(Part):
        slot: Annotated[Annotated[Wide | Deep, Field(discriminator="kind")], default_kind("wide")] = Wide()
        deep: Deep = Deep()
        group: Group = Group()
        kind: Literal["x"] = "x"

    kinds = default_kinds(Single)
    assert kinds == {"slot": "wide", "deep": "deep"}
    base, nested = {"slot": {"rank": 4}}, {"phases": {"*": kinds}}
    assert merge(base, {"slot": {"kind": "wide"}}, kinds) == {"slot": {"rank": 4, "kind": "wide"}}
    assert merge(base, {"slot": {"kind": "deep"}}, kinds) == {"slot": {"kind": "deep"}}
    over = {"phases": {"a": {"slot": {"kind": "wide"}}}}
    assert merge({"phases": {"a": base}}, over, nested)["phases"]["a"] == {"slot": {"rank": 4, "kind": "wide"}}


def test_kind_defaults_to_the_key():
    made = build({"parts": {"deep": {}, "second": {"kind": "wide", "rank": 2}}})
    assert made.parts == {"deep": Deep(), "second": Wide(rank=2)}


def test_null_removes_a_part():
    assert build(merge({"parts": {"deep": {}, "wide": {}}}, {"parts": {"deep": None}})).parts == {"wide": Wide()}


# --- overrides -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("-1.5e+3", -1500.0),
        (".5e1", 5.0),
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("", ""),
        ("word", "word"),
        ("a=b", "a=b"),
        ("[1, 2e-3, x]", [1, 2e-3, "x"]),
        ("{rank: 4}", {"rank": 4}),
        ('"1e-4"', "1e-4"),
        ("e5", "e5"),
        ("no", "no"),
        ("on", "on"),
        ("False", False),
        ("2024-01-01", "2024-01-01"),
        ("v1e4", "v1e4"),
    ],
)
def test_values_are_read_as_users_intend(text, value):
    parsed = parse_overrides([f"a.b={text}"])["a"]["b"]
    assert parsed == value and type(parsed) is type(value)


def test_overrides_are_nested_by_key_and_the_last_one_wins():
    assert parse_overrides(["a.b=1", "a.c.d=2", "x=3", "a.b=4"]) == {"a": {"b": 4, "c": {"d": 2}}, "x": 3}
    assert parse_overrides([]) == {}


def test_overrides_form_a_single_layer():
    overrides = ["parts.x.rank=3", "parts.x.kind=wide", "one.rank=2", "one.kind=wide"]
    both = {"parts": {"x": {"kind": "wide", "rank": 3}}, "one": {"kind": "wide", "rank": 2}}
    assert parse_overrides(overrides) == both == parse_overrides(overrides[::-1])
    assert parse_overrides(["a=1", "a.b=2"]) == {"a": {"b": 2}} and parse_overrides(["a.b=2", "a=1"]) == {"a": 1}
    assert parse_overrides(["a={b: 1}", "a.c=2"]) == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize("item", ["train.steps", "=5", " =5", "--steps"])
def test_an_argument_that_is_not_a_setting_is_an_error(item):
    with pytest.raises(ValueError, match=r"is not a setting.*train\.steps=500"):
        parse_overrides([item])


@pytest.mark.parametrize("item", ["a.=1", ".a=1", "a..b=1"])
def test_an_empty_name_in_a_key_is_an_error(item):
    with pytest.raises(ValueError, match="is not a setting"):
        parse_overrides([item])


def test_the_error_for_a_value_that_is_not_yaml_names_the_setting():
    with pytest.raises(ValueError, match=r"roles=\[a"):
        parse_overrides(["roles=[a"])


def test_the_error_for_a_value_that_is_not_yaml_says_why(tmp_path):
    long = "9" * 5000
    for value, why in (
        ("{{{", "its brackets do not match"),
        ("'a", "its quotation marks do not match"),
        ("[a: b: c]", "expected ',' or ']', but got ':'"),
        (long, "a number of 5,000 digits is too long"),
        ("0x" + long, "a number of 5,002 digits is too long"),
        ("[" * 3000 + "]" * 3000, "it is nested too deeply"),
    ):
        with pytest.raises(ValueError, match=r"cannot read the value of .*train\.x=") as caught:
            parse_overrides([f"train.x={value}"])
        assert str(caught.value).endswith(why) and len(str(caught.value)) < 400
    (tmp_path / "a.yaml").write_text(f"seed: 1\nname: {long}")
    with pytest.raises(ValueError, match="not readable YAML, line 2: a number of 5,000 digits is too long"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system ''"])
def test_yaml_tags_never_execute_code(tmp_path, value):
    mark = tmp_path / "mark"
    with pytest.raises(ValueError):
        parse_overrides([f"a={value.format(mark)}"])
    file = tmp_path / "evil.yaml"
    file.write_text(f"a: {value.format(mark)}")
    with pytest.raises(ValueError, match=r"evil\.yaml is not readable YAML, line 1"):
        read_yaml(file)
    assert not mark.exists()


# --- files -----------------------------------------------------------------------------------


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_is_read_as_one_mapping(tmp_path):
    assert read_yaml(write(tmp_path, "lr: 1e-4\nlist: [1, 2]\n")) == {"lr": 1e-4, "list": [1, 2]}
    assert read_yaml(write(tmp_path, "# nothing but words\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", "line 2"),
        ("a: 1\n\tb: 2", "line 2"),
        (b"a: \xff\xfe", "not readable YAML"),
        ("- a\n- b", "mapping of keys, not a list"),
        ("word", "not a str"),
        ("a: 1\na: 2", "duplicate key 'a'"),
        ("train: {steps: 1, steps: 2}", "duplicate key 'steps'"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("a: &x {b: 1}\nc: *x", "line 2"),
        ("a: &x [*x]", "line 1"),
        ("? [a]\n: 1", "line 1"),
        ("[" * 3000 + "]" * 3000, "not readable YAML"),
    ],
)
def test_the_error_for_a_broken_file_says_where(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"a\.yaml") as error:
        read_yaml(write(tmp_path, text))
    assert message in str(error.value)


def test_an_alias_bomb_is_refused_quickly(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    with pytest.raises(ValueError, match="line 2"):
        read_yaml(write(tmp_path, "\n".join(lines)))


# --- messages --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"grup": {}}, ["unknown key 'grup'", "Did you mean 'group'?", "group, one, parts"]),
        ({"group": {"step": 3}}, ["group: unknown key 'step'", "'steps'"]),
        ({"parts": {"wide": {"rnk": 3}}}, ["parts.wide: unknown key 'rnk'", "'rank'"]),
        ({"parts": {"second": {"kind": "deep", "rank": 3}}}, ["parts.second: unknown key 'rank'", "layers"]),
        ({"parts": {"wid": {}}}, ["parts.wid: unknown kind 'wid'", "Did you mean 'wide'?", "deep, wide"]),
        ({"one": {"kind": "dep"}}, ["one: unknown kind 'dep'", "'deep'"]),
        ({"group": {"mode": "fats"}}, ["group.mode: unknown value 'fats'", "Did you mean 'fast'?", "fast, slow"]),
        ({"group": {"steps": -1}}, ["group.steps = -1", "greater than or equal to 0"]),
        ({"group": {"steps": "many"}}, ["group.steps = 'many'", "integer"]),
        ({"parts": {"wide": {"rank": 0}}}, ["parts.wide.rank = 0"]),
        ({"parts": {"wide": {"roles": [1]}}}, ["parts.wide.roles.0 = 1"]),
        ({"parts": [1]}, ["parts:", "dictionary"]),
        ({"parts": {"wide": 3}}, ["parts.wide = 3"]),
        ({"group": 3}, ["group = 3"]),
        ({"one": {"rank": 3}}, ["one.kind is required"]),
        ({1: 2}, ["unknown key '1'"]),
    ],
)
def test_messages_name_the_key_its_value_and_the_nearest_choice(data, message):
    with pytest.raises(ValueError) as error:
        validate(Settings, data, where="my.yaml")
    text = str(error.value)
    assert text.startswith("my.yaml: ")
    for part in message:
        assert part in text, text
    assert "pydantic" not in text and "https://errors" not in text


def test_all_problems_are_reported_together_each_on_its_own_line():
    with pytest.raises(ValueError) as error:
        build({"group": {"step": 1}, "parts": {"wide": {"rank": 0}, "x": {"kind": "y"}}})
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert [line.split(":")[0].split(" =")[0] for line in lines] == ["parts.wide.rank", "parts.x", "group"]


def test_unknown_lists_the_choices_in_order():
    assert unknown("zzz", ["b", "a"]) == "unknown key 'zzz'. Available: a, b."
    assert unknown("x", [], "recipe") == "unknown recipe 'x'. Available: none."


def test_parts_are_frozen():
    part = Wide()
    with pytest.raises(ValueError, match="frozen"):
        part.rank = 3  # type: ignore[misc]
