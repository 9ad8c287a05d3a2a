"""Opens a runner with its concepts loaded, from command-line options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from shared.backbones import load_backbone
from shared.concept import Concept, load_backbone_of, read
from shared.concept.concept_folder import META, read_meta
from shared.concept.lora_import import import_lora
from shared.concept.lora_tensors import find_file
from shared.concept.open_backbone import known_model, where_learned
from shared.config import MOST_STRENGTH, expanded
from shared.prompts import check_known, check_named
from shared.runner.base import Runner
from shared.sampling.hooks import StrengthSchedule
from shared.train.device import pick_device
from shared.train.precision import DTYPES, resolve_precision


@dataclass(frozen=True)
class AskedLora:
    """A LoRA file from another program, as given on the command line."""

    path: Path
    strength: float = 1.0
    token: str = ""  # the words for the subject in the LoRA's training captions
    class_noun: str = ""


def parse_loras(loras: Sequence[str], tokens: Sequence[str], class_noun: str = "") -> list[AskedLora]:
    """Parses `FILE` or `FILE:STRENGTH` options with their tokens.

    Raises ValueError if tokens are given but their number differs from the number of files, if a class noun is given
    without a file, or if a file does not exist.
    """
    if tokens and len(tokens) != len(loras):
        raise ValueError(
            f"{len(tokens)} --token for {len(loras)} --lora: give one --token per --lora, in the same "
            "order, or no --token"
        )
    if class_noun and not loras:
        raise ValueError("--class-noun applies only to --lora, which is not given; a concept stores its own class noun")
    asked = []
    for text, token in zip(loras, tokens or [""] * len(loras), strict=True):
        path, strength = parse_concept(text, "--lora")
        asked.append(AskedLora(find_file(path), strength, " ".join(token.split()), class_noun))
    return asked


def check_judged(concepts: Sequence[str], loras: Sequence[AskedLora], references: Path | None) -> None:
    """Raises ValueError unless exactly one concept or LoRA is given. A LoRA must also have a token, a class noun and
    references."""
    if len(concepts) + len(loras) != 1:
        counted = f"{len(concepts)} --concept" + (f" and {len(loras)} --lora" if loras else "")
        raise ValueError(f"evaluate takes exactly one --concept or --lora, got {counted}")
    for lora in loras:
        if not lora.token:
            raise ValueError(f'--lora {lora.path}: give the words it was trained with, for example --token "sks mug"')
        if not (lora.class_noun or " " in lora.token):
            raise ValueError(f"--token {lora.token!r} does not end in a class noun: add --class-noun mug, for example")
        if references is None:
            raise ValueError(f"--lora {lora.path}: give --references FOLDER with the pictures it was trained on")


def parse_concept(text: str, option: str = "--concept") -> tuple[Path, float]:
    """Parses `PATH` or `PATH:STRENGTH`. Raises ValueError if the strength is not a number or is out of range."""
    path, sep, strength = text.rpartition(":")
    if sep and not expanded(text).exists():
        try:
            value = float(strength)
        except ValueError:
            raise ValueError(
                f"{option} {text!r}: {strength!r} is not a strength; write PATH:0.8, for example"
            ) from None
        if not abs(value) <= MOST_STRENGTH:
            raise ValueError(f"{option} {text!r}: the strength must be between -{MOST_STRENGTH} and {MOST_STRENGTH}")
        return expanded(path), value
    return expanded(text), 1.0


R = TypeVar("R", bound=Runner)


def open_runner(
    kind: type[R],
    backbone: str | None,
    concepts: Sequence[str],
    device: str | None = None,
    precision: str = "auto",
    download: bool = False,
    loras: Sequence[AskedLora] = (),
    **how: Any,
) -> R:
    """Opens a runner and loads its concepts into `backbone` or, by default, into the model that the first concept was
    learned on.

    Args:
        kind: the runner's class
        concepts: `PATH[:STRENGTH]` for each concept
        download: whether the model may be downloaded from the hub
        loras: LoRA files from other programs, loaded after the concepts
        how: arguments for `kind.prepared`
    """
    opened = [(read(p), s) for p, s in (parse_concept(c) for c in concepts)]
    check_names(concepts, [concept for concept, _ in opened])
    check_families(kind, [concept for concept, _ in opened])
    where = pick_device(device)
    if precision == "auto":  # on a CPU, the weights stay in fp32, and only computations use lower precision
        precision = resolve_precision(precision, where) if where.type == "cuda" else "no"
    dtype = DTYPES[precision]
    options: dict[str, Any] = {"device": where, "dtype": dtype, "download": download}
    options["prepare"] = partial(kind.prepared, **how) if how else kind.prepared
    model = load_backbone_of(opened[0][0], backbone, **options) if opened else load_backbone(backbone, **options)
    runner = kind(model)
    for concept, strength in opened:
        runner.load(concept, strength)
    for lora in loras:
        runner.load(import_lora(lora.path, model, lora.token, lora.class_noun), lora.strength)
    return runner


def kinds_of(concepts: Sequence[str]) -> dict[str, str] | None:
    """Returns the kind of each concept (`PATH[:STRENGTH]`), by name. Returns None if a concept cannot be read; the
    error is reported when that concept is opened."""
    try:
        metas = [read_meta(parse_concept(c)[0] / META) for c in concepts]
    except (OSError, ValueError):
        return None
    return {meta.name: meta.kind for meta in metas}


def check_prompts(prompts: Sequence[str], concepts: Sequence[str], loras: Sequence[AskedLora] = ()) -> None:
    """Raises ValueError if a prompt names a concept that is not given, or does not name a subject that is given. This
    check loads no model. It is skipped if a concept cannot be read; the error is reported when that concept is
    opened."""
    kinds = kinds_of(concepts)
    if kinds is None:
        return
    for prompt in prompts:
        check_named(prompt, kinds)
        if not loras:  # the names of LoRAs are not known until they are imported
            check_known(prompt, kinds)


def check_names(given: Sequence[str], concepts: Sequence[Concept]) -> None:
    """Raises ValueError if two of the concepts, which were given as `PATH[:STRENGTH]`, have the same name."""
    first: dict[str, str] = {}
    for text, concept in zip(given, concepts, strict=True):
        name = concept.meta.name
        if name in first:
            raise ValueError(
                f"{first[name]} and {text} are both called {name!r}: give only one of them. A copied or renamed folder keeps "
                "the name under which its concept was learned"
            )
        first[name] = text


def check_families(kind: type[Runner], concepts: Sequence[Concept]) -> None:
    """Raises ValueError, naming concepts and families, if no model that this runner supports can load all these
    concepts, or if a concept is a motion and this runner uses no motions. This check loads no model. Concepts of
    families that only other packages know are checked once the model is loaded."""
    for concept in concepts:
        kind.check_kind(concept)
    known = frozenset[str]().union(*kind.families, *Runner.families)
    families = {c.meta.name: c.meta.backbone.family for c in concepts if c.meta.backbone.family in known}
    for name, family in families.items():
        reading = [some for some in kind.families if family in some]
        if not reading:
            choices = ", ".join(sorted(frozenset[str]().union(*kind.families)))
            raise ValueError(
                f"{name!r} was learned on {family}, whose models do not generate {kind.makes}: give concepts learned on "
                f"{choices}"
            )
        for other, its in families.items():
            if not any(its in some for some in reading):
                raise ValueError(
                    f"{name!r} was learned on {family}, but {other!r} on {its}: no model can load both. Leave one out, or "
                    "learn one of them again on the other's model"
                )


def model_asked_for(backbone: str | None, concepts: Sequence[str]) -> str | Path | None:
    """Returns the model that `open_runner` opens. This is `backbone` if it is given, and the model of the first concept
    otherwise. If there are no concepts either, returns None, which means the toybox."""
    if backbone or not concepts:
        return backbone
    return where_learned(read(parse_concept(concepts[0])[0]))


def read_by(concepts: Sequence[str | Path], backbone: str | None, motion_adapter: Path | None = None) -> list[Path]:
    """Returns the folders that `open_runner` reads, including those of the model and of the motion adapter, so that no
    output overwrites them.

    Args:
        concepts: `PATH[:STRENGTH]`, or folders

    Raises ValueError if `backbone` is empty text.
    """
    if backbone == "":
        raise ValueError("the backbone is empty (perhaps it was given as a shell variable that is not set)")
    folders = [c if isinstance(c, Path) else parse_concept(c)[0] for c in concepts]
    model = expanded(backbone) if backbone else known_model(folders[0]) if folders else None
    return [*folders, *(path for path in (model, motion_adapter) if path and path.exists())]


def check_strengths(texts: Sequence[str]) -> list[StrengthSchedule]:
    """Parses strength schedules with `StrengthSchedule.parse`. Raises ValueError, naming the option, if one is invalid
    or if a concept is given twice."""
    try:
        changes = [StrengthSchedule.parse(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"--strength: {error}") from None
    names = [name for change in changes for name in change.strengths]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"--strength: {name!r} is given twice; combine its points in one option, separated by commas"
            )
    return changes


def check_precision(precision: str) -> str:
    """Returns `precision` if it is "auto", "no", "bf16" or "fp16", and raises ValueError otherwise."""
    if precision not in ("auto", *DTYPES):
        raise ValueError(f"--precision {precision!r}: choose auto, no, bf16 or fp16")
    return precision
