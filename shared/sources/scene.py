"""Pictures that show several subjects at once, each with its own mask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor

from shared.config import Part
from shared.io.resize import ResizeMode
from shared.sources.source_context import SourceContext
from shared.sources.to_example import example, load
from shared.types import Example


class Scene(Part):
    """Every picture once, however many subjects name it: one example with a mask for each of them
    (Break-A-Scene, https://arxiv.org/abs/2305.16311, section 3).

    A picture that several subjects share needs a mask from each: `subjects.mug.images=scene.png
    subjects.mug.masks=masks-mug/ subjects.dog.images=scene.png subjects.dog.masks=masks-dog/`.
    """

    kind: Literal["scene"] = "scene"
    repeats: int = Field(default=1, ge=1)
    fit: ResizeMode = "cover"  # how pictures that are not square become so

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """ValueError, naming file and subject, where a mask is missing, and where cutting leaves nothing of one."""
        owners: dict[Path, list[str]] = {}
        for name, subject in context.subjects.items():
            for path in subject.images:
                owners.setdefault(path.resolve(), []).append(name)
        if not owners:
            raise ValueError("there is no subject: give pictures with subjects.NAME.images=FILE")
        for _ in range(self.repeats):
            for place, names in owners.items():
                yield self._together(context, place, names)

    def _together(self, context: SourceContext, place: Path, names: list[str]) -> Example:
        masks: dict[str, Tensor] = {}
        first: Example | None = None
        for name in names:
            subject = context.subjects[name]
            path = next(p for p in subject.images if p.resolve() == place)
            one = example(
                load(path, subject.masks.get(path)), name, "instance", context.resolution, self.fit,
                subject.captions.get(path, ""),
            )  # fmt: skip
            if len(names) > 1 and not one.masks:
                raise ValueError(
                    f"{path} shows {', '.join(names)}, and {name!r} has no mask in it: subjects.{name}.masks"
                )
            masks.update(one.masks)
            first = first or one
        assert first is not None
        return first.with_(owners=tuple(names), masks=masks)
