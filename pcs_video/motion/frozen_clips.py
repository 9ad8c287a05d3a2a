"""Turns pictures into still clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared.config import default_kind
from shared.sources import References, Source
from shared.sources.base import SourcePart
from shared.sources.source_context import SourceContext
from shared.types import Example, Role, Subject


class FrozenClips(SourcePart):
    """Makes a still clip from each picture of another source by repeating the picture `length` times.

    From such clips, Still-Moving (https://arxiv.org/abs/2407.08674, section 4) learns both the absence of motion and a
    subject's appearance with motion layers active. CustomCrafter (https://arxiv.org/abs/2408.13239) learns only the latter.
    """

    kind: Literal["frozen_clips"] = "frozen_clips"
    length: int = Field(default=16, ge=2, le=4096)  # frames
    pictures: Annotated[Source, default_kind("references")] = References()
    role: Role = "instance"  # role of the clips, regardless of the pictures' role

    @property
    def gives(self) -> Role:
        return self.role

    @property
    def frame_counts(self) -> Mapping[str, int]:
        return {"length": self.length}

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        found = self.pictures.check(subjects, earlier)
        return found if self.role == "instance" else {}

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Yields the clips. Raises ValueError as the `pictures` source does."""
        for picture in self.pictures.examples(context):
            yield Example.clip([picture] * self.length).with_(role=self.role)
