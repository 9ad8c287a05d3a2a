"""A phase that generates pictures with the concept learned so far, for later phases to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shared.io.contact_sheets import read_metadata, write_picture
from shared.io.decode import read_picture
from shared.io.outputs import write_text
from shared.prompts import expand, without
from shared.recipe.tasks import GenerateTask
from shared.sources.phase_pictures import KEPT
from shared.train.phase_context import ConceptTask, PhaseContext
from shared.train.resuming import model_key
from shared.train.task import Updates


@dataclass(frozen=True)
class Shot:
    """A picture to generate. `about` contains any further information about the picture that a later phase needs."""

    file: str
    owner: str
    prompt: str  # contains {concept}
    seed: int
    about: Mapping[str, Any] = field(default_factory=dict)


class Generate(ConceptTask):
    """A task that generates `batch_size` pictures per step.

    Each file contains a hash of the settings and tensors that it depends on. A resumed run therefore reuses its own
    pictures, but never those of a different run.

    Raises ValueError if the run cannot generate pictures.
    """

    def __init__(self, context: PhaseContext) -> None:
        super().__init__(context)
        self.settings: Any = context.recipe.task
        assert isinstance(self.settings, GenerateTask)
        if context.make is None:
            raise ValueError(f"phase {context.name}: this run cannot generate pictures")
        self.shots = list(self.planned())
        self.steps = self.settings.count(context.recipe.train.steps, len(context.subjects))
        self._key = ""

    def planned(self) -> Iterator[Shot]:
        """Yields the phase's shots, in order."""
        names = list(self.context.subjects)
        for number, (name, prompt) in enumerate((n, p) for n in names for p in self.settings.prompts):
            for i in range(self.settings.num):
                yield Shot(f"{name}-{number:03d}-{i:04d}.png", name, prompt, self.seed(f"{number}/{i}"))

    def seed(self, of: str) -> int:
        """Returns the seed of one picture of this phase."""
        text = f"{self.context.recipe.seed}/{self.context.name}/{of}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")

    def pictures(self, shots: Sequence[Shot]) -> Tensor:
        """Generates the pictures for these shots and returns them ([N, 3, H, W] in [-1, 1])."""
        assert self.context.make is not None
        return self.context.make(self.texts(shots), [s.seed for s in shots], self.context.recipe)

    def texts(self, shots: Sequence[Shot]) -> list[str]:
        """Returns the expanded prompts of these shots."""
        placeholders = self.context.backbone.placeholders
        return [expand(s.prompt.replace("{concept}", f"<{s.owner}>"), placeholders) for s in shots]

    def depends_on(self) -> Mapping[str, Tensor]:
        """Returns the tensors that a picture depends on."""
        return self.state_dict()

    def updates(self, step: int, micro: int) -> Updates:
        """Generates this step's pictures; there is no loss."""
        first = step * self.settings.batch_size
        self._paint(self.shots[first : first + self.settings.batch_size])
        if self.context.progress:
            done = min(first + self.settings.batch_size, len(self.shots))
            self.context.progress(f"pictures of phase {self.context.name}", done, len(self.shots))
        yield from ()

    @torch.no_grad()
    def _paint(self, shots: list[Shot]) -> None:
        context, folder = self.context, self.context.folder
        missing = [shot for shot in shots if not self._made(shot)]
        if not missing:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for shot, picture in zip(missing, self.pictures(missing), strict=True):
            about = {"prompt": shot.prompt, "seed": shot.seed, "phase": context.name, **shot.about}
            write_picture(picture, folder / shot.file, {"pcs": json.dumps(about), "key": self.key})

    @property
    def key(self) -> str:
        """A hash of everything that this phase's pictures depend on besides their prompts and seeds."""
        if not self._key:
            recipe, backbone = self.context.recipe, self.context.backbone
            digest = hashlib.sha256(model_key(backbone, self.context.loaded_strengths).encode())
            digest.update(f"{recipe.sampling!r}{recipe.train.resolution}{self.settings!r}{recipe.seed}".encode())
            for name, tensor in sorted(self.depends_on().items()):
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
            self._key = digest.hexdigest()
        return self._key

    def _made(self, shot: Shot) -> bool:
        path = self.context.folder / shot.file
        try:
            return path.is_file() and read_metadata(path).get("key") == self.key
        except ValueError:
            return False

    def result(self) -> list[dict[str, Any]]:
        """Writes and returns the list of kept pictures, after generating any that are missing.

        If the task's `keep` is set, only each subject's highest-scoring pictures are kept.
        """
        for first in range(0, len(self.shots), self.settings.batch_size):
            self._paint(self.shots[first : first + self.settings.batch_size])
        kept: list[dict[str, Any]] = []
        for name in dict.fromkeys(shot.owner for shot in self.shots):
            scored = [self._scored(shot) for shot in self.shots if shot.owner == name]
            if self.settings.keep is not None:
                scored = sorted(scored, key=lambda entry: -entry["score"])[: self.settings.keep]
            kept += scored
        text = json.dumps({"phase": self.context.name, "key": self.key, "kept": kept}, indent=1)
        self.context.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.context.folder / KEPT, text)
        return kept

    def _scored(self, shot: Shot) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "file": shot.file,
            "owner": shot.owner,
            "caption": shot.prompt,
            "score": None,
            **shot.about,
        }
        if shot.owner in self.context.scorers:
            pixels = read_picture(self.context.folder / shot.file, min_side=1).pixels[None]
            plain = without(shot.prompt.replace("{concept}", f"<{shot.owner}>"), self.context.all_nouns)
            entry["score"] = float(self.context.scorers[shot.owner](pixels, [plain])["score"])
        return entry
