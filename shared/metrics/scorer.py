"""Scores pictures during training and evaluation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.metrics.encoders import DinoEncoder, Instruments
from shared.metrics.measure_true import ceilings
from shared.metrics.scores import attribute_hits, clip_i, clip_t, leave_one_out, text_score
from shared.metrics.stand_ins import Previewed, stand_ins
from shared.metrics.true_thing import TrueFigures
from shared.metrics.verification import FACELESS, Look, Verifier

Expects = Mapping[str, str]


def fill(text: str, concept: str, class_noun: str) -> str:
    """Replaces `{concept}` and `{class_noun}` in `text` with the given words, or with "thing" if a word is empty.
    Changes "a" to "an" where needed."""
    filled = text.replace("{concept}", concept or "thing").replace("{class_noun}", class_noun or "thing")
    return re.sub(r"\b([Aa]) (?=[aeioAEIO])", r"\1n ", filled)


@dataclass(frozen=True)
class Measured:
    """Scores of N pictures. `scores` contains float columns of length N, with NaN where a score does not apply."""

    scores: Mapping[str, list[float]]
    hits: list[dict[str, bool]]  # per picture: attribute -> whether it matches the prompt
    seen: list[dict[str, str]]  # per picture: attribute -> value seen
    nearest: list[str]  # per picture: the most similar gallery entry; "" without a gallery
    look: Look

    @property
    def embeddings(self) -> Tensor:
        """Embeddings `[N, D]` of whole pictures, for diversity."""
        return self.look.whole

    def mean(self, key: str) -> float:
        """Returns the mean of a column, ignoring NaNs, or NaN if the column has no other values."""
        values = [v for v in self.scores.get(key, []) if not math.isnan(v)]
        return sum(values) / len(values) if values else math.nan


@dataclass
class Scorer:
    """Scores pictures by comparing them with a subject's references.

    Without a gallery, identity means likeness to the references. With a gallery, it means recognition among the
    look-alikes. With both a gallery and `figures`, it means verification.

    Args:
        references: `[R, 3, H, W]` in [-1, 1]
        gallery: look-alikes, name -> `[n, 3, H, W]`
        fresh: pictures of the subject that are not references, used to calibrate what counts as a copy
        expects: for each prompt, as returned by `plain`, the attributes that a picture must show
        through: the model's autoencoder, which generated pictures have passed through
        masks: masks of the thing in the references, `[R, H, W]`
        figures: thresholds and ranges measured on true pictures of the thing
    """

    references: Tensor
    instruments: Instruments
    class_noun: str = ""
    name: str = ""
    gallery: Mapping[str, Tensor] | None = None
    fresh: Tensor | None = None
    expects: Mapping[str, Expects] = field(default_factory=dict)
    through: Callable[[Tensor], Tensor] | None = None
    masks: Tensor | None = None
    figures: TrueFigures | None = None

    def __post_init__(self) -> None:
        tools = self.instruments
        self.verifier = Verifier(
            self.references, tools, self.class_noun, self.gallery, self.fresh, self.through, self.masks
        )
        who, same = self.verifier.who, self.verifier.who is self.verifier.whole
        self.likeness_key = "dino_i" if isinstance(who, DinoEncoder) else "clip_i" if same else "identity_i"
        self.limits, self.chance = self.verifier.limits, self.verifier.chance
        among = leave_one_out(self.verifier.who_references)
        self.reference_range = (float(among.min()), float(among.max())) if len(among) > 1 else None

    @property
    def _pasted(self) -> float | None:
        return None if self.figures is None else self.figures.pasted

    def plain(self, prompt: str) -> str:
        """Replaces the concept's name in a prompt with the class noun."""
        text = prompt.replace(f"<{self.name}>", "{concept}") if self.name else prompt
        return fill(text, self.class_noun, self.class_noun)

    def measure(self, pixels: Tensor, prompts: Sequence[str], expects: Sequence[Expects] | None = None) -> Measured:
        """Computes all scores for N pictures `[N, 3, H, W]` in [-1, 1], given their prompts. Raises ValueError unless
        there is exactly one prompt per picture."""
        if len(pixels) != len(prompts):
            raise ValueError(f"expected one prompt per picture, got {len(pixels)} pictures and {len(prompts)} prompts")
        plain = [self.plain(p) for p in prompts]
        expected = [self.expects.get(p, {}) for p in plain] if expects is None else list(expects)
        look = self.verifier.look(pixels)
        scores: dict[str, list[float]] = {self.likeness_key: clip_i(look.who, self.verifier.who_references).tolist()}
        if self.instruments.text_image is not None:
            scores["clip_t"] = clip_t(look.whole, self.instruments.text_image.texts(plain)).tolist()
            scores["clip_i"] = clip_i(look.whole, self.verifier.whole_references).tolist()
        scores |= {
            "copied": look.copied(self._pasted).double().tolist(),
            "copy_pixel": look.copying.pixel.tolist(),
            "copy_embed": look.copying.embed.tolist(),
        }
        if look.pasted is not None and self._pasted is not None:
            scores["copy_thing"] = look.pasted.amax(1).tolist()
        hits, seen = self._attributes(pixels, expected, scores)
        nearest = self._identity(look, expected, scores)
        self._follows(hits, scores)
        return Measured(scores, hits, seen, nearest, look)

    def _identity(self, look: Look, expected: Sequence[Expects], scores: dict[str, list[float]]) -> list[str]:
        """Adds the `identity` column, in which copies count as 0. With a gallery, also adds `recognised` and `margin`.
        With a gallery and figures of the true thing, also adds `verified`, `likeness` and `ceiling`. For faces, also
        adds `no_face`. Returns the name of the nearest gallery entry for each picture."""
        fresh = (~look.copied(self._pasted)).double()
        nearest = [""] * len(fresh)
        if look.retrieved is None:
            likeness = torch.tensor(scores[self.likeness_key], dtype=torch.float64).clamp(0, 1)
            identity = likeness * fresh
        else:
            retrieved = look.retrieved
            nearest = list(retrieved.nearest)
            scores |= {"recognised": retrieved.hits.double().tolist(), "margin": retrieved.margin.tolist()}
            identity = retrieved.hits.double() * fresh
        if look.face is not None:
            scores["no_face"] = (~look.face).double().tolist()
            identity = identity * look.face.double()
        if look.retrieved is not None and self.figures is not None:
            least, ceiling = ceilings(self.figures, expected)
            identity = look.passes(least, self._pasted).double()
            identity[torch.tensor(ceiling).isnan()] = math.nan
            scores |= {"verified": identity.tolist(), "likeness": look.likeness.tolist(), "ceiling": ceiling}
        if look.face is not None:
            hidden = ~look.face & torch.tensor([e.get("view") in FACELESS for e in expected], dtype=torch.bool)
            identity[hidden] = math.nan  # the requested view shows no face, so there is nothing to judge
            if "ceiling" in scores:
                scores["ceiling"] = [math.nan if h else c for h, c in zip(hidden, scores["ceiling"], strict=True)]
        scores["identity"] = identity.tolist()
        return nearest

    def _attributes(
        self, pixels: Tensor, expected: Sequence[Expects], scores: dict[str, list[float]]
    ) -> tuple[list[dict[str, bool]], list[dict[str, str]]]:
        """Adds one column for each expected attribute, and the `attributes` column, which is their mean per picture.
        Returns `Measured.hits` and `Measured.seen`."""
        if self.instruments.attributes is None:
            return [{} for _ in expected], [{} for _ in expected]
        read = self.instruments.attributes.read(pixels)
        hits = attribute_hits(expected, read)
        for name in dict.fromkeys(k for h in hits for k in h):
            scores[name] = [float(h[name]) if name in h else math.nan for h in hits]
        scores["attributes"] = [sum(h.values()) / len(h) if h else math.nan for h in hits]
        return hits, [{k: v[i] for k, v in read.items()} for i in range(len(pixels))]

    def _follows(self, hits: Sequence[Mapping[str, bool]], scores: dict[str, list[float]]) -> None:
        """Adds the `text` column, which is the share of the prompt's attributes that the picture shows. If no
        attributes can be checked, `text` is the CLIPScore, computed with the instrument's own factor."""
        if any(hits):
            scores["text"] = scores["attributes"]
        elif "clip_t" in scores:
            assert self.instruments.text_image is not None
            weight = self.instruments.text_image.info.text_weight
            scores["text"] = text_score(torch.tensor(scores["clip_t"], dtype=torch.float64), weight).tolist()

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Returns each score's mean over the pictures, and `score`, by which the best checkpoint is selected (see
        `stand_ins`)."""
        plain = [self.plain(p) for p in prompts]
        measured = self.measure(pixels, prompts)
        out = {k: v for k in measured.scores if not math.isnan(v := measured.mean(k))}
        expected = [self.expects.get(p, {}) for p in plain]
        return out | stand_ins(Previewed(pixels, plain, expected, measured.look, measured.scores), self.instruments)
