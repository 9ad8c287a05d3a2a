"""Reads pictures that show several subjects at once, each with its own mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from shared.config import Many
from shared.io.read_subject import transparent
from shared.io.resize import ResizeMode
from shared.sources.base import SourcePart
from shared.sources.source_context import SourceContext
from shared.sources.to_example import example, load
from shared.types import Example, Subject


class Scene(SourcePart):
    """Yields one example per picture, with a mask for each subject that the picture shows (Break-A-Scene,
    https://arxiv.org/abs/2305.16311, section 3).

    A picture that several subjects share needs a mask for each of them, for example `subjects.mug.images=scene.png
    subjects.mug.masks=masks-mug/ subjects.dog.images=scene.png subjects.dog.masks=masks-dog/`.
    """

    kind: Literal["scene"] = "scene"
    repeats: Many = 1  # how many times each picture is used
    fit: ResizeMode = "cover"  # how pictures are made square

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        for place, names in _owners(subjects).items():
            for name in names if len(names) > 1 else ():
                path = _own_path(subjects[name], place)
                if path not in subjects[name].masks and not transparent(path):
                    raise ValueError(
                        f"{path} shows {' and '.join(names)}, but {name!r} has no mask for it; "
                        f"set subjects.{name}.masks"
                    )
        return {path: s.masks.get(path) for s in subjects.values() for path in s.images}

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Yields the examples. Raises ValueError, naming the file, if a mask is missing or is completely cropped
        away."""
        if not context.subjects:
            raise ValueError("there are no subjects; set subjects.NAME.images=FILE")
        self.check(context.subjects, ())
        for _ in range(self.repeats):
            for place, names in _owners(context.subjects).items():
                yield self._together(context, place, names)

    def _together(self, context: SourceContext, place: Path, names: list[str]) -> Example:
        each = []
        for name in names:
            subject = context.subjects[name]
            path = _own_path(subject, place)
            picture, caption = load(path, subject.masks.get(path)), subject.captions.get(path, "")
            each.append(example(picture, name, "instance", context.resolution, self.fit, caption))
        masks = {name: mask for one in each for name, mask in one.masks.items()}
        return each[0].with_(owners=tuple(names), masks=masks)


def _owners(subjects: Mapping[str, Subject]) -> dict[Path, list[str]]:
    """Maps the resolved path of each picture to the names of the subjects that use it."""
    out: dict[Path, list[str]] = {}
    for name, subject in subjects.items():
        for path in subject.images:
            out.setdefault(path.resolve(), []).append(name)
    return out


def _own_path(subject: Subject, place: Path) -> Path:
    """Returns the path under which the subject lists the picture at `place`."""
    return next(path for path in subject.images if path.resolve() == place)
