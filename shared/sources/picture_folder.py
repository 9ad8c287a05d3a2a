"""Reads a folder of pictures, such as the user's own pictures of the class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from shared.config import PathText
from shared.io.read_subject import read_subject
from shared.io.resize import ResizeMode
from shared.sources.base import SourcePart
from shared.sources.source_context import SourceContext, owner_among
from shared.sources.to_example import example, load
from shared.types import Example, Role, Subject


class Folder(SourcePart):
    """Reads pictures from a folder. By default, they are real pictures of the class (role "prior"), as in Custom
    Diffusion.

    The caption of a picture is read from `NAME.txt` next to it. With the role "prior", a picture without this file gets
    `prompt` as its caption, with "{class_noun}" filled in. With the role "instance", the recipe's prompt part fills in
    missing captions, as it does for `References`.
    """

    kind: Literal["folder"] = "folder"
    images: PathText
    subject: str = ""  # the subject whose class the pictures show; optional if there is only one subject
    role: Role = "prior"
    prompt: str = "a photo of a {class_noun}"
    fit: ResizeMode = "cover"
    limit: int = Field(default=0, ge=0, le=100_000)  # how many pictures to use, starting with the first; 0 for all

    @property
    def gives(self) -> Role:
        return self.role

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        _, read = self._read(subjects)
        return {path: read.masks.get(path) for path in read.images} if self.role == "instance" else {}

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Yields the examples. Raises ValueError if the folder has no pictures, if a picture cannot be read, or if it
        is unclear to which subject the pictures belong."""
        owner, subject = self._read(context.subjects)
        default = self._default.replace("{class_noun}", subject.class_noun)
        for path in subject.images:
            picture, caption = load(path, subject.masks.get(path)), subject.captions.get(path, default)
            yield example(picture, owner, self.role, context.resolution, self.fit, caption)

    @property
    def _default(self) -> str:
        """The caption for pictures that have no caption file."""
        return self.prompt if self.role == "prior" else ""

    def _read(self, subjects: Mapping[str, Subject]) -> tuple[str, Subject]:
        """Returns the name of the subject that owns the pictures, and a `Subject` that lists the pictures."""
        owner = owner_among(subjects, self.subject, f"source folder {self.images}")
        noun = subjects[owner].class_noun
        if "{class_noun}" in self._default and not noun:
            raise ValueError(f"source folder: {self._default!r} needs subject.class_noun, but {owner!r} has none")
        read = read_subject(self.images, noun)
        return owner, replace(read, images=read.images[: self.limit or None])
