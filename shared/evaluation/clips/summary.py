"""Turns columns of measurements into the headline scores of clips, each with its interval and an explanation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shared.evaluation.clips.score_texts import ABOUT
from shared.metrics.clips.appearance import seed_spread
from shared.metrics.clips.scorer import ClipScorer, MeasuredClips, checkpoint_score
from shared.metrics.report import Score, number
from shared.metrics.scores import bootstrap

NO_BASE = ("copied", "freedom")  # the base model has never seen a reference and does not show the subject
FACTORS = ("identity", "motion_recognised", "motion_fidelity", "leakage")
ROUNDS = 2000


@dataclass(frozen=True)
class Arms:
    """The measurements with the concepts, without them, and (if generated) with the motion loaded but not asked for."""

    made: MeasuredClips
    base: MeasuredClips
    unnamed: MeasuredClips | None
    prompts: Sequence[int]  # the prompt index of each clip


def summary_scores(arms: Arms, scorer: ClipScorer, ceiling: float | None) -> list[Score]:
    """Returns the scores that were measured, in reading order. Intervals are computed by resampling whole prompts.

    ceiling: the share of true clips of the motion that are recognized
    """
    arms = _relative(arms)
    return [_completed(s, arms, scorer, ceiling) for s in measured_scores(arms)]


def measured_scores(arms: Arms) -> list[Score]:
    """Returns the scores that were measured, in reading order. Intervals are computed by resampling the
    clusters in `Arms.prompts`."""
    made, base = arms.made, arms.base
    out = [_product(made, base, arms.prompts)] if any(k in made.scores for k in FACTORS) else []
    for key in ABOUT:
        if key == "false_motion":
            out += _false_motion(arms)
        elif key in made.scores:
            floor = None if key in NO_BASE or key not in base.scores else base.mean(key)
            out.append(_score(key, made.mean(key), _span(key, made.scores[key], arms.prompts), floor))
    if len(made.embeddings):
        spread, base_spread = (list(seed_spread(m.embeddings, arms.prompts).values()) for m in (made, base))
        if spread:
            out.append(_score("spread", _mean(spread), bootstrap(spread), _mean(base_spread)))
    return out


def _relative(arms: Arms) -> Arms:
    """Divides "identity" and "both" by the share of true pictures that pass, if true pictures can be drawn."""
    least = arms.made.mean("ceiling")
    if math.isnan(least) or least <= 0:
        return arms

    def of(measured: MeasuredClips) -> MeasuredClips:
        scaled = {
            k: [relative(k, v, least) for v in measured.scores[k]] for k in ("identity", "both") if k in measured.scores
        }
        return replace(measured, scores={**measured.scores, **scaled})

    return replace(arms, made=of(arms.made), base=of(arms.base))


def relative(key: str, value: float, truth: float) -> float:
    """Returns a clip's "identity" or "both" as a share of what true pictures reach. The share for "both" is capped at 1, so
    that clips whose frames pass more often than true pictures cannot make up for clips with a wrong motion."""
    share = value / truth
    return 1.0 if key == "both" and share > 1 else share


def _product(made: MeasuredClips, base: MeasuredClips, prompts: Sequence[int]) -> Score:
    columns = {k: np.asarray(made.scores[k]) for k in FACTORS if k in made.scores}
    names = sorted(set(prompts))
    members = {p: np.array([i for i, q in enumerate(prompts) if q == p]) for p in names}
    draws = np.random.default_rng(0).choice(names, (ROUNDS, len(names)))
    values = [checkpoint_score(_means(columns, np.concatenate([members[p] for p in draw]))) for draw in draws]
    low, high = np.quantile(values, [0.025, 0.975])
    floor = {k: base.mean(k) for k in columns if not math.isnan(base.mean(k))}
    whole = _means(columns, np.arange(len(prompts)))
    return _score("score", checkpoint_score(whole), (float(low), float(high)), checkpoint_score(floor))


def _means(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, float]:
    known = {k: v[rows][~np.isnan(v[rows])] for k, v in columns.items()}
    return {k: float(v.mean()) for k, v in known.items() if len(v)}


def _false_motion(arms: Arms) -> list[Score]:
    """Returns false motion, measured like the motion itself: by recognition if paths were read, and by fidelity otherwise."""
    key = next((k for k in ("motion_recognised", "motion_fidelity") if k in arms.made.scores), None)
    if key is None or arms.unnamed is None:
        return []
    span = bootstrap(arms.unnamed.scores[key], arms.prompts)
    score = _score("false_motion", arms.unnamed.mean(key), span, arms.base.mean(key))
    about = "Motion recognized" if key == "motion_recognised" else "Motion fidelity"
    unit = ABOUT[key].unit
    return [score.model_copy(update={"unit": unit, "explanation": f"{about} {score.explanation[len('The same ') :]}"})]


def _span(key: str, values: Sequence[float], prompts: Sequence[int]) -> tuple[float, float]:
    """Returns the 95% interval of the mean. For a constant score that is not a rate, both ends equal the constant,
    because `bootstrap` would mistake zeros and ones for a rate."""
    known = {v for v in values if not math.isnan(v)}
    if ABOUT[key].unit != "rate" and len(known) == 1:
        return (min(known), min(known))
    return bootstrap(values, prompts)


def _score(key: str, value: float, span: tuple[float, float], base: float | None) -> Score:
    about = ABOUT[key]

    def known(x: float | None) -> float | None:
        """Caps rates at 1. A rate relative to that of true pictures can exceed 1."""
        x = number(x)
        return x if x is None or about.unit != "rate" else min(1.0, x)

    return Score(
        key=key,
        title=about.title,
        value=known(value),
        low=known(span[0]),
        high=known(span[1]),
        unit=about.unit,
        better=about.better,
        base=known(base),
        explanation=about.explanation,
    )


def _completed(score: Score, arms: Arms, scorer: ClipScorer, ceiling: float | None) -> Score:
    """Adds the values for a random guess, for true clips or pictures, and for the motion's own clips, if they apply."""
    update: dict[str, object] = {}
    if score.key == "motion_recognised" and scorer.known is not None:
        update = {"chance": scorer.known.chance, "truth": ceiling}
    if score.key == "identity" and "ceiling" in arms.made.scores:
        update = {"truth": number(arms.made.mean("ceiling"))}
    if score.key == "thing_recognised" and scorer.thing is not None:
        update = {"chance": scorer.thing.chance}
    among = {"motion_fidelity": scorer.among_motion, "leakage": scorer.unrelated_looks}.get(score.key)
    if among:
        update |= {"among_low": min(among), "among_high": max(among)}
    return score.model_copy(update=update)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
