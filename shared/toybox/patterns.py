"""Draws surface patterns. They distinguish things of the same class and palette, and captions never describe them.

A pattern is drawn from an integer seed and defined in the object space of its thing (the unit sphere), so that each
view shows a different part of the same pattern. The accent colours come from a continuous space and are chosen to stand
out from the thing's own two colours.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from shared.toybox.primitives import rotation
from shared.toybox.world import RGB, Thing

KINDS = ("bands", "spots", "checker", "zigzag", "swirl", "rings", "patches", "net")


# Cycles per unit length. The patterns are bold enough to survive a lossy autoencoder, and fine enough to be visible
# from every side.
_WAVES = {"spots": (1.6, 2.5), "net": (1.5, 2.2), "patches": (1.2, 1.8), "checker": (1.3, 1.9), "swirl": (1.0, 2.0)}
# For each kind of pattern, the two signal levels above which it covers about a quarter and about half of a surface. The
# levels for other coverages are interpolated.
_LEVELS = {
    "bands": (0.71, 0.0),
    "zigzag": (0.71, 0.0),
    "spots": (-0.39, -0.49),
    "checker": (0.17, 0.0),
    "swirl": (0.71, 0.0),
    "rings": (0.71, 0.0),
    "patches": (0.85, 0.0),
    "net": (0.92, 0.71),
}


def _level(kind: str, coverage: Tensor) -> Tensor:
    quarter, half = _LEVELS[kind]
    return quarter + (half - quarter) * (coverage - 0.25) / 0.25


@dataclass(frozen=True)
class Pattern:
    """The parameters of one pattern.

    turn: the rotation of object space, [3][3]
    wave: cycles per unit length
    offset: three phases in radians
    coverage: the share of the main surface that has an accent colour
    arms: the number of arms of a swirl
    two: whether the second accent is used
    proportions: factors for length, width and height, and the taper per unit height
    """

    kind: str
    turn: tuple[tuple[float, ...], ...]
    wave: float
    offset: tuple[float, float, float]
    coverage: float
    arms: int
    two: bool
    proportions: tuple[float, float, float, float]


@lru_cache(maxsize=50_000)
def pattern(seed: int) -> Pattern:
    """Returns the pattern for a seed. Several candidates are drawn, and the first that is visible from every side and
    covers no side completely is used. If there is no such candidate, the one that comes closest is used."""
    rng = np.random.default_rng([seed, 3])
    kind = KINDS[int(rng.integers(len(KINDS)))]
    drawn: list[Pattern] = []
    for count in (2, 6):  # the second round is rarely needed, and checking costs more than drawing
        drawn += [_draw(rng, kind) for _ in range(count)]
        share = _shares(drawn)
        spread = np.minimum(share.min(1), 0.66 - share.max(1))
        good = np.flatnonzero(spread > 0.17)
        if len(good):
            return drawn[int(good[0])]
    return drawn[int(spread.argmax())]


def _draw(rng: np.random.Generator, kind: str) -> Pattern:
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    low, high = _WAVES.get(kind, (1.7, 2.6))
    stretch = rng.uniform(-0.12, 0.12, 4)
    offset = rng.uniform(0, 2 * np.pi, 3)
    return Pattern(
        kind,
        tuple(tuple(float(v) for v in row) for row in turn),
        float(rng.uniform(low, high)),
        (float(offset[0]), float(offset[1]), float(offset[2])),
        float(rng.uniform(0.31, 0.42)),
        int(rng.integers(2, 5)),
        bool(rng.random() < 0.4),
        (1 + float(stretch[0]), 1 + float(stretch[1]), 1 + float(stretch[2]), float(stretch[3])),
    )


def _probe() -> np.ndarray:
    """Returns 40 points on a ball for each of five sides (front, left, back, right and above), [5, 40, 3]."""
    k = np.arange(40) + 0.5
    tilt, turn = np.sqrt(k / 40) * 0.9, k * 2.39996
    cap = np.stack([np.cos(tilt), np.sin(tilt) * np.cos(turn), np.sin(tilt) * np.sin(turn)], 1) * 0.62
    return np.stack([*(cap @ rotation("z", a).T for a in (0, 90, 180, 270)), cap @ rotation("y", -90).T])


_PROBE = torch.tensor(_probe(), dtype=torch.float32).view(-1, 3)


def _shares(drawn: list[Pattern]) -> np.ndarray:
    """Returns the share of the surface that has an accent colour, on each of the five sides of a ball. The result is
    [K, 5] for K patterns of one kind."""
    n = len(_PROBE)
    p, row = _PROBE.repeat(len(drawn), 1), torch.arange(len(drawn)).repeat_interleave(n)
    rate = torch.tensor([2 * math.pi * d.wave for d in drawn])
    offset, turn = torch.tensor([d.offset for d in drawn])[row], torch.tensor([d.turn for d in drawn])
    q = (_PROBE @ turn.transpose(1, 2) * rate[:, None, None]).flatten(0, 1) + offset
    arms = torch.tensor([float(d.arms) for d in drawn])
    signal, _ = _signal(drawn[0].kind, p, q, offset, arms[row], rate[row])
    level = _level(drawn[0].kind, torch.tensor([d.coverage for d in drawn]))
    return (signal > level[row]).view(len(drawn), 5, -1).float().mean(2).numpy()


@lru_cache(maxsize=50_000)
def accents(thing: Thing) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Returns the two accent colours (RGB in [0, 1]) of a thing with a pattern."""
    rng = np.random.default_rng([thing.pattern_seed or 0, 5])
    chosen: list[np.ndarray] = []
    against = [np.array(RGB[thing.main]), np.array(RGB[thing.second])]
    best, best_gap = np.zeros(3), -1.0
    for _ in range(400):
        color = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 1) ** 0.5, rng.uniform(0.2, 1) ** 0.6))
        gap = min(_gap(color, against[0]), 1.3 * _gap(color, against[1]), *(_gap(color, c) for c in chosen))
        if gap > best_gap:
            best, best_gap = color, gap
        if gap > 0.58:
            chosen.append(color)
            if len(chosen) == 2:
                break
            best_gap = -1.0
    while len(chosen) < 2:
        chosen.append(best)
    first, second = ((float(c[0]), float(c[1]), float(c[2])) for c in chosen)
    return first, second


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    """Returns a rough perceptual distance between two colours, in which blue has the least weight."""
    return float(np.sqrt((((a - b) * (0.75, 1.05, 0.6)) ** 2).sum()))


def fingerprint(seed: int) -> np.ndarray:
    """Returns a pattern's parameters as one vector, for finding near-duplicates. Patterns whose vectors are far apart
    look clearly different."""
    p = pattern(seed)
    kind = np.eye(len(KINDS))[KINDS.index(p.kind)]
    phases = [f(v) for v in p.offset for f in (np.cos, np.sin)]
    scales = [p.wave * 2, p.coverage * 5, *(5 * v for v in p.proportions)]
    return np.concatenate([kind * 3, np.ravel(p.turn), phases, scales])


@dataclass(frozen=True)
class PatternTable:
    """The patterns of K things as tensors. The fields are those of `Pattern` without `two`, plus both accent colours.

    The two accent colours of a thing are equal if its pattern uses only one.
    """

    kind: Tensor  # [K], indices into KINDS, or -1 for a plain thing
    turn: Tensor  # [K, 3, 3]
    wave: Tensor  # [K]
    offset: Tensor  # [K, 3]
    coverage: Tensor  # [K]
    arms: Tensor  # [K]
    colors: Tensor  # [K, 2, 3]
    proportions: Tensor  # [K, 4]


def table(things: list[Thing], device: torch.device) -> PatternTable:
    """Collects the patterns of things in a table for `paint`."""
    plain = Pattern("", ((1, 0, 0), (0, 1, 0), (0, 0, 1)), 1, (0, 0, 0), 0, 2, False, (1, 1, 1, 0))
    patterns = [plain if t.pattern_seed is None else pattern(t.pattern_seed) for t in things]
    colors = [((0.0,) * 3,) * 2 if t.pattern_seed is None else accents(t) for t in things]
    colors = [c if p.two else (c[0], c[0]) for c, p in zip(colors, patterns, strict=True)]

    def stack(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).to(device)

    return PatternTable(
        torch.tensor([KINDS.index(p.kind) if p.kind else -1 for p in patterns]).to(device),
        stack([p.turn for p in patterns]),
        stack([p.wave for p in patterns]),
        stack([p.offset for p in patterns]),
        stack([p.coverage for p in patterns]),
        stack([p.arms for p in patterns]),
        stack(colors),
        stack([p.proportions for p in patterns]),
    )


def _signal(kind: str, p: Tensor, q: Tensor, offset: Tensor, arms: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluates patterns of one kind. Returns a signal [M] that is high where the surface has an accent colour, and a
    signal [M] whose sign selects one of the two accent colours.

    p: points in object space [M, 3]
    q: the same points, rotated, scaled to radians and shifted by the phases [M, 3]
    rate: radians per unit length [M]
    """
    a, b, c = q.unbind(1)
    if kind == "bands":
        return a.sin(), (a / 2 + 0.78).sin()
    if kind == "zigzag":
        teeth = torch.asin((b * 1.1).sin() * 0.98)
        return (a + 1.3 * teeth).sin(), (a / 2 + 0.65 * teeth).cos()
    if kind == "spots":
        cell = q / (2 * torch.pi)
        inside = (cell - cell.round()).square().sum(1).sqrt()
        return -inside, (cell.round().sum(1) * torch.pi + torch.pi / 2).sin()
    if kind == "checker":
        return a.sin() * b.sin() * c.sin(), a.sin()
    if kind == "swirl":
        turn = arms * torch.atan2(p[:, 1], p[:, 0]) + (rate - 6) * p[:, 2] + offset[:, 0]
        return turn.sin(), (turn / 2 + 0.78).sin()
    if kind == "rings":
        far = (p - 0.6 * torch.cos(offset)).norm(dim=1) * rate
        return far.sin(), (far / 2 + 0.78).sin()
    if kind == "patches":
        return a.sin() + (b + 1.3 * a.cos()).sin() + (c + 1.1 * b.sin()).sin(), (a + c).cos()
    return torch.maximum(a.cos(), b.cos()), a.cos() - b.cos()  # net


def paint(albedo: Tensor, position: Tensor, owner: Tensor, patterns: PatternTable) -> Tensor:
    """Applies patterns to surface points in the main colour. Returns their colours, [M, 3].

    albedo: [M, 3], the main colour at each point
    position: the points in object space [M, 3], before the proportions are applied
    owner: [M], the index of the thing to which each point belongs
    """
    painted = albedo.clone()
    kinds = patterns.kind[owner]
    for index, kind in enumerate(KINDS):
        at = (kinds == index).nonzero()[:, 0]
        if not len(at):
            continue
        who = owner[at]
        p, offset = position[at], patterns.offset[who]
        q = (patterns.turn[who] * p[:, None]).sum(2)
        rate = 2 * torch.pi * patterns.wave[who]
        signal, parting = _signal(kind, p, q * rate[:, None] + offset, offset, patterns.arms[who], rate)
        level = _level(kind, patterns.coverage[who])
        color = patterns.colors[who, (parting < 0).long()]
        painted[at] = torch.where((signal > level)[:, None], color, albedo[at])
    return painted
