"""Provides pictures that an earlier phase generated, for iterated feedback, pseudo multi-view sets and
self-distillation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from shared.config import unknown
from shared.io.decode import read_picture
from shared.io.failures import may_be_intact
from shared.sources.base import SourcePart
from shared.sources.source_context import SourceContext
from shared.types import Example, Role, Subject

KEPT = "kept.json"  # the file in a phase's folder that lists the pictures kept for later phases


class PhasePictures(SourcePart):
    """Yields the pictures that the phase named `phase` generated and kept, with their prompts as captions."""

    kind: Literal["phase_pictures"] = "phase_pictures"
    phase: str
    role: Role = "instance"

    @property
    def gives(self) -> Role:
        return self.role

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        if self.phase not in earlier:
            raise ValueError(f"phase_pictures: {unknown(self.phase, earlier, 'earlier phase with pictures')}")
        return {}

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Yields the examples. Raises ValueError if no earlier phase has this name, or if the pictures that it kept
        cannot be read."""
        self.check(context.subjects, list(context.phase_folders))
        folder = context.phase_folders[self.phase]
        for entry in read_kept(folder):
            path = folder / entry["file"]
            pixels = read_picture(path, min_side=1).pixels
            yield Example(pixels, entry["caption"], (entry["owner"],), self.role, source=str(path), user_caption=True)


def read_kept(folder: Path) -> list[dict[str, Any]]:
    """Reads the list of pictures that a phase kept. Each entry has a file, a caption (which contains {concept}), an
    owner and a score. Raises ValueError if the list cannot be read."""
    try:
        return json.loads((folder / KEPT).read_text(encoding="utf-8"))["kept"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if may_be_intact(error):
            raise
        raise ValueError(f"{folder / KEPT} cannot be read; run the phase again with --overwrite") from None
