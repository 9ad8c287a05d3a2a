"""Measures how much the subject's pose varies between pictures whose prompts leave the pose open."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.metrics.freedom import Pairs, effective_views, pairs, placement_spread
from shared.metrics.scorer import Measured


@dataclass(frozen=True)
class Poses:
    """The poses in the pictures of one arm (with the concept, or by the base model). All values except `by_prompt` are
    measured only on verified pictures. Spreads are fractions of half the picture's side."""

    by_prompt: dict[int, Pairs]
    place: float  # spread of the subject's centre within a prompt; NaN for fewer than two pictures
    size: float  # spread of the subject's size within a prompt
    views: float  # effective number of views; NaN if no view was read


def poses(parts: Sequence[tuple[Measured, Sequence[int]]], free: Collection[int]) -> Poses | None:
    """Measures the poses in all pictures whose prompts are in `free`. Returns None if there are no such
    pictures, or if they have no crops or were not checked for the subject.

    parts: groups of pictures, each with its measurements and the prompt index of every picture
    """
    rows = [(m, i, p) for m, prompts in parts for i, p in enumerate(prompts) if p in free]
    if not rows or any(m.look.crops is None or m.look.places is None or "verified" not in m.scores for m, _, _ in rows):
        return None
    crops, places = (torch.stack([_of(m, name)[i] for m, i, _ in rows]) for name in ("crops", "places"))
    prompts = [p for _, _, p in rows]
    verified = torch.tensor([m.scores["verified"][i] == 1 for m, i, _ in rows], dtype=torch.bool)
    kept = verified.nonzero()[:, 0].tolist()
    place, size = placement_spread(places[verified], [prompts[i] for i in kept])
    views = [rows[i][0].seen[rows[i][1]].get("view", "") for i in kept]
    by_prompt = {p: q for p, q in pairs(crops, prompts, verified).items() if isinstance(p, int)}
    return Poses(by_prompt, place, size, effective_views([v for v in views if v]))


def _of(measured: Measured, name: str) -> Tensor:
    return getattr(measured.look, name)
