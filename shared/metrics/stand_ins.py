"""The score that selects the best checkpoint, made of stand-ins for identity, text and freedom that use only the references.

The measures that judge the finished concept (look-alikes, true pictures of the thing) must not also select it. The
readings are soft, because with only eight to sixteen pictures one misread attribute would otherwise outweigh the difference
between two checkpoints. Freedom is scaled between two constants measured on things that no test uses (`Typical`).
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

FLOOR = 0.05  # minimum of each stand-in, so that two checkpoints without freedom still differ by the other stand-ins


@dataclass(frozen=True)
class Previewed:
    """N pictures generated during training, and what was seen in them."""

    pixels: Tensor
    prompts: Sequence[str]
    expects: Sequence[Mapping[str, str]]
    look: Look
    scores: Mapping[str, list[float]]


def stand_ins(made: Previewed, instruments: Instruments) -> dict[str, float]:
    """Returns `stand_in_identity`, `stand_in_text`, `stand_in_freedom` where measurable, and `score`, their harmonic mean."""
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
    """Rates the identity of each picture in [0, 1], as `[N]`. A picture gets 0 for the likeness that another thing of
    the same class and colours typically has to the references, and 1 for the typical likeness of the thing itself.
    Without these constants, returns the plain likeness. Copies, and pictures in which a face should be seen but is not,
    get 0.
    """
    if typical is not None and typical.same > typical.other:
        like = (look.likeness - typical.other) / (typical.same - typical.other)
    else:
        key = next(k for k in ("identity_i", "dino_i", "clip_i") if k in scores)
        like = torch.tensor(scores[key], dtype=torch.float64)
    like = like.clamp(0, 1) * (~look.copying.copied).double()
    return like if look.face is None else like * look.face.double()


def soft_freedom(made: Previewed, who: Tensor, typical: Typical | None) -> float | None:
    """Returns the mean distance between the crops of one prompt, on the scale of the two constants. Each pair is
    weighted by how much both pictures show the thing. Returns None without constants, crops, or two pictures of a
    prompt that leaves view and style open.
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
    """Rates how well the prompts were followed, from the probabilities of the requested attributes if a reader returns them."""
    if isinstance(instruments.attributes, SoftReader) and any(made.expects):
        chances = instruments.attributes.chances(made.pixels, made.expects)
        values = [sum(c.values()) / len(c) for c in chances if c]
    else:
        values = [v for v in made.scores.get("text", []) if not math.isnan(v)]
    return sum(values) / len(values) if values else None
