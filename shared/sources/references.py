"""Reads the user's own pictures of the subjects."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from shared.config import Many
from shared.io.resize import ResizeMode
from shared.io.terminal import encodable, names
from shared.sources.base import SourcePart
from shared.sources.source_context import SourceContext
from shared.sources.to_example import example, load
from shared.types import Example, Subject


class References(SourcePart):
    """Yields every picture of every subject `repeats` times. These examples have the role "instance", and all methods
    learn from them.

    A picture's mask is the user's mask or, without one, the picture's transparency. An opaque picture without a mask
    file has no mask. The caption is the user's own. Without one, the caption is "", and the prompt part fills it in.
    """

    kind: Literal["references"] = "references"
    repeats: Many = 1
    fit: ResizeMode = "cover"  # how pictures are made square

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        return {path: s.masks.get(path) for s in subjects.values() for path in s.images}

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Yields the examples. Raises ValueError, naming the file, if a picture or mask cannot be used (see
        `read_picture`)."""
        if not context.subjects:
            raise ValueError("there is no subject; set subject.images=FOLDER")
        small: list[str] = []
        for number in range(self.repeats):
            for name, subject in context.subjects.items():
                for path in subject.images:
                    picture = load(path, subject.masks.get(path))
                    if number == 0 and min(picture.size) * 2 < context.resolution:
                        small.append(f"{path.name} ({picture.size[0]}x{picture.size[1]})")
                    caption = subject.captions.get(path, "")
                    yield example(picture, name, "instance", context.resolution, self.fit, caption)
            if number == 0 and small:
                warnings.warn(
                    encodable(
                        f"these pictures are enlarged to {context.resolution} pixels, which blurs them: {names(small)}"
                    ),
                    UserWarning,
                    stacklevel=2,
                )
