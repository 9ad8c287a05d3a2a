"""Turns columns of measurements into the headline scores, each with its interval and an explanation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.evaluation.poses import Poses
from shared.evaluation.score_texts import ABOUT, explained
from shared.evaluation.tallies import pair_scores, tallies
from shared.metrics.report import PictureRow, PromptRow, Score, number
from shared.metrics.scorer import Measured, Scorer
from shared.metrics.scores import bootstrap, diversity
from shared.metrics.trade_off import Ranges, Tally, Terms, bootstrap_terms, measured_terms

RATES = ("background", "view", "accessory", "style", "recognised", "no_face", "copied")
NO_BASE = ("copied", "no_face")  # the base model has never seen a reference


@dataclass(frozen=True)
class Arms:
    """The measurements with and without the concept, and the report's rows."""

    measured: Measured
    floor: Measured
    prompts: Sequence[int]  # the prompt index of each picture
    rows: Sequence[PictureRow]
    base_rows: Sequence[PictureRow]
    prompt_rows: Sequence[PromptRow]
    poses: Poses | None
    base_poses: Poses | None
    drifts: Sequence[tuple[int, float]]


def summary_scores(arms: Arms, scorer: Scorer) -> list[Score]:
    """Returns the scores that were measured, in reading order. Intervals are computed by resampling prompts."""
    measured, floor, prompts = arms.measured, arms.floor, arms.prompts
    figures = scorer.figures
    ranges: Ranges = {"": figures.range} if figures is not None and figures.range is not None else {}
    out = headline(
        tallies("", arms.rows, arms.prompt_rows, "concept"),
        tallies("", arms.base_rows, arms.prompt_rows, "base"),
        ranges,
    )
    for key in RATES:
        if key in measured.scores:
            base = None if key in NO_BASE else floor.mean(key)
            out.append(make_score(key, measured.mean(key), bootstrap(measured.scores[key], prompts), base))
    if arms.drifts:
        values = [v for _, v in arms.drifts]
        span = bootstrap(values, [i for i, _ in arms.drifts])
        out.append(make_score("drift", sum(values) / len(values), span))
    varied, base_varied = (list(diversity(m.embeddings, prompts).values()) for m in (measured, floor))
    if varied:
        base = sum(base_varied) / len(base_varied)
        out.append(make_score("diversity", sum(varied) / len(varied), bootstrap(varied), base))
    out += _beside(arms)
    for key in ("identity_i", "dino_i", "clip_i", "clip_t"):
        if key in measured.scores:
            out.append(make_score(key, measured.mean(key), bootstrap(measured.scores[key], prompts), floor.mean(key)))
    return [_completed(s, scorer, measured) for s in out]


def headline(made: Sequence[Tally], base: Sequence[Tally], ranges: Ranges) -> list[Score]:
    """Returns `trade_off` and its terms, for one subject or several. If freedom is a term but could not be measured,
    its value is None and the trade-off is 0."""
    terms, floor, spans = measured_terms(made, ranges), measured_terms(base, {}), bootstrap_terms(made, ranges)
    out = []
    if terms.trade_off is not None:
        base_value = 0.0 if ranges else floor.trade_off
        out.append(make_score("trade_off", terms.trade_off, spans["trade_off"], base_value))
    if terms.identity is not None:
        out.append(make_score("identity", terms.identity, spans["identity"], floor.identity))
    if terms.text is not None:
        out.append(make_score("text", terms.text, spans["text"], floor.text))
    if terms.freedom is not None:
        out.append(_freedom(terms, spans["freedom"], ranges))
    return out


def _freedom(terms: Terms, span: tuple[float, float], ranges: Ranges) -> Score:
    if len(terms.unmeasured) == len(ranges):
        return make_score("freedom", math.nan, (math.nan, math.nan))
    score = make_score("freedom", terms.freedom, span)
    if not terms.unmeasured:
        return score
    missing = f" Not measured for {len(terms.unmeasured)} of {len(ranges)} subjects, for which it counts as 0."
    return score.model_copy(update={"explanation": score.explanation + missing})


def _beside(arms: Arms) -> list[Score]:
    """Returns the scores that accompany freedom: spread of position, spread of size, and effective number of views."""
    if arms.poses is None:
        return []
    nothing, base = (math.nan, math.nan), arms.base_poses
    return [
        make_score(key, getattr(arms.poses, key), nothing, getattr(base, key) if base else None)
        for key in ("place", "size", "views")
        if not math.isnan(getattr(arms.poses, key))
    ]


def make_score(
    key: str, value: float | None, span: tuple[float, float], base: float | None = None, chance: float | None = None
) -> Score:
    about = ABOUT[key]
    return Score(
        key=key,
        title=about.title,
        value=number(value),
        low=number(span[0]),
        high=number(span[1]),
        unit=about.unit,
        better=about.better,
        base=number(base),
        chance=chance,
        explanation=about.explanation,
    )


def _completed(score: Score, scorer: Scorer, measured: Measured) -> Score:
    """Adds this run's texts to a score. Also adds the values for a random guess, for true pictures, and for references
    compared with each other, if they apply."""
    update: dict[str, object] = explained(score.key, scorer, any(measured.hits))
    if score.key in ("identity", "recognised") and scorer.chance is not None:
        key = "recognised" if "recognised" in measured.scores and scorer.figures is not None else "identity"
        update |= {"chance": scorer.chance} if score.key == key else {}
    if score.key == "identity" and "ceiling" in measured.scores:
        update["truth"] = number(measured.mean("ceiling"))
    if scorer.figures is not None and score.key in ("place", "size", "views"):
        update["truth"] = getattr(scorer.figures, score.key)
    if scorer.reference_range is not None and score.key == scorer.likeness_key:
        update |= dict(zip(("among_low", "among_high"), scorer.reference_range, strict=True))
    return score.model_copy(update=update)


def prompt_rows(
    measured: Measured,
    floor: Measured,
    prompts: Sequence[int],
    texts: tuple[Sequence[str], Sequence[str]],
    rows: Sequence[PictureRow],
    poses: Poses | None,
) -> list[PromptRow]:
    """Returns one row per prompt, with mean scores for the concept and (as `base_…`) for the base model. A row also has
    `diversity` if there are several seeds, and scores for pairs of pictures if the prompt leaves the pose open.

    texts: the prompts with the concept's name, and the same prompts with the class noun in place of the concept
    """
    varied, base_varied = (diversity(m.embeddings, prompts) for m in (measured, floor))
    out = []
    for i, (named, plain) in enumerate(zip(*texts, strict=True)):
        of_prompt = [n for n, p in enumerate(prompts) if p == i]
        scores: dict[str, float | None] = {k: _mean([v[n] for n in of_prompt]) for k, v in measured.scores.items()}
        scores |= {f"base_{k}": _mean([v[n] for n in of_prompt]) for k, v in _of_base(floor).items()}
        scores = {k: v for k, v in scores.items() if v is not None}
        if i in varied:
            scores |= {"diversity": varied[i], "base_diversity": base_varied[i]}
        if poses is not None and i in poses.by_prompt:
            scores |= pair_scores(poses.by_prompt[i])
        failures = sum(rows[n].failed for n in of_prompt)
        row = {"prompt": i, "text": named, "plain": plain, "pictures": len(of_prompt), "failures": failures}
        out.append(PromptRow(**row, scores=scores))
    return out


def _of_base(floor: Measured) -> Mapping[str, list[float]]:
    return {k: v for k, v in floor.scores.items() if not k.startswith("cop") and k != "ceiling"}


def _mean(values: Sequence[float]) -> float | None:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else None
