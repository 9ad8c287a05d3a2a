"""Pools a recipe's reports over several subjects into one row of a table."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from shared.evaluation.summary import NO_BASE, headline, make_score
from shared.evaluation.tallies import of_report, range_of
from shared.metrics.report import Report, Score
from shared.metrics.scores import bootstrap

RATES = ("background", "view", "accessory", "style", "recognised", "no_face", "copied")
BESIDE = ("place", "size", "views")
COSINES = ("clip_t", "clip_i", "dino_i", "identity_i")


@dataclass(frozen=True)
class Goal:
    """The scores that a recipe must reach, in [0, 1]. None means no requirement.

    over_floor: the margin by which identity must exceed that of the base model
    """

    identity: float | None = None
    over_floor: float | None = None
    background: float | None = None

    def met(self, row: Row) -> bool | None:
        """Returns whether the row reaches the goal, or None if the goal requires nothing."""
        identity, over = row.value("identity"), over_floor(row.scores.get("identity"))
        return all_reached(
            [(identity, self.identity), (over, self.over_floor), (row.value("background"), self.background)]
        )


def all_reached(parts: Sequence[tuple[float | None, float | None]]) -> bool | None:
    """Returns whether every value reaches its limit, or None if no limit is set. An unmeasured value reaches no limit."""
    asked = [(value, limit) for value, limit in parts if limit is not None]
    return all(value is not None and value >= limit - 1e-9 for value, limit in asked) if asked else None


def over_floor(score: Score | None) -> float | None:
    """Returns the score minus that of the base model, or None if one of the two was not measured."""
    return None if score is None or score.value is None or score.base is None else score.value - score.base


@dataclass(frozen=True)
class Row:
    """The results of one recipe over all its subjects.

    Scores are pooled over the pictures of all subjects that are not in `apart`. Their intervals come from resampling by
    subject and prompt.
    """

    recipe: str
    subjects: tuple[str, ...]
    pictures: int
    scores: Mapping[str, Score]
    training_seconds: float | None
    seconds_per_picture: float | None
    concept_bytes: float | None
    failed: Mapping[str, str] = field(default_factory=dict)  # subject -> error message
    # subjects left out of the scores -> T, the share of their true pictures that pass, which is too low
    apart: Mapping[str, float] = field(default_factory=dict)

    def value(self, key: str) -> float | None:
        return self.scores[key].value if key in self.scores else None

    def base(self, key: str) -> float | None:
        return self.scores[key].base if key in self.scores else None


def aggregate(recipe: str, reports: Mapping[str, Report], failed: Mapping[str, str], pool_all: bool = False) -> Row:
    """Pools all pictures of a recipe. Subjects whose true pictures pass verification too rarely (`Report.apart`) are
    left out, unless `pool_all` is set.
    """
    apart = {s: r for s, r in reports.items() if r.apart and not pool_all}
    pooled = {s: r for s, r in reports.items() if s not in apart}
    made = [(s, p) for s, r in pooled.items() for p in r.of_kind("concept")]
    scores = {s.key: s for s in _headline(pooled)} | _rates(pooled) | _spreads(pooled)
    costs = [r.costs for r in reports.values()]
    return Row(
        recipe,
        tuple(reports),
        len(made),
        scores,
        average([c.training_seconds for c in costs]),
        average([c.seconds_per_picture for c in costs]),
        average([c.concept_bytes for c in costs]),
        dict(failed),
        {s: t for s, r in apart.items() if (i := r.score("identity")) and (t := i.truth) is not None},
    )


def _headline(reports: Mapping[str, Report]) -> list[Score]:
    """Computes the trade-off and its terms. The identity score also gets the subjects' mean T and mean chance
    level."""
    ranges = {s: known for s, r in reports.items() if (known := range_of(r)) is not None}
    made, base = ([t for s, r in reports.items() for t in of_report(s, r, arm)] for arm in ("concept", "base"))
    found = [i for r in reports.values() if (i := r.score("identity"))]
    truth, chance = average([i.truth for i in found]), average([i.chance for i in found])
    beside = {"truth": truth, "chance": chance}
    return [s.model_copy(update=beside) if s.key == "identity" else s for s in headline(made, base, ranges)]


def _rates(reports: Mapping[str, Report]) -> dict[str, Score]:
    """Averages rates and cosines over all pictures, and drift over the pairs of pictures with and without the concept."""
    made, base, drifts = (
        [(s, p) for s, r in reports.items() for p in r.of_kind(kind)] for kind in ("concept", "base", "drift")
    )
    known = {k for _, p in made for k, v in p.scores.items() if v is not None}
    where = [(s, p.prompt) for s, p in made]
    scores: dict[str, Score] = {}
    for key in (*RATES, *COSINES):
        if key in known:
            column, floor = ([_float(p.scores.get(key)) for _, p in of] for of in (made, base))
            base_value = None if key in NO_BASE else _mean(floor)
            found = [c for r in reports.values() if (i := r.score(key)) and (c := i.chance) is not None]
            scores[key] = make_score(key, _mean(column), bootstrap(column, where), base_value, average(found))
    if drifts:
        values = [_float(p.scores.get("drift")) for _, p in drifts]
        scores["drift"] = make_score("drift", _mean(values), bootstrap(values, [(s, p.prompt) for s, p in drifts]))
    return scores


def _spreads(reports: Mapping[str, Report]) -> dict[str, Score]:
    """Averages diversity over prompts, and the scores in `BESIDE` (which accompany freedom) over subjects."""
    scores: dict[str, Score] = {}
    varied = [
        (_float(p.scores.get("diversity")), _float(p.scores.get("base_diversity")))
        for r in reports.values()
        for p in r.prompts
    ]
    if any(not math.isnan(v) for v, _ in varied):
        scores["diversity"] = make_score(
            "diversity", _mean([v for v, _ in varied]), bootstrap([v for v, _ in varied]), _mean([b for _, b in varied])
        )
    for key in BESIDE:
        found = [s for r in reports.values() if (s := r.score(key)) and s.value is not None]
        if found:
            value, base, truth = (average([getattr(s, name) for s in found]) for name in ("value", "base", "truth"))
            score = make_score(key, value, bootstrap([_float(s.value) for s in found]), base)
            scores[key] = score.model_copy(update={"truth": truth})
    return scores


def interval(
    values: Sequence[float], unit: str, clusters: Sequence[Hashable] | None = None
) -> tuple[float | None, float | None]:
    """Returns the 95% interval of a mean, ignoring NaNs.

    `clusters` gives the cluster of each value, and whole clusters are resampled. If None, each value is its own cluster.
    Returns (None, None) for fewer than two clusters, because a single cluster does not show how much clusters vary.
    """
    labels = list(range(len(values))) if clusters is None else list(clusters)
    kept = {c for c, v in zip(labels, values, strict=True) if not math.isnan(v)}
    if len(kept) < 2:
        return None, None
    known = {v for v in values if not math.isnan(v)}
    if unit != "rate" and len(known) == 1:  # `bootstrap` would treat zeros and ones as a rate
        return min(known), max(known)
    return bootstrap(values, labels)


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def average(values: Sequence[float | None]) -> float | None:
    """Returns the mean of the measured values, or None if there are none."""
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else None
