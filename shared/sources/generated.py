"""Generates class pictures for DreamBooth's prior preservation, using the model itself before it is tuned.

In DreamBooth (arXiv 2208.12242, section 3.3, eq. 2), each class picture x_pr = x(z, c_pr) is sampled from the frozen
model with the prompt "a [class noun]".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from shared.config import Many, Seed
from shared.io.contact_sheets import read_metadata, write_picture
from shared.io.decode import read_picture
from shared.io.denoising_progress import named, part_of
from shared.io.outputs import write_text
from shared.sources.base import SourcePart
from shared.sources.source_context import SourceContext
from shared.types import Example, Role, Subject

_SCHEME = 1  # increase this when the way pictures are generated changes


class Generated(SourcePart):
    """Generates `num_images` class pictures per subject, with the role "prior", and caches them under
    `SourceContext.cache_dir`.

    The cache key covers everything that the pictures depend on (weights, prompt, guidance, steps, seed, resolution). It
    does not cover the number of pictures, so a larger number adds to the pictures that exist already. Missing and
    damaged files are generated again. Subjects of the same class share their pictures. Each picture has its prompt as
    its caption.
    """

    made: ClassVar[str] = "class pictures"
    kind: Literal["generated"] = "generated"
    num_images: int = Field(default=200, ge=1, le=100_000)
    prompt: str = "a photo of a {class_noun}"  # {class_noun} stands for the subject's class
    guidance: float = Field(default=7.5, ge=0, le=1000)  # classifier-free guidance scale
    steps: Many = 50  # denoising steps
    batch_size: int = Field(default=4, ge=1, le=1024)  # pictures per batch
    seed: Seed = 0  # determines the initial noise of every picture

    @field_validator("prompt")
    @classmethod
    def _plain(cls, prompt: str) -> str:
        other = [p for p in re.findall(r"{(.*?)}|<(.*?)>", prompt) if p[0] != "class_noun"]
        if other or not prompt.strip():
            raise ValueError(
                "class pictures are generated before the concept exists, so use only words and {class_noun}"
            )
        return prompt

    @property
    def gives(self) -> Role:
        return "prior"

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        for name, subject in subjects.items():
            if "{class_noun}" in self.prompt and not subject.class_noun:
                raise ValueError(f"class pictures use {self.prompt!r}, but {name!r} has no subject.class_noun")
        return {}

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Yields the examples. Raises ValueError if a subject lacks the class noun that the prompt needs, or if
        pictures are missing and the run cannot generate them."""
        self.check(context.subjects, ())
        for name, subject in context.subjects.items():
            prompt = self.prompt.replace("{class_noun}", subject.class_noun)
            for path in self._filled(context, prompt):
                yield Example(self._read(path), prompt, (name,), "prior", source=str(path), user_caption=True)

    def key(self, context: SourceContext, prompt: str) -> str:
        """Returns a SHA-256 hash of everything that the pictures depend on."""
        facts = [_SCHEME, context.backbone_key, prompt, self.guidance, self.steps, self.seed, context.resolution]
        return hashlib.sha256(json.dumps([*facts, *self._more_facts()]).encode()).hexdigest()

    # --- methods that a subclass overrides to generate clips -------------------------------------------------------

    def _more_facts(self) -> list[Any]:
        """Returns additional values for the key."""
        return []

    def _size(self, side: int) -> tuple[int, ...]:
        """Returns the size of a picture, (side, side), or of a clip, (frames, side, side)."""
        return side, side

    def _file(self, folder: Path, number: int) -> Path:
        return folder / f"{number:05d}.png"

    def _is_there(self, path: Path) -> bool:
        return path.is_file()

    def _read(self, path: Path) -> Tensor:
        """Returns the pixels of a file, [3, (F), H, W] in [-1, 1]. Raises ValueError if the file cannot be read."""
        return read_picture(path, min_side=1).pixels

    def _key_of(self, path: Path) -> str | None:
        return read_metadata(path).get("key")

    def _write(self, pixels: Tensor, path: Path, about: Mapping[str, str]) -> None:
        write_picture(pixels, path, about)

    # -------------------------------------------------------------------------------------------------------------

    def _filled(self, context: SourceContext, prompt: str) -> list[Path]:
        """Generates the missing pictures for a prompt. Returns the files of all its pictures."""
        key = self.key(context, prompt)
        folder = context.cache_dir / "class" / key[:24]
        paths = [self._file(folder, i) for i in range(self.num_images)]
        todo = [i for i, path in enumerate(paths) if not self._whole(path, key)]
        if todo and context.generate is None:
            where, what = f"{prompt!r} (in {folder})", self.made.split()[-1]
            made = self.made if len(todo) > 1 else self.made.removesuffix("s")
            raise ValueError(f"the cache lacks {len(todo)} {made} of {where}, and this run cannot generate {what}")
        if todo:
            self._make(context, prompt, key, {i: paths[i] for i in todo})
        return paths

    def _make(self, context: SourceContext, prompt: str, key: str, todo: dict[int, Path]) -> None:
        """Generates the pictures in `todo`, in batches. A finished batch is kept even if a later batch fails."""
        assert context.generate is not None
        folder = next(iter(todo.values())).parent
        folder.mkdir(parents=True, exist_ok=True)
        about = {"backbone": context.backbone_key, "resolution": context.resolution, **self.model_dump()}
        write_text(folder / "about.json", json.dumps({**about, "prompt": prompt, "key": key}, indent=1))
        for start in range(0, len(todo), self.batch_size):
            some = list(todo)[start : start + self.batch_size]
            seeds = [_seed(key, i) for i in some]
            *frames, side, _ = size = self._size(context.resolution)
            length: dict[str, int] = {"frames": frames[0]} if frames else {}
            on_progress = named(context.progress, f"{self.made} of {prompt!r}")
            pixels = context.generate(
                [prompt] * len(some),
                seeds,
                guidance=self.guidance,
                steps=self.steps,
                resolution=side,
                **length,
                progress=part_of(on_progress, start, len(some), len(todo)),
            )
            if pixels.shape != (len(some), 3, *size):
                raise AssertionError(f"generate returned {list(pixels.shape)}, not {[len(some), 3, *size]}")
            for i, seed, one in zip(some, seeds, pixels, strict=True):
                self._write(one, todo[i], {"key": key, "prompt": prompt, "seed": str(seed)})

    def _whole(self, path: Path, key: str) -> bool:
        """Returns whether a cached file exists, can be read, and was generated with this key."""
        if not self._is_there(path):
            return False
        try:
            self._read(path)
            return self._key_of(path) == key
        except ValueError:
            return False


def _seed(key: str, index: int) -> int:
    """Returns the seed of one picture. It is unlikely to coincide with a seed that a user chooses for testing."""
    return int.from_bytes(hashlib.sha256(f"{key}/{index}".encode()).digest()[:6], "big")
