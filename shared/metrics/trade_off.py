"""Computes the headline score of one or more subjects, with its bootstrap interval.

The score is the harmonic mean of identity, prompt following and freedom. It is computed from a few sums per prompt, so
that whole prompts can be resampled, with all their pictures and pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.metrics.freedom import Pairs, Range
from shared.metrics.scores import trade_off, wilson


@dataclass(frozen=True)
class Tally:
    """Sums over one subject's pictures for one prompt."""

    subject: str
    prompt: int
    identity: float  # number of pictures that show the thing (a likeness in [0, 1] counts as a fraction)
    judged: int  # number of pictures that can be judged
    # sum of the judged pictures' ceilings; a ceiling is the share of true pictures that pass (1 without true pictures)
    ceiling: float
    text: float  # sum of the pictures' prompt-following scores
    texts: int  # number of these scores
    pairs: Pairs | None = None  # set only if the prompt leaves the pose open


@dataclass(frozen=True)
class Terms:
    """The terms of the trade-off, in [0, 1]. A term that cannot be measured at all is None. The freedom of the
    `unmeasured` subjects counts as 0, because too few of their pictures show the thing."""

    identity: float | None
    text: float | None
    freedom: float | None
    unmeasured: tuple[str, ...] = ()

    @property
    def trade_off(self) -> float | None:
        """The harmonic mean of the available terms, or None if identity or text is missing."""
        if self.identity is None or self.text is None:
            return None
        return trade_off(self.identity, self.text, *(() if self.freedom is None else (self.freedom,)))


Ranges = Mapping[str, Range]  # subject -> range, for the subjects whose freedom can be measured


def measured_terms(tallies: Sequence[Tally], ranges: Ranges) -> Terms:
    """Computes the terms for all subjects together. Identity and freedom are means over subjects, and text is a mean
    over pictures."""
    identities, freedoms, unmeasured = [], [], []
    for subject in dict.fromkeys(t.subject for t in tallies):
        own = [t for t in tallies if t.subject == subject]
        if any(t.judged for t in own):
            identities.append(_share(sum(t.identity for t in own), sum(t.ceiling for t in own)))
        if subject in ranges:
            freedom = ranges[subject].freedom(_summed(own))
            freedoms.append(freedom or 0.0)
            if freedom is None:
                unmeasured.append(subject)
    texts = sum(t.texts for t in tallies)
    return Terms(
        _mean(identities), sum(t.text for t in tallies) / texts if texts else None, _mean(freedoms), tuple(unmeasured)
    )


def bootstrap_terms(
    tallies: Sequence[Tally], ranges: Ranges, level: float = 0.95, rounds: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Returns percentile intervals of `identity`, `text`, `freedom` and `trade_off`, resampling whole prompts. Missing terms
    get (nan, nan). If identity or text is 0 for every prompt, or 1 for every prompt, resampling shows no spread, so
    Wilson's interval is used for that term, and the interval of the trade-off is widened accordingly.
    """
    if not tallies:
        return dict.fromkeys(("identity", "text", "freedom", "trade_off"), (math.nan, math.nan))
    rng = np.random.default_rng(seed)
    numbers: dict[str, list[float]] = {"identity": [], "text": [], "freedom": [], "trade_off": []}
    for draw in rng.integers(0, len(tallies), (rounds, len(tallies))):
        terms = measured_terms([tallies[i] for i in draw], ranges)
        for key, values in numbers.items():
            value = getattr(terms, key)
            values.append(math.nan if value is None else value)
    spans = {k: _quantiles(v, level) for k, v in numbers.items()}
    ends = {k: _certain(tallies, k, level) for k in ("identity", "text")}
    for key, end in ends.items():
        spans[key] = end or spans[key]
    if any(ends.values()):
        low, high = (
            [spans[k][i] for k in ("identity", "text", "freedom") if not math.isnan(spans[k][i])] for i in (0, 1)
        )
        known = spans["trade_off"]
        if not math.isnan(known[0]):
            spans["trade_off"] = min(known[0], trade_off(*low)), max(known[1], trade_off(*high))
    return spans


def _certain(tallies: Sequence[Tally], key: str, level: float) -> tuple[float, float] | None:
    """Returns Wilson's interval over prompts if the term is 0 for every prompt, or 1 for every prompt. Otherwise,
    returns None."""
    sums = [(t.identity, t.judged, t.ceiling) if key == "identity" else (t.text, t.texts, t.texts) for t in tallies]
    known = [s for s in sums if s[1]]
    if not known or not (all(v == 0 for v, _, _ in known) or all(v == n for v, n, _ in known)):
        return None
    low, high = wilson(len(known) if known[0][0] else 0, len(known), level)
    ceiling = sum(c for _, _, c in known) / sum(n for _, n, _ in known)
    return _share(low, ceiling), _share(high, ceiling)


def _share(part: float, whole: float) -> float:
    """Returns part / whole, at most 1. Returns 0 if the whole is 0, because then no true picture passes."""
    return min(1.0, part / whole) if whole > 0 else 0.0


def _summed(tallies: Sequence[Tally]) -> Pairs:
    known = [t.pairs for t in tallies if t.pairs is not None]
    return Pairs(sum(p.of for p in known), sum(p.counted for p in known), sum(p.distance for p in known))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _quantiles(values: Sequence[float], level: float) -> tuple[float, float]:
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
