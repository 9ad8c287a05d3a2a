"""Writes a comparison as Markdown, CSV and a web page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass

from shared.benchmark.aggregate import Goal, Row, aggregate, interval
from shared.evaluation.score_texts import ABOUT
from shared.metrics.html import formatted, plot_of, render, seconds, size
from shared.metrics.report import Report, Score

COLUMNS = ("trade_off", "identity", "text", "freedom", "recognised", "copied", "drift", "views", "diversity")


@dataclass(frozen=True)
class Comparison:
    """A table sorted by trade-off, with the reports from which it was built."""

    rows: tuple[Row, ...]
    reports: Mapping[tuple[str, str], Report]
    failures: Mapping[tuple[str, str], str]
    goal: Goal
    toybox: bool
    control: str | None = None  # the recipe with which the others are compared

    def markdown(self) -> str:
        """Returns a Markdown table with one line per recipe, ready for a README."""
        head = [
            "recipe",
            "subjects",
            *(ABOUT[k].title for k in self._columns()),
            *([f"ahead of {self.control}"] if self.control else []),
            "floor (identity)",
            "learning",
            "size",
            *(["goal"] if self._has_goal else []),
        ]
        lines = ["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] + [" ---: "] * (len(head) - 1)) + "|"]
        for r in self.rows:
            cells = [r.recipe, _count(r), *(cell(r.scores.get(k)) for k in self._columns())]
            cells += [cell(self.ahead(r.recipe))] if self.control else []
            floor = r.scores.get("identity")
            cells += [
                formatted(floor.base, floor.unit) if floor else "–",
                seconds(r.training_seconds),
                size(r.concept_bytes),
            ]
            cells += [_yes(self.goal.met(r))] if self._has_goal else []
            lines.append("| " + " | ".join(cells) + " |")
        notes = ["Toy numbers: generated and evaluated on the toybox."] if self.toybox else []
        if self.apart:
            listed = ", ".join(f"{s} ({t:.0%})" for s, t in self.apart.items())
            reason = "because the instruments verify fewer than half of these subjects' true pictures"
            notes.append(f"Shown apart from the pooled figures, {reason}: {listed}.")
        return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in notes)

    def csv(self) -> str:
        """Returns CSV at full precision, with one line per recipe (where the `subject` column is empty) and one per cell."""
        out = io.StringIO()
        keys = [k for k in ABOUT if any(k in r.scores for r in self.rows)]
        names = [f"{k}{end}" for k in keys for end in ("", ".low", ".high", ".base")]
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            [
                "recipe",
                "subject",
                "pictures",
                *names,
                "training_seconds",
                "seconds_per_picture",
                "concept_bytes",
                "error",
            ]
        )
        cells = [
            (aggregate(recipe, {subject: r}, {}, pool_all=True), subject)
            for (recipe, subject), r in self.reports.items()
        ]
        for row, subject in [*((r, "") for r in self.rows), *cells]:
            numbers = [
                getattr(row.scores[k], name) if k in row.scores else None
                for k in keys
                for name in ("value", "low", "high", "base")
            ]
            rest = [*numbers, row.training_seconds, row.seconds_per_picture, row.concept_bytes]
            writer.writerow([row.recipe, subject, row.pictures, *("" if v is None else v for v in rest), ""])
        for (recipe, subject), error in self.failures.items():
            writer.writerow([recipe, subject, 0, *([""] * (len(names) + 3)), error])
        return out.getvalue()

    def html(self) -> str:
        """Returns a self-contained page with the table, a plot, and each cell's scores."""
        first = next(iter(self.reports.values()), None)
        pooled = [Report(name=r.recipe, recipe=r.recipe, scores=list(r.scores.values())) for r in self.rows if r.scores]
        return render(
            "compare.html.j2",
            comparison=self,
            columns=[(k, ABOUT[k]) for k in self._columns()],
            plot=plot_of(pooled),
            met=self.goal.met,
            has_goal=self._has_goal,
            first=first,
            subjects=self.subjects,
            cell=cell,
        )

    @property
    def subjects(self) -> list[str]:
        """The subjects of all cells."""
        return sorted({s for _, s in [*self.reports, *self.failures]})

    def ahead(self, recipe: str) -> Score | None:
        """Returns the recipe's trade-off minus the control's, averaged over the subjects that both have, with a 95%
        interval over subjects. Returns None for the control itself, or if the two have no subject in common."""
        if self.control is None or recipe == self.control:
            return None
        pairs = [(self._trade_off(recipe, s), self._trade_off(self.control, s)) for s in self.subjects]
        gaps = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
        if not gaps:
            return None
        low, high = interval(gaps, "score")
        title = f"Ahead of {self.control}"
        return Score(key="ahead", title=title, value=sum(gaps) / len(gaps), low=low, high=high)

    def _trade_off(self, recipe: str, subject: str) -> float | None:
        """Returns a cell's trade-off, or None if the cell has none or its subject is shown apart."""
        report = self.reports.get((recipe, subject))
        score = None if report is None or report.apart else report.score("trade_off")
        return None if score is None else score.value

    @property
    def apart(self) -> dict[str, float]:
        """Maps each subject that is left out of the pooled scores to the share of its true pictures that pass."""
        return {s: t for r in self.rows for s, t in r.apart.items()}

    @property
    def three(self) -> bool:
        """Whether freedom is a term of the trade-off."""
        return any("freedom" in r.scores for r in self.rows)

    @property
    def chance(self) -> float | None:
        """The score of a random guess among the look-alikes, or None if there are no look-alikes."""
        found = [s.chance for r in self.rows for k in ("recognised", "identity") if (s := r.scores.get(k))]
        return next((c for c in found if c is not None), None)

    def _columns(self) -> list[str]:
        return [k for k in COLUMNS if any(k in r.scores for r in self.rows)]

    @property
    def _has_goal(self) -> bool:
        return any(self.goal.met(r) is not None for r in self.rows)


def cell(score: Score | None) -> str:
    """Formats a score's value and interval."""
    if score is None:
        return "–"
    if score.value is None:
        return "not measured"
    span = "" if score.low is None else f" ({formatted(score.low, score.unit)} to {formatted(score.high, score.unit)})"
    return formatted(score.value, score.unit) + span


def _count(row: Row) -> str:
    return f"{len(row.subjects)}" + (f", {len(row.failed)} failed" if row.failed else "")


def _yes(met: bool | None) -> str:
    return "–" if met is None else "yes" if met else "no"
