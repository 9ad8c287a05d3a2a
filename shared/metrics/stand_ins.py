"""What chooses the best checkpoint: stand-ins for identity, prompt following and freedom that see the references alone.

Whatever the finished concept is judged by (look-alikes, true pictures of the thing) must not choose it. The readings are
soft, for eight to sixteen pictures are few: one misread attribute would otherwise count more than the difference between
two checkpoints. Freedom lies between two constants that were measured on things that nothing is tested on (`Typical`).
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

FLOOR = 0.05  # of each stand-in: two rigid checkpoints still differ by the other two


@dataclass(frozen=True)
class Previewed:
    """N pictures made while training, and what was seen of them."""

    pixels: Tensor
    prompts: Sequence[str]
    expects: Sequence[Mapping[str, str]]
    look: Look
    scores: Mapping[str, list[float]]


def stand_ins(made: Previewed, instruments: Instruments) -> dict[str, float]:
    """`score`: the harmonic mean of `stand_in_identity`, `stand_in_text` and `stand_in_freedom`, of those there are."""
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
    """Per picture `[N]` on [0, 1]: 0 as like the references as another thing of its class and colours, 1 as the thing
    itself (as typical things are); without such constants the likeness as it is. 0 for copies and faces not seen.
    """
    if typical is not None and typical.same > typical.other:
        like = (look.likeness - typical.other) / (typical.same - typical.other)
    else:
        key = next(k for k in ("identity_i", "dino_i", "clip_i") if k in scores)
        like = torch.tensor(scores[key], dtype=torch.float64)
    like = like.clamp(0, 1) * (~look.copying.copied).double()
    return like if look.face is None else like * look.face.double()


def soft_freedom(made: Previewed, who: Tensor, typical: Typical | None) -> float | None:
    """The mean distance of crops over pairs of one prompt, each pair weighted by how much both show the thing, between
    the two constants; None without constants, crops, or two pictures of a prompt that leaves view and style open.
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
    """How far the prompts were followed: the chances of what they ask for, where a reader gives them."""
    if isinstance(instruments.attributes, SoftReader) and any(made.expects):
        chances = instruments.attributes.chances(made.pixels, made.expects)
        values = [sum(c.values()) / len(c) for c in chances if c]
    else:
        values = [v for v in made.scores.get("text", []) if not math.isnan(v)]
    return sum(values) / len(values) if values else None
