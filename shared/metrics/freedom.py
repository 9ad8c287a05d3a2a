"""Measures how much of the real object's variation in pose remains across pictures of one prompt.

D is the mean distance (1 − cosine) between the crops of two verified pictures of one prompt. R is the same distance for
true pictures of the thing from random views, and F is the distance for true pictures in one pose and place, with
everything else redrawn. Freedom is (D − F) / (R − F). It is 0 if every seed gives the same pose, and 1 if poses vary as
much as in true pictures. Only crops are compared, so neither a shift nor a different background counts as a new pose.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.metrics.scores import cosine

SEEDS = 4  # pictures per prompt, if the prompt leaves the pose open
ENOUGH = 0.3  # share of the pairs in which both pictures must be verified; otherwise freedom is not measured


@dataclass(frozen=True)
class Pairs:
    """Pairs of pictures of one prompt."""

    of: int  # total number of pairs
    counted: int  # number of pairs in which both pictures are verified
    distance: float  # sum of 1 − cosine over the counted pairs

    @property
    def mean(self) -> float:
        return self.distance / self.counted if self.counted else math.nan


def pairs(embeddings: Tensor, groups: Sequence[Hashable], counted: Tensor) -> dict[Hashable, Pairs]:
    """Compares all pairs of pictures within each group (usually the pictures of one prompt).

    Args:
        embeddings: one for each of N cropped pictures, `[N, D]`
        groups: the group of each picture
        counted: whether each picture is verified to show the thing, bool `[N]`
    """
    if not len(embeddings) == len(groups) == len(counted):
        raise ValueError(f"{len(embeddings)} embeddings, {len(groups)} groups and {len(counted)} flags")
    out: dict[Hashable, Pairs] = {}
    for group in dict.fromkeys(groups):
        members = torch.tensor([i for i, g in enumerate(groups) if g == group])
        known = members[counted[members]]
        n, k = len(members), len(known)
        between = 1 - cosine(embeddings[known], embeddings[known])
        total = float(between.triu(1).sum()) if k > 1 else 0.0
        out[group] = Pairs(n * (n - 1) // 2, k * (k - 1) // 2, total)
    return out


def pooled(of_groups: Iterable[Pairs]) -> Pairs:
    """Adds up the pairs of all groups."""
    every = list(of_groups)
    return Pairs(sum(p.of for p in every), sum(p.counted for p in every), sum(p.distance for p in every))


@dataclass(frozen=True)
class Range:
    """The scale for distances between crops of one thing."""

    free: float  # R: the thing from random views
    fixed: float  # F: the thing in one pose and place

    def freedom(self, made: Pairs) -> float | None:
        """Returns (D − F) / (R − F), clamped to [0, 1], or None if too few pairs are verified or R is not above F."""
        if not made.of or made.counted < ENOUGH * made.of or not self.free > self.fixed:
            return None
        return min(1.0, max(0.0, (made.mean - self.fixed) / (self.free - self.fixed)))


def effective_views(views: Sequence[str]) -> float:
    """Returns exp(entropy) of the views seen: 1 if all are the same, and the number of distinct views if they are
    equally frequent. Returns NaN if there are no views."""
    if not views:
        return math.nan
    shares = torch.tensor([views.count(v) / len(views) for v in dict.fromkeys(views)], dtype=torch.float64)
    return float((-(shares * shares.log()).sum()).exp())


def placement_spread(at: Tensor, groups: Sequence[Hashable]) -> tuple[float, float]:
    """Returns how much position and size vary within a group: the standard deviations of the centre (over both axes)
    and of the size, in half-pictures, pooled over the groups. Both are NaN if no group has more than one picture.

    Args:
        at: `[N, 3]`, as returned by `placements`
    """
    squares, freedoms = torch.zeros(3, dtype=torch.float64), 0
    for group in dict.fromkeys(groups):
        members = at[torch.tensor([g == group for g in groups])].double()
        if len(members) > 1:
            squares += (members - members.mean(0)).square().sum(0)
            freedoms += len(members) - 1
    if not freedoms:
        return math.nan, math.nan
    x, y, size = (squares / freedoms).tolist()
    return math.sqrt(x + y), math.sqrt(size)
