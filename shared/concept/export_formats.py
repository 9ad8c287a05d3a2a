"""Exports a concept to another program's file format, and checks the files by loading them with that program."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.backbones.protocol import Backbone
from shared.concept import diffusers_format
from shared.concept.attaching import attach
from shared.concept.concept_folder import Concept
from shared.concept.open_backbone import load_backbone_of
from shared.concept.verify import compare
from shared.config import unknown
from shared.io.checksums import sha256
from shared.io.outputs import atomic_folder, check_output

Writer = Callable[[Concept, Path, Backbone, float], dict[str, Any]]


def export(
    concept: Concept,
    path: str | os.PathLike[str],
    format: str = "diffusers",
    overwrite: bool = False,
    *,
    backbone: Backbone | None = None,
    strength: float = 1.0,
) -> dict[str, Any]:
    """Writes the concept in another program's format, loads the files with that program, and compares the outputs.

    Args:
        path: the folder to write; it is created only if the comparison succeeds
        backbone: the model on which the outputs are compared; by default, the model that the concept was learned on. If
            a concept with this name is already attached to the model, the attached one is used
        strength: the strength that is folded into the files

    Returns:
        The contents of the folder's `export.json`. They include the hash of each file and, for each output, the largest
        difference, the limit for this difference, and the concept's effect.

    Raises:
        ValueError: if the format is unknown or cannot store the concept, if the folder exists and may not be
            overwritten, or if the written files do not produce the same outputs (in that case, no files are kept)
    """
    if format not in FORMATS:
        raise ValueError(unknown(format, FORMATS, "format"))
    if concept.meta.attention:
        kinds = ", ".join(part.taxonomy for part in concept.meta.attention.values())
        raise ValueError(f"{concept.name!r} changes the model's attention ({kinds}), which {format} files cannot store")
    path_of = concept.meta.learned_with.sampling.trajectory
    if path_of is not None and path_of.points:
        raise ValueError(f"{concept.name!r} makes clips follow a trajectory, which {format} files cannot store")
    if not strength:
        raise ValueError(f"an export of {concept.name!r} at strength 0 would be empty")
    check_output(path, overwrite)
    if backbone is None:
        backbone = load_backbone_of(concept)
    with atomic_folder(path, overwrite) as folder, _attached(concept, backbone, strength):
        report = {
            "concept": concept.name,
            "format": format,
            "strength": strength,
            "backbone": concept.meta.backbone.name,
        }
        report.update(FORMATS[format](concept, folder, backbone, strength))
        _judge(concept, report)
        report["files"] = {p.name: sha256(p) for p in sorted(folder.iterdir())}
        report["versions"] = dict(concept.meta.versions)
        (folder / "export.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


@contextmanager
def _attached(concept: Concept, backbone: Backbone, strength: float) -> Iterator[None]:
    if concept.name in backbone.placeholders or concept.name in backbone.adapters:
        yield
        return
    attach(concept, backbone, strength)
    try:
        yield
    finally:
        backbone.remove(concept.name)


def _judge(concept: Concept, report: Mapping[str, Any]) -> None:
    bad = "; ".join(f"{what} {_difference(check)}" for what, check in report["checks"].items() if not check["ok"])
    if bad:
        raise ValueError(
            f"the export of {concept.name!r} as {report['format']} does not match the concept and was not kept: {bad}"
        )


def _difference(check: Mapping[str, Any]) -> str:
    if check["max_abs_difference"] is None:
        return "has a different shape"
    share = "" if check["share"] is None else f"; the difference is {check['share']:.1%} of the concept's effect"
    return f"differs by {check['max_abs_difference']:.3g} (rounding allows {check['limit']:.3g}{share})"


def _diffusers(concept: Concept, folder: Path, backbone: Backbone, strength: float) -> dict[str, Any]:
    placeholder = backbone.placeholders.get(concept.name)
    tokens = placeholder.tokens if placeholder is not None else ()
    words = diffusers_format.public_words(placeholder.words if placeholder is not None else "", tokens, backbone)
    written: dict[str, Any] = {
        "lora": diffusers_format.write_lora(concept, folder, backbone, strength),
        "tokens": diffusers_format.write_tokens(concept, folder, backbone, tokens, strength),
    }
    if not written["lora"] and not written["tokens"]:
        raise ValueError(f"{concept.name!r} consists only of plain words ({words!r}), so there is nothing to export")
    checked = compare(backbone, concept.name, strength, folder, written, words)
    diffusers_format.write_readme(folder, concept, backbone, written, words)
    return {**written, **checked, "words": words}


#: Export formats by name.
FORMATS: Mapping[str, Writer] = {"diffusers": _diffusers}
