"""Verifies that pictures show the subject itself, using its references and a bar set by true pictures.

A picture is verified if it is recognized among look-alikes, is not a copy of a reference, and reaches the similarity
to the references that 95% of true pictures of the thing reach. The first condition alone would accept a picture of the
thing with arms of the wrong colour, because the picture only has to be more similar to this thing than to eight others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from shared.metrics.copied_things import thing_similarity
from shared.metrics.copying import Copying, calibrate, find_copies
from shared.metrics.crops import crop_embeddings, placements
from shared.metrics.encoders import Instruments
from shared.metrics.scores import Retrieval, retrieve, similarities

SUBJECT = "the subject"
PASSING = 0.95  # the bar is the likeness to the references that this share of true pictures reaches
FACES = frozenset({"face"})  # class nouns of things that can be told apart only by their faces
FACELESS = ("back", "above")  # views that prompts may request but that show no face


@dataclass(frozen=True)
class Look:
    """The instruments' readings of N pictures. A reading is None if its instrument or the look-alikes are missing."""

    who: Tensor  # [N, D] embeddings from the identity instrument
    whole: Tensor  # [N, E] embeddings of the whole picture
    copying: Copying
    retrieved: Retrieval | None
    likeness: Tensor  # float64 [N]: mean cosine with the two most similar references
    face: Tensor | None  # bool [N]: whether a face is visible; None if the thing is not a face
    crops: Tensor | None  # [N, F] embeddings of crops aligned on the thing, which tell poses apart
    places: Tensor | None  # [N, 3] from `placements`
    pasted: Tensor | None  # float64 [N, R]: pixelwise match of the thing in the picture with that in each reference

    def copied(self, limit: float | None = None) -> Tensor:
        """Returns whether each picture is a copy, as bool `[N]`. A picture is a copy if it copies a whole
        reference, or if its thing matches the thing in a reference with a correlation of at least `limit`."""
        whole = self.copying.copied
        return whole if limit is None or self.pasted is None else whole | (self.pasted.amax(1) >= limit)

    def source(self, n: int) -> int:
        """Returns the index of the reference that picture n copies."""
        whole = self.pasted is None or bool(self.copying.copied[n])
        return int(self.copying.nearest[n]) if whole or self.pasted is None else int(self.pasted[n].argmax())

    def passes(self, least: Sequence[float], limit: float | None = None) -> Tensor:
        """Returns whether each picture is verified, as bool `[N]`. A verified picture is recognized, is not a copy,
        shows a face if the thing is a face, and reaches its `least` likeness. Requires look-alikes.
        """
        assert self.retrieved is not None
        seen = self.retrieved.hits & ~self.copied(limit)
        if self.face is not None:
            seen = seen & self.face
        return seen & (self.likeness >= torch.tensor(list(least), dtype=torch.float64))

    @staticmethod
    def joined(looks: Sequence[Look]) -> Look:
        """Joins the readings of several batches into one, in order."""

        def cat(values: Sequence[Tensor | None]) -> Tensor | None:
            known = [v for v in values if v is not None]
            return torch.cat(known) if known else None

        copies = [k.copying for k in looks]
        found = [k.retrieved for k in looks if k.retrieved is not None]
        return Look(
            torch.cat([k.who for k in looks]),
            torch.cat([k.whole for k in looks]),
            Copying(*(torch.cat([getattr(c, f.name) for c in copies]) for f in fields(Copying))),
            Retrieval(
                tuple(n for r in found for n in r.nearest),
                torch.cat([r.hits for r in found]),
                torch.cat([r.margin for r in found]),
                found[0].chance,
            )
            if found
            else None,
            torch.cat([k.likeness for k in looks]),
            cat([k.face for k in looks]),
            cat([k.crops for k in looks]),
            cat([k.places for k in looks]),
            cat([k.pasted for k in looks]),
        )


class Verifier:
    """Compares pictures with a subject's references.

    Args:
        references: `[R, 3, H, W]` in [-1, 1]
        gallery: look-alikes, name -> `[n, 3, H, W]`; without look-alikes, recognition is not tested
        fresh: pictures of the subject that are not references, used to calibrate what counts as a copy
        through: the model's autoencoder, which generated pictures have passed through. The references and look-alikes
            are also passed through it, so that the detail lost in the autoencoder does not lower the scores
        masks: masks of the thing in the references, `[R, H, W]` in [0, 1]. If None, the locator's maps are used
    """

    def __init__(
        self,
        references: Tensor,
        instruments: Instruments,
        class_noun: str = "",
        gallery: Mapping[str, Tensor] | None = None,
        fresh: Tensor | None = None,
        through: Callable[[Tensor], Tensor] | None = None,
        masks: Tensor | None = None,
    ) -> None:
        who, whole = instruments.identity or instruments.text_image, instruments.text_image or instruments.identity
        if who is None or whole is None:
            raise ValueError(
                "a scorer needs at least one image encoder; it can be a CLIP folder, a DINO folder or the toybox's own"
            )
        if len(references) == 0:
            raise ValueError("no references: a scorer needs at least one picture of the subject")
        self.instruments, self.references, self.through = instruments, references, through or (lambda pixels: pixels)
        self.who, self.whole = who, whole
        self.has_faces = class_noun in FACES and instruments.face_finder is not None
        self.who_references = who.images(references)
        same = who is whole
        self.whole_references = self.who_references if same else whole.images(references)
        self.limits = calibrate(
            references, self.whole_references, fresh, None if fresh is None else whole.images(fresh)
        )
        shown = self.through(references) if through else references
        self.shown = who.images(shown) if through else self.who_references
        self.gallery: dict[str, Tensor] | None = None
        if gallery:
            self.gallery = {SUBJECT: self.shown, **{n: who.images(self.through(p)) for n, p in gallery.items()}}
        locator = instruments.locator
        self.masks = masks if masks is not None or locator is None else locator.where(references)

    @property
    def chance(self) -> float | None:
        """The accuracy of a random guess among the gallery's entries, or None without look-alikes."""
        return 1 / len(self.gallery) if self.gallery else None

    def look(self, pixels: Tensor) -> Look:
        """Applies all instruments to pictures `[N, 3, H, W]` in [-1, 1], without deciding which are verified."""
        whole = self.whole.images(pixels)
        who = whole if self.who is self.whole else self.who.images(pixels)
        copying = find_copies(pixels, whole, self.references, self.whole_references, self.limits)
        crops = places = pasted = None
        if self.instruments.locator is not None:
            where = self.instruments.locator.where(pixels)
            places = placements(where)
            if self.instruments.pose is not None:
                crops = crop_embeddings(self.instruments.pose, pixels, where, self.instruments.crops)
            if self.gallery and self.masks is not None:
                pasted = thing_similarity(pixels, where, self.references, self.masks)
        finder = self.instruments.face_finder
        return Look(
            who,
            whole,
            copying,
            retrieve(who, self.gallery, SUBJECT) if self.gallery else None,
            similarities(who, [self.shown])[:, 0],
            finder.faces(pixels) if self.has_faces and finder is not None else None,
            crops,
            places,
            pasted,
        )
