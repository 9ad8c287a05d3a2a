"""Computes, from stand-ins for identity, text and freedom, the score by which the best checkpoint is selected.

The finished concept is judged against look-alikes and true pictures of the thing, so these must not also be used to
select the checkpoint. The stand-ins compare the pictures only with the references. They are continuous, because with
only eight to sixteen pictures, a yes-or-no reading of one attribute could outweigh the difference between two
checkpoints. Identity and freedom are scaled with constants measured on things that no test uses (`Typical`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.metrics.encoders import Instruments, SoftReader, Typical
from shared.metrics.scores import cosine, trade_off
from shared.metrics.verification import Look

# Each stand-in enters the score with at least this value. Even if two checkpoints both have a freedom of 0, the
# other stand-ins then decide between them.
FLOOR = 0.05


@dataclass(frozen=True)
class Previewed:
    """N pictures generated during training, with their prompts and the instruments' readings."""

    pixels: Tensor
    prompts: Sequence[str]
    expects: Sequence[Mapping[str, str]]
    look: Look
    scores: Mapping[str, list[float]]


def stand_ins(made: Previewed, instruments: Instruments) -> dict[str, float]:
    """Returns `stand_in_identity`, `stand_in_text` and `stand_in_freedom`, and `score`, which is their harmonic mean.
    `stand_in_text` and `stand_in_freedom` are left out if they cannot be measured."""
    who = soft_identity(made.look, instruments.typical, made.scores)
    out = {"stand_in_identity": float(who.mean())}
    text = _text(made, instruments)
    if text is not None:
        out["stand_in_text"] = text
    freedom = soft_freedom(made, who, instruments.typical)
    if freedom is not None:
        out["stand_in_freedom"] = freedom
    return out | {"score": trade_off(*(max(FLOOR, v) for v in out.values()))}


def soft_identity(look: Look, typical: Typical | None, scores: Mapping[str, list[float]]) -> Tensor:
    """Rates each picture's identity from 0 to 1 (`[N]`). The likeness to the references is scaled linearly, so that the
    typical likeness of another thing of the same class and colours becomes 0, and that of the thing itself becomes 1.
    Without these constants, the rating is the unscaled likeness. Copies are rated 0. If the thing is a face, pictures
    that show no face are also rated 0.
    """
    if typical is not None and typical.same > typical.other:
        like = (look.likeness - typical.other) / (typical.same - typical.other)
    else:
        key = next(k for k in ("identity_i", "dino_i", "clip_i") if k in scores)
        like = torch.tensor(scores[key], dtype=torch.float64)
    like = like.clamp(0, 1) * (~look.copying.copied).double()
    return like if look.face is None else like * look.face.double()


def soft_freedom(made: Previewed, who: Tensor, typical: Typical | None) -> float | None:
    """Returns the mean distance between crops of pictures that share a prompt, scaled so that `typical.fixed` becomes 0
    and `typical.free` becomes 1. Each pair is weighted by the product of the two pictures' ratings in `who`.

    Only prompts that leave view and style open and have at least two pictures count. Returns None if there is no such
    prompt, if there are no crops, or if the constants are missing.
    """
    crops = made.look.crops
    if crops is None or typical is None or not typical.free > typical.fixed:
        return None
    total = weights = 0.0
    for prompt in dict.fromkeys(made.prompts):
        rows = [i for i, p in enumerate(made.prompts) if p == prompt]
        if len(rows) < 2 or {"view", "style"} & set(made.expects[rows[0]]):
            continue
        at = torch.tensor(rows)
        weight = (who[at][:, None] * who[at][None] + 1e-6).triu(1)
        total += float((weight * (1 - cosine(crops[at], crops[at]))).sum())
        weights += float(weight.sum())
    if not weights:
        return None
    return min(1.0, max(0.0, (total / weights - typical.fixed) / (typical.free - typical.fixed)))


def _text(made: Previewed, instruments: Instruments) -> float | None:
    """Rates how well the pictures follow their prompts. The rating is the mean probability of the requested attributes
    if the reader returns probabilities, and the mean `text` score otherwise. Returns None if neither is available."""
    if isinstance(instruments.attributes, SoftReader) and any(made.expects):
        chances = instruments.attributes.chances(made.pixels, made.expects)
        values = [sum(c.values()) / len(c) for c in chances if c]
    else:
        values = [v for v in made.scores.get("text", []) if not math.isnan(v)]
    return sum(values) / len(values) if values else None
