"""Checks whether a run can resume from a checkpoint, which requires the same recipe and the same dependencies."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from shared.backbones.load import WORLDS
from shared.backbones.protocol import Backbone
from shared.io.checksums import sha256
from shared.types import Subject

#: Keys that may differ, because they affect where and when files are written or how memory is used, but not what is
#: learned.
_FREE = re.compile(
    r"(output|name|preview|method|title|papers|taxonomy)(\..*)?|"
    r"(phases\.[^.]+\.)?train\.(checkpoint_every|gradient_checkpointing)",
    re.ASCII,
)
#: Keys that set locations. For an interrupted run, the contents of these locations are compared instead
#: (`dependencies`).
_MOVED = re.compile(r"backbone|subjects?\.(.+\.)?(images|clips|masks|captions)", re.ASCII)
#: Keys of previews during training. Previews do not affect the random numbers used in training, so these keys matter
#: only if scores decide which state is kept.
_PREVIEWS = re.compile(r"(phases\.[^.]+\.)?train\.validation(\..*)?", re.ASCII)
#: Keys that may also change after a non-finite loss, as a remedy.
_CURE = re.compile(
    r"(phases\.[^.]+\.)?(train\.mixed_precision|train\.optimizers(\..*)?|trainable\.[^.]+\.lr)", re.ASCII
)


def same_recipe(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    after_not_finite: bool = False,
    finished: bool = False,
    scored: bool = True,
) -> None:
    """Raises ValueError naming the first key that differs from the recipe of a checkpoint or of a finished run.

    Keys that cannot affect the result may differ: output, name, method, title, papers, taxonomy, preview, the
    checkpoint interval, gradient checkpointing and, for an interrupted run, the locations of the pictures and the
    model. After a non-finite loss, learning rates, precision and optimizers may also differ. If previews cannot affect
    the result (not `scored`), validation settings may also differ.
    """
    what, cure = ("finished", "choose another output") if finished else ("interrupted", "resume with the same recipe")
    for key, before, now in _differences(old, new):
        if _FREE.fullmatch(key) or (after_not_finite and _CURE.fullmatch(key)):
            continue
        if not scored and _PREVIEWS.fullmatch(key):
            continue
        if not finished and _MOVED.fullmatch(key) and not _world(before) and not _world(now):
            continue
        raise ValueError(
            f"the {what} run had {key} = {before!r}, but this one has {now!r}: {cure}, or start over with --overwrite"
        )


def _world(value: Any) -> bool:
    """Whether a value names a model in `WORLDS`. Such a model's defaults come from its name rather than its weights."""
    return isinstance(value, str) and value in WORLDS


def same_precision(old: str, new: str) -> None:
    """Warns when "auto" resolves to a different precision than when the run began, for example on another machine."""
    if old != new:
        change = f"train.mixed_precision=auto was {old!r} when the run began and is {new!r} here"
        warnings.warn(f"{change}: the result will differ slightly from an uninterrupted run", stacklevel=2)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields every leaf key whose values differ, with both values."""
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{place}{key}.")
        elif before != now:
            yield place + key, before, now


def dependencies(
    backbone: Backbone, subjects: Mapping[str, Subject], strengths: Mapping[str, float], files: Sequence[Path] = ()
) -> dict[str, str]:
    """Returns a hash of each dependency of a run besides its recipe, keyed by a description of the dependency.

    The dependencies are the weights, the pictures and clips, the loaded concepts, and other files that the recipe
    names, such as a mesh. Must be called before the concepts to be trained are attached.
    """
    out = {"the backbone's checkpoint": backbone.checkpoint}
    for name, subject in subjects.items():
        for number, path in enumerate(subject.files, 1):
            medium = "clip" if path in subject.clips else "picture"
            what = f"{path.name} of {name!r} ({medium} {number})"
            out[f"the {medium} {what}"] = sha256(path)
            if path in subject.masks:
                out[f"the mask of {what}"] = sha256(Path(subject.masks[path]))
            if path in subject.captions:
                out[f"the caption of {what}"] = hashlib.sha256(subject.captions[path].encode()).hexdigest()
    for name in sorted({*backbone.placeholders, *backbone.adapters}):
        strength = strengths.get(name, 0.0) if name in backbone.adapters else 1.0
        out[f"the loaded concept {name!r}"] = f"{concept_hash(backbone, name)} at strength {strength:g}"
    for number, path in enumerate(files, 1):
        out[f"the file {path.name} (file {number})"] = sha256(path)
    return out


def same_dependencies(old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Raises ValueError naming the first dependency of the run that has changed."""
    for what in [*new, *(k for k in old if k not in new)]:
        before, now = old.get(what), new.get(what)
        if before != now:
            raise ValueError(
                f"{what} {_change_in_words(before, now)} since the run was interrupted: undo this change to resume, "
                "or start over with --overwrite"
            )


def _change_in_words(before: str | None, now: str | None) -> str:
    if before is None:
        return "has been added"
    if now is None:
        return "has been removed"
    return f"has changed ({_short(before)} is now {_short(now)})"


def _short(value: str) -> str:
    head, *rest = value.split(" ", 1)
    return " ".join([head[:12], *rest])


def model_key(backbone: Backbone, strengths: Mapping[str, float]) -> str:
    """Returns a key, derived from the weights and the active concepts, for the model that generates pictures."""
    digest = hashlib.sha256(backbone.checkpoint.encode())
    on = {n: s for n, s in strengths.items() if s and n in backbone.adapters}
    for name, strength in sorted(on.items()):
        digest.update(f"{strength!r}{concept_hash(backbone, name)}".encode())
    return digest.hexdigest() if on else backbone.checkpoint


def concept_hash(backbone: Backbone, name: str) -> str:
    """Returns the sha256 of the words and tensors that are attached under a name."""
    digest = hashlib.sha256()
    placeholder = backbone.placeholders.get(name)
    if placeholder is not None:
        digest.update(placeholder.words.encode())
        _add(digest, placeholder.state_dict())
    for adapter in backbone.adapters.get(name, []):
        _add(digest, adapter.state_dict())
    return digest.hexdigest()


def _add(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
