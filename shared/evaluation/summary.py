"""From columns of measurements to the summary_scores scores, each with its interval and a sentence in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared.metrics.report import PictureRow, PromptRow, Score, number
from shared.metrics.scorer import Measured, Scorer
from shared.metrics.scores import bootstrap, bootstrap_trade_off, diversity, trade_off


@dataclass(frozen=True)
class _About:
    title: str
    explanation: str
    unit: Literal["rate", "score", "cosine"] = "rate"
    better: Literal["higher", "lower"] = "higher"


ABOUT = {
    "trade_off": _About(
        "Trade-off",
        "One number for the two that pull against each other: the harmonic mean of identity and prompt following. "
        "It is low when either is.",
        "score",
    ),
    "identity": _About(
        "Identity",
        "How often the picture shows this very thing: recognised among similar things, and no copy of a reference.",
    ),
    "text": _About(
        "Prompt followed",
        "Of the things a prompt asks for (background, view, accessory, style), how many the picture shows.",
    ),
    "background": _About("Background", "How often the background is the one asked for."),
    "view": _About("View", "How often the thing is seen from the side asked for."),
    "accessory": _About("Accessory", "How often the thing wears what was asked for."),
    "style": _About("Style", "How often the picture is in the style asked for."),
    "copied": _About(
        "Copies",
        "How many pictures repeat a reference instead of showing the subject anew. They count as failures of identity.",
        better="lower",
    ),
    "clip_t": _About(
        "CLIP-T", "Cosine of the picture and its prompt (with the class noun for the name) in CLIP.", "cosine"
    ),
    "clip_i": _About(
        "CLIP-I",
        "Mean cosine of the picture and the references in CLIP. A copy has the highest, so read it with Copies.",
        "cosine",
    ),
    "dino_i": _About(
        "DINO-I", "Mean cosine of the picture and the references in DINO: stricter on details than CLIP-I.", "cosine"
    ),
    "identity_i": _About(
        "Likeness", "Mean cosine of the picture and the references in the identity encoder.", "cosine"
    ),
    "diversity": _About(
        "Diversity",
        "How different the pictures of one prompt are: 1 minus their mean cosine. "
        "Zero means every seed gives the same picture.",
        "score",
    ),
    "drift": _About(
        "Drift",
        "How much pictures of other things change when the concept is loaded: 1 minus the cosine with and without it.",
        "score",
        "lower",
    ),
}
WITHOUT_GALLERY = "Likeness to the references, with copies counted as 0 (no gallery of similar things was given)."
TEXT_BY_CLIP = "Cosine of picture and prompt in CLIP, stretched to 0–1 as CLIPScore does (the toybox's own as it is)."


def summary_scores(
    measured: Measured, floor: Measured, prompts: Sequence[int], drifts: Sequence[tuple[int, float]], scorer: Scorer
) -> list[Score]:
    """The scores in reading order; those that were not measured are left out. Intervals draw whole prompts."""
    out = []
    if "text" in measured.scores:
        low, high = bootstrap_trade_off(measured.scores["identity"], measured.scores["text"], prompts)
        value, base = (trade_off(m.mean("identity"), m.mean("text")) for m in (measured, floor))
        out.append(make_score("trade_off", value, (low, high), base))
    for key in ("identity", "text", "background", "view", "accessory", "style", "copied"):
        if key in measured.scores:
            chance = scorer.chance if key == "identity" else None
            base = None if key == "copied" else floor.mean(key)
            out.append(make_score(key, measured.mean(key), bootstrap(measured.scores[key], prompts), base, chance))
    if drifts:
        out.append(
            make_score(
                "drift",
                sum(v for _, v in drifts) / len(drifts),
                bootstrap([v for _, v in drifts], [i for i, _ in drifts]),
            )
        )
    varied, base_varied = (list(diversity(m.embeddings, prompts).values()) for m in (measured, floor))
    if varied:
        out.append(
            make_score("diversity", sum(varied) / len(varied), bootstrap(varied), sum(base_varied) / len(base_varied))
        )
    for key in ("identity_i", "dino_i", "clip_i", "clip_t"):
        if key in measured.scores:
            out.append(make_score(key, measured.mean(key), bootstrap(measured.scores[key], prompts), floor.mean(key)))
    return [_worded(s, scorer, measured) for s in out]


def make_score(
    key: str, value: float, span: tuple[float, float], base: float | None = None, chance: float | None = None
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


def _worded(score: Score, scorer: Scorer, measured: Measured) -> Score:
    """The wording for what the number is in this run."""
    if score.key == "identity" and scorer.chance is None:
        return score.model_copy(update={"explanation": WITHOUT_GALLERY, "unit": "score"})
    if score.key == "text" and not any(measured.hits):
        return score.model_copy(update={"explanation": TEXT_BY_CLIP, "unit": "score"})
    return score


def prompt_rows(
    measured: Measured,
    floor: Measured,
    prompts: Sequence[int],
    named: Sequence[str],
    plain: Sequence[str],
    rows: Sequence[PictureRow],
) -> list[PromptRow]:
    """Means per prompt; the base model's as `base_…`, and `diversity` where there are several seeds."""
    varied, base_varied = (diversity(m.embeddings, prompts) for m in (measured, floor))
    out = []
    for i in range(len(named)):
        of_prompt = [n for n, p in enumerate(prompts) if p == i]
        scores: dict[str, float | None] = {k: _mean([v[n] for n in of_prompt]) for k, v in measured.scores.items()}
        scores |= {
            f"base_{k}": _mean([v[n] for n in of_prompt]) for k, v in floor.scores.items() if not k.startswith("cop")
        }
        scores = {k: v for k, v in scores.items() if v is not None}
        if i in varied:
            scores |= {"diversity": varied[i], "base_diversity": base_varied[i]}
        failures = sum(rows[n].failed for n in of_prompt)
        out.append(
            PromptRow(
                prompt=i, text=named[i], plain=plain[i], pictures=len(of_prompt), failures=failures, scores=scores
            )
        )
    return out


def _mean(values: Sequence[float]) -> float | None:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else None
