"""One scorer for training and for evaluation: pictures in, per-picture scores and one number out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.metrics.copying import Copying, calibrate, find_copies
from shared.metrics.encoders import DinoEncoder, ImageEncoder, Instruments
from shared.metrics.scores import attribute_hits, clip_i, clip_t, retrieve, text_score, trade_off

Expects = Mapping[str, str]
SUBJECT = "the subject"


def fill(text: str, concept: str, class_noun: str) -> str:
    """`text` with `{concept}` and `{class_noun}` filled in ("thing" where they are empty), and "a" made "an" where it
    must.
    """
    filled = text.replace("{concept}", concept or "thing").replace("{class_noun}", class_noun or "thing")
    return re.sub(r"\b([Aa]) (?=[aeioAEIO])", r"\1n ", filled)


@dataclass(frozen=True)
class Measured:
    """Scores of N pictures. `scores` holds float columns of length N (NaN where a score does not apply)."""

    scores: Mapping[str, list[float]]
    hits: list[dict[str, bool]]  # per picture: attribute -> seen as asked for
    seen: list[dict[str, str]]  # per picture: attribute -> value seen
    nearest: list[str]  # per picture: the gallery entry it looks most like; "" without a gallery
    copying: Copying | None
    embeddings: Tensor  # [N, D] of the whole picture, for diversity

    def mean(self, key: str) -> float:
        """The mean of a column without its NaN; NaN when nothing is left."""
        values = [v for v in self.scores.get(key, []) if not math.isnan(v)]
        return sum(values) / len(values) if values else math.nan


@dataclass
class Scorer:
    """Compares pictures with a subject's references.

    references: `[R, 3, H, W]` in [-1, 1]. gallery: other things of the class, name -> `[n, 3, H, W]`; with it,
    identity is "recognised among them", without it the likeness to the references. fresh: pictures of the subject
    that are no references, to calibrate what counts as a copy. expects: what a picture of a prompt (in plain words)
    must show. through: what the pictures have passed (the model's autoencoder): the gallery is sent through it too, so
    that like is compared with like, and what the autoencoder cannot show is not held against the concept.
    """

    references: Tensor
    instruments: Instruments
    class_noun: str = ""
    name: str = ""
    gallery: Mapping[str, Tensor] | None = None
    fresh: Tensor | None = None
    expects: Mapping[str, Expects] = field(default_factory=dict)
    through: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        tools = self.instruments
        self._who: ImageEncoder | None = tools.identity or tools.text_image
        self._whole: ImageEncoder | None = tools.text_image or tools.identity
        if self._who is None or self._whole is None:
            raise ValueError("a scorer needs at least one image encoder: a CLIP or a DINO folder, or the toybox's own")
        if len(self.references) == 0:
            raise ValueError("no references: a scorer needs at least one picture of the subject")
        self._who_references = self._who.images(self.references)
        same = self._who is self._whole
        self._references = self._who_references if same else self._whole.images(self.references)
        fresh = None if self.fresh is None else self._whole.images(self.fresh)
        self.limits = calibrate(self.references, self._references, self.fresh, fresh)
        self._gallery: dict[str, Tensor] | None = None
        if self.gallery:
            gallery = {SUBJECT: self.references, **self.gallery}
            self._gallery = {n: self._who.images(self.through(p) if self.through else p) for n, p in gallery.items()}
        self.likeness_key = "dino_i" if isinstance(self._who, DinoEncoder) else "clip_i" if same else "identity_i"

    @property
    def chance(self) -> float | None:
        """What a guess gets in the gallery; None without one."""
        return 1 / len(self._gallery) if self._gallery else None

    def plain(self, prompt: str) -> str:
        """The prompt with the concept's name replaced by the class noun."""
        text = prompt.replace(f"<{self.name}>", "{concept}") if self.name else prompt
        return fill(text, self.class_noun, self.class_noun)

    def measure(self, pixels: Tensor, prompts: Sequence[str], expects: Sequence[Expects] | None = None) -> Measured:
        """All scores of `[N, 3, H, W]` in [-1, 1] with their N prompts; ValueError when the numbers differ."""
        if len(pixels) != len(prompts):
            raise ValueError(f"{len(pixels)} pictures and {len(prompts)} prompts")
        plain = [self.plain(p) for p in prompts]
        expected = [self.expects.get(p, {}) for p in plain] if expects is None else list(expects)
        assert self._who is not None and self._whole is not None
        whole = self._whole.images(pixels)
        who = whole if self._who is self._whole else self._who.images(pixels)
        copying = find_copies(pixels, whole, self.references, self._references, self.limits)
        scores: dict[str, list[float]] = {self.likeness_key: clip_i(who, self._who_references).tolist()}
        if self.instruments.text_image is not None:
            scores["clip_t"] = clip_t(whole, self.instruments.text_image.texts(plain)).tolist()
            scores["clip_i"] = clip_i(whole, self._references).tolist()
        scores |= {
            "copied": copying.copied.double().tolist(),
            "copy_pixel": copying.pixel.tolist(),
            "copy_embed": copying.embed.tolist(),
        }
        nearest = self._identity(who, copying, scores)
        hits, seen = self._attributes(pixels, expected, scores)
        self._follows(hits, scores)
        return Measured(scores, hits, seen, nearest, copying, whole)

    def _identity(self, who: Tensor, copying: Copying, scores: dict[str, list[float]]) -> list[str]:
        """Adds `identity` (copies count as 0) and, with a gallery, `recognised` and `margin`."""
        fresh = (~copying.copied).double()
        if self._gallery is None:
            likeness = torch.tensor(scores[self.likeness_key], dtype=torch.float64).clamp(0, 1)
            scores["identity"] = (likeness * fresh).tolist()
            return [""] * len(who)
        retrieved = retrieve(who, self._gallery, SUBJECT)
        scores |= {"recognised": retrieved.hits.double().tolist(), "margin": retrieved.margin.tolist()}
        scores["identity"] = (retrieved.hits.double() * fresh).tolist()
        return list(retrieved.nearest)

    def _attributes(
        self, pixels: Tensor, expected: Sequence[Expects], scores: dict[str, list[float]]
    ) -> tuple[list[dict[str, bool]], list[dict[str, str]]]:
        """Adds one column per expected attribute, and `attributes`, their mean per picture."""
        if self.instruments.attributes is None:
            return [{} for _ in expected], [{} for _ in expected]
        read = self.instruments.attributes.read(pixels)
        hits = attribute_hits(expected, read)
        for name in dict.fromkeys(k for h in hits for k in h):
            scores[name] = [float(h[name]) if name in h else math.nan for h in hits]
        scores["attributes"] = [sum(h.values()) / len(h) if h else math.nan for h in hits]
        return hits, [{k: v[i] for k, v in read.items()} for i in range(len(pixels))]

    def _follows(self, hits: Sequence[Mapping[str, bool]], scores: dict[str, list[float]]) -> None:
        """Adds `text`: the attributes seen as asked for, where there are any to check; else CLIPScore with the
        instrument's own factor."""
        if any(hits):
            scores["text"] = scores["attributes"]
        elif "clip_t" in scores:
            assert self.instruments.text_image is not None
            weight = self.instruments.text_image.info.text_weight
            scores["text"] = text_score(torch.tensor(scores["clip_t"], dtype=torch.float64), weight).tolist()

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Means over the pictures, and `score`: the trade-off of identity and text (identity alone where there is no
        text score).
        """
        measured = self.measure(pixels, prompts)
        out = {k: v for k in measured.scores if not math.isnan(v := measured.mean(k))}
        identity = out.get("identity", 0.0)
        if self._gallery is not None:
            # Few pictures make retrieval coarse: likeness tells steps apart that are recognised equally often.
            identity = (identity + max(0.0, min(1.0, out[self.likeness_key])) * (1 - out["copied"])) / 2
        out["score"] = trade_off(identity, out["text"]) if "text" in out else identity
        return out
