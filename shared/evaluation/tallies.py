"""Sums a report's rows into tallies, from which the trade-off is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from shared.metrics.freedom import Pairs, Range
from shared.metrics.report import PictureRow, PromptRow, Report
from shared.metrics.trade_off import Tally

Arm = Literal["concept", "base"]


def tallies(subject: str, pictures: Iterable[PictureRow], prompts: Sequence[PromptRow], arm: Arm) -> list[Tally]:
    """Returns one tally per prompt. Only the concept's arm has pairs, because the base model does not know the subject."""
    own = [p for p in pictures if p.kind == arm]
    return [_tally(subject, row, [p for p in own if p.prompt == row.prompt], arm) for row in prompts]


def of_report(subject: str, report: Report, arm: Arm = "concept") -> list[Tally]:
    """Returns the tallies of a saved report, under the given subject's name."""
    return tallies(subject, report.pictures, report.prompts, arm)


def range_of(report: Report) -> Range | None:
    """Returns the range of pose distances for the report's subject, or None if freedom is not a term of its trade-off."""
    return report.truth.range if report.truth else None


def _tally(subject: str, row: PromptRow, pictures: Sequence[PictureRow], arm: Arm) -> Tally:
    judged = [p.scores for p in pictures if p.scores.get("identity") is not None]
    texts = [t for p in pictures if (t := p.scores.get("text")) is not None]
    return Tally(
        subject,
        row.prompt,
        identity=sum(s["identity"] or 0.0 for s in judged),
        judged=len(judged),
        ceiling=sum(_ceiling(s) for s in judged),
        text=sum(texts),
        texts=len(texts),
        pairs=_pairs(row.scores) if arm == "concept" else None,
    )


def _ceiling(scores: Mapping[str, float | None]) -> float:
    ceiling = scores.get("ceiling")
    return 1.0 if ceiling is None else ceiling


def pair_scores(pairs: Pairs) -> dict[str, float | None]:
    """Converts pairs to the scores that a prompt's row stores."""
    mean = pairs.mean if pairs.counted else None
    return {"pairs": float(pairs.of), "verified_pairs": float(pairs.counted), "crop_distance": mean}


def _pairs(scores: Mapping[str, float | None]) -> Pairs | None:
    of, counted = scores.get("pairs"), scores.get("verified_pairs")
    if of is None or counted is None:
        return None
    return Pairs(int(of), int(counted), counted * (scores.get("crop_distance") or 0.0))
