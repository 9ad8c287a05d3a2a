"""One recipe over several subjects: its reports pooled into one row of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shared.evaluation.summary import make_score
from shared.metrics.report import Report, Score
from shared.metrics.scores import bootstrap, bootstrap_trade_off, trade_off

RATES = ("identity", "text", "background", "view", "accessory", "style", "copied")
COSINES = ("clip_t", "clip_i", "dino_i", "identity_i")


@dataclass(frozen=True)
class Goal:
    """What a recipe must reach; None leaves a part out. All in [0, 1]; `over_floor` in points of identity."""

    identity: float | None = None
    over_floor: float | None = None
    background: float | None = None

    def met(self, row: Row) -> bool | None:
        """Whether the row reaches it; None where the goal asks nothing."""
        identity, base, background = row.value("identity"), row.base("identity"), row.value("background")
        asked: list[tuple[float | None, float]] = []
        if self.identity is not None:
            asked.append((identity, self.identity))
        if self.over_floor is not None:
            asked.append((None if identity is None or base is None else identity - base, self.over_floor))
        if self.background is not None:
            asked.append((background, self.background))
        return all(v is not None and v >= limit - 1e-9 for v, limit in asked) if asked else None


@dataclass(frozen=True)
class Row:
    """One recipe over all its subjects: scores pooled over every picture, intervals drawn by subject and prompt."""

    recipe: str
    subjects: tuple[str, ...]
    pictures: int
    scores: Mapping[str, Score]
    training_seconds: float | None
    seconds_per_picture: float | None
    concept_bytes: float | None
    failed: Mapping[str, str] = field(default_factory=dict)  # subject -> what went wrong

    def value(self, key: str) -> float | None:
        return self.scores[key].value if key in self.scores else None

    def base(self, key: str) -> float | None:
        return self.scores[key].base if key in self.scores else None


def aggregate(recipe: str, reports: Mapping[str, Report], failed: Mapping[str, str]) -> Row:
    """All pictures of a recipe together."""
    made = [(s, p) for s, r in reports.items() for p in r.of_kind("concept")]
    base = [(s, p) for s, r in reports.items() for p in r.of_kind("base")]
    drifts = [(s, p) for s, r in reports.items() for p in r.of_kind("drift")]
    known = {k for _, p in made for k, v in p.scores.items() if v is not None}
    columns = {k: [_float(p.scores.get(k)) for _, p in made] for k in known}
    floors = {k: [_float(p.scores.get(k)) for _, p in base] for k in known}
    where = [(s, p.prompt) for s, p in made]
    chances = [c for r in reports.values() if (i := r.score("identity")) and (c := i.chance) is not None]
    scores: dict[str, Score] = {}
    if {"identity", "text"} <= known:
        span = bootstrap_trade_off(columns["identity"], columns["text"], where)
        value, floor = (trade_off(_mean(c["identity"]), _mean(c["text"])) for c in (columns, floors))
        scores["trade_off"] = make_score("trade_off", value, span, floor)
    for key in (*RATES, *COSINES):
        if key in known:
            base_value = None if key == "copied" else _mean(floors[key])
            chance = sum(chances) / len(chances) if key == "identity" and chances else None
            scores[key] = make_score(key, _mean(columns[key]), bootstrap(columns[key], where), base_value, chance)
    if drifts:
        values = [_float(p.scores.get("drift")) for _, p in drifts]
        scores["drift"] = make_score("drift", _mean(values), bootstrap(values, [(s, p.prompt) for s, p in drifts]))
    varied = [
        (_float(p.scores.get("diversity")), _float(p.scores.get("base_diversity")))
        for r in reports.values()
        for p in r.prompts
    ]
    if any(not math.isnan(v) for v, _ in varied):
        scores["diversity"] = make_score(
            "diversity", _mean([v for v, _ in varied]), bootstrap([v for v, _ in varied]), _mean([b for _, b in varied])
        )
    costs = [r.costs for r in reports.values()]
    return Row(
        recipe,
        tuple(reports),
        len(made),
        scores,
        _average([c.training_seconds for c in costs]),
        _average([c.seconds_per_picture for c in costs]),
        _average([c.concept_bytes for c in costs]),
        dict(failed),
    )


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _average(values: Sequence[float | None]) -> float | None:
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else None
