"""Merges YAML layers and `key=value` overrides into one validated model, with errors written for users."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError


class Part(BaseModel):
    """The base class of every part and group of settings. It is frozen and rejects unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_key", "{message}", {"message": unknown(str(key), cls.model_fields)}
                    )
        return data


class KindPart(Part):
    """The base class of the parts in a recipe's slots. Each slot accepts several kinds of part."""

    kind: str

    @property
    def taxonomy(self) -> str:
        """The part's name in tables that compare recipes."""
        return self.kind.replace("_", " ")

    @property
    def frame_counts(self) -> Mapping[str, int]:
        """The frame counts of the clips that the part gives to the model, by key."""
        return {}


def unknown(value: str, choices: Iterable[str], what: str = "key") -> str:
    """Returns an error message with the unknown value, the nearest valid name and all valid names."""
    names = sorted(choices)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {value!r}.{hint} Available: {', '.join(names) or 'none'}."


#: Numbers in settings. Their limits are far above any sensible value, so that a typo such as 1e300 fails immediately instead
#: of overflowing or filling up memory in the middle of a run. Every number in a `Part` must also be finite.
Real = Annotated[float, Field(ge=-1e6, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Many = Annotated[int, Field(ge=1, le=10_000)]
Side = Annotated[int, Field(ge=1, le=8192)]  # pixels
BatchSize = Annotated[int, Field(ge=1, le=4096)]
Frames = Annotated[int, Field(ge=1, le=4096)]
MOST_GUIDANCE, MOST_STRENGTH = 1000, 100
GuidanceScale = Annotated[float, Field(ge=-MOST_GUIDANCE, le=MOST_GUIDANCE)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
MOST_STEPS = 10_000_000
Steps = Annotated[int, Field(ge=0, le=MOST_STEPS)]

#: Valid names of concepts, subjects and parts.
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"


def _kinds_from_keys(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return value
    for key in value:
        if not re.match(NAME, str(key)):
            raise ValueError(f"{str(key)!r} cannot be a part's name: use only letters, digits, - and _")
    return {
        k: ({"kind": k, **v} if isinstance(v, Mapping) else v if v is not None else None)
        for k, v in value.items()
        if v is not None
    }


def expanded(path: str | os.PathLike[str]) -> Path:
    """Expands a leading `~` or `~user` in a path that a user wrote. Expanding the result again changes nothing.

    `./~` is the folder called `~`, and `~nobody` is the folder called `~nobody` if there is no such user.
    """
    text = os.path.expanduser(os.fspath(path))
    out = Path(text)
    return Path.cwd() / out if out.parts[:1] and out.parts[0].startswith("~") else out


def absent(path: str | os.PathLike[str], otherwise: str = "does not exist") -> str:
    """Returns the reason why a path cannot be used. If its symbolic links form a loop, which `Path.exists` reports as a
    missing file, the reason states this. In all other cases, it is `otherwise`."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "cannot be followed: its symbolic links form a loop (remove one of them)"
    return otherwise


def _path(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike):
        return value
    if not os.fspath(value) or "\0" in str(value):
        raise ValueError("must be the path of a file or folder")
    return expanded(value)


#: The path of a file or folder, as the user wrote it.
PathText = Annotated[Path, BeforeValidator(_path)]


def _name_or_path(value: Any) -> Any:
    if value == "":
        raise ValueError("is empty (perhaps it was given as a shell variable that is not set)")
    return str(expanded(value)) if isinstance(value, str) and value[:1] == "~" else value


#: A name, or the path of a file or folder.
NameOrPath = Annotated[str, BeforeValidator(_name_or_path)]


T = TypeVar("T")
#: A slot with several parts under freely chosen names. A part's `kind` defaults to its name.
Slot = Annotated[dict[str, T], BeforeValidator(_kinds_from_keys)]


def slots(model: type[BaseModel]) -> tuple[str, ...]:
    """Returns the names of a model's fields that contain several parts under freely chosen names."""
    return tuple(n for n, f in model.model_fields.items() if any(_is_slot(m) for m in f.metadata))


def _is_slot(mark: Any) -> bool:
    return isinstance(mark, BeforeValidator) and mark.func is _kinds_from_keys


def default_kind(kind: str) -> BeforeValidator:
    """Sets the default kind of a slot with one part, so that settings such as `noise.offset=0.1` need no kind."""

    def fill(value: Any) -> Any:
        return {"kind": kind, **value} if isinstance(value, Mapping) and "kind" not in value else value

    fill.kind = kind  # type: ignore[attr-defined]  # for `default_kinds`
    return BeforeValidator(fill)


def parts_of(kind: str) -> BeforeValidator:
    """Sets the default kind of every part in a mapping of named parts, so that settings such as
    `train.optimizers.main.eps=1e-6` need no kind."""

    def fill(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {k: {"kind": kind, **v} if isinstance(v, Mapping) and "kind" not in v else v for k, v in value.items()}

    fill.each = kind  # type: ignore[attr-defined]  # for `default_kinds`
    return BeforeValidator(fill)


def default_kinds(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the default kinds of a model's parts in the form that `merge` takes. The result is nested like the
    model's fields. In it, "*" stands for any key of a mapping of parts."""
    out: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        marks = [getattr(mark, "func", None) for mark in field.metadata]
        kinds = [kind for mark in marks if isinstance(kind := getattr(mark, "kind", None), str)]
        each = [kind for mark in marks if isinstance(kind := getattr(mark, "each", None), str)]
        if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
            kind = field.annotation.model_fields.get("kind")
            nested = default_kinds(field.annotation) if kind is None else {}
            kinds += [kind.default] if kind and isinstance(kind.default, str) else []
            out.update({name: nested} if nested else {})
        out.update({name: {"*": each[0]}} if each else {name: kinds[-1]} if kinds else {})
    return out


def merge(base: Mapping[str, Any], over: Mapping[str, Any], kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Applies the layer `over` on top of the layer `base`. Mappings are merged, and anything else is replaced. If
    `kind` changes, the settings of the old kind are dropped.

    Args:
        kinds: default kinds by key, nested like the layers, with "*" for any key. For a key without an entry,
            the default kind is the key itself
    """
    kinds, out = kinds or {}, dict(base)
    for key, value in over.items():
        old, inner = out.get(key), kinds.get(key, kinds.get("*"))
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            meant = old.get("kind", inner if isinstance(inner, str) else key)
            changed = "kind" in value and value["kind"] != meant
            out[key] = dict(value) if changed else merge(old, value, inner if isinstance(inner, Mapping) else None)
        elif isinstance(value, Mapping):
            out[key] = merge({}, value)
        else:
            out[key] = value
    return out


_MOST_BITS = 512  # the size limit for integers; a larger integer is a typo, and Python may refuse to print it
_MAX_YAML = 1_000_000  # bytes; a recipe has a few thousand, and parsing takes 1 s per million


class _Loader(yaml.SafeLoader):
    """Loads plain data only. Tags never run code. Duplicate keys are errors, and so is every alias, because aliases can
    expand without bound or contain themselves. Unlike in YAML 1.1, `1e-4` is a number, and `no` and `2024-01-01` are
    text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not supported", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        value = yaml.SafeLoader.construct_yaml_int(loader, node)
    except ValueError:  # more digits than Python converts
        value = None
    if value is None or value.bit_length() > _MOST_BITS:
        raise yaml.MarkedYAMLError(
            problem=f"a number of {len(node.value):,} digits is too long", problem_mark=node.start_mark
        )
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def yaml_problem(error: yaml.YAMLError | RecursionError, text: str) -> str:
    """Explains to a user why `text` is not valid YAML."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if any(text.count(left) != text.count(right) for left, right in ("[]", "{}")):
        return "its brackets do not match"
    if "quoted scalar" in (getattr(error, "context", None) or ""):
        return "its quotation marks do not match"
    return getattr(error, "problem", None) or "it is not YAML"


def parse_yaml(text: str) -> Any:
    """Parses one YAML value. Returns "" for blank text. Raises yaml.YAMLError for invalid YAML."""
    return yaml.load(text, Loader=_Loader) if text.strip() else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that contains one mapping, without executing any code. Raises ValueError for any other file."""
    size = path.stat().st_size
    if size > _MAX_YAML:
        raise ValueError(f"{path} is {size:,} bytes, and the limit is {_MAX_YAML:,}. Is it the right file?")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except RecursionError:
        raise ValueError(f"{path} is not readable YAML: it is nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or "it is not UTF-8 text"
        raise ValueError(f"{path} is not readable YAML{line}: {problem}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{path} must contain a mapping of keys, not a {type(data).__name__}")
    return data


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], data: Mapping[str, Any], where: str = "") -> M:
    """Validates the data. Raises ValueError with one line per problem. Each line states the key, the value and what
    is wrong with it."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = _lines(error.errors(), data)
        head = f"{where}: " if where else ""
        raise ValueError("\n".join(head + line for line in dict.fromkeys(lines))) from None


_WRONG_TYPE = re.compile(r"_(type|parsing|parsing_size|from_float)$")


def _lines(problems: Sequence[Mapping[str, Any]], data: Any) -> list[str]:
    """Describes each problem in one line. If a value has the right form for one type of a union, only the problems
    inside the value are described. The errors for the other types (such as "not a tuple") are left out."""
    keys = [_key(problem, data) for problem in problems]
    wrong = [_WRONG_TYPE.search(problem["type"]) is not None for problem in problems]
    fitting = {key for key, is_wrong in zip(keys, wrong, strict=True) if not is_wrong}
    return [
        _line(key, problem)
        for key, problem, is_wrong in zip(keys, problems, wrong, strict=True)
        if not is_wrong or not any(other == key or other.startswith(f"{key}.") for other in fitting)
    ]


def _key(problem: Mapping[str, Any], data: Any) -> str:
    """Returns the dotted key of a problem in the user's data."""
    path: list[str] = []
    node = data
    loc = list(problem["loc"])
    for i, part in enumerate(loc):
        inside = isinstance(node, Mapping) and part in node
        if inside or (isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node)):
            node = node[part]
        elif i < len(loc) - 1 or problem["type"] not in ("missing",):
            continue  # the tag of a union, not one of the user's keys
        path.append(str(part))
    return ".".join(path)


def _line(key: str, problem: Mapping[str, Any]) -> str:
    value = problem.get("input")
    assigned = "" if isinstance(value, (Mapping, list)) or problem["type"] == "missing" else f" = {value!r}"
    if problem["type"] == "missing":
        return f"{key} is required"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.kind is required"
    if problem["type"] in ("union_tag_invalid", "literal_error"):
        context = problem.get("ctx", {})
        choices = context.get("expected_tags") or context.get("expected", "")
        tag = context.get("tag", value)
        names = [c.strip(" '") for c in str(choices).replace(" or ", ",").split(",") if c.strip(" '")]
        what = "kind" if "tag" in context else "value"
        return f"{key}: {unknown(str(tag), names, what)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key or 'recipe'}{assigned}: {message}"
