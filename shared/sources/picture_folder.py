"""The user's own pictures of the class, or any further folder of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from shared.config import Part, PathText
from shared.io.read_subject import read_subject
from shared.io.resize import ResizeMode
from shared.sources.source_context import SourceContext
from shared.sources.to_example import example, load
from shared.types import Example, Role


class Folder(Part):
    """Pictures of a folder: real class (regularization) pictures, as Custom Diffusion uses them, with role "prior".

    Captions `NAME.txt` beside the pictures are used; `prompt` serves the others, with "{class_noun}" filled in. With role
    "instance" the others are left to the prompt part, as those of the references are.
    """

    kind: Literal["folder"] = "folder"
    images: PathText
    subject: str = ""  # whose class it is; may be left out where there is one subject
    role: Role = "prior"
    prompt: str = "a photo of a {class_noun}"
    fit: ResizeMode = "cover"
    limit: int = Field(default=0, ge=0)  # the first so many; 0: all

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """ValueError when the folder holds no pictures, one of them cannot be read, or the subject is not clear."""
        owner = context.owner(self.subject, f"source folder {self.images}")
        noun = context.subjects[owner].class_noun
        default = self.prompt if self.role == "prior" else ""
        if "{class_noun}" in default and not noun:
            raise ValueError(f"source folder: {default!r} needs subject.class_noun, and {owner!r} has none")
        subject = read_subject(self.images, noun)
        default = default.replace("{class_noun}", noun)
        for path in subject.images[: self.limit or None]:
            picture, caption = load(path, subject.masks.get(path)), subject.captions.get(path, default)
            yield example(picture, owner, self.role, context.resolution, self.fit, caption)
