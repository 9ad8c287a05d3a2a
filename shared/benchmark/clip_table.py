"""Compares motion recipes by their clips. Pools the reports of each recipe into a table, as Markdown, CSV and a web page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from shared.benchmark.aggregate import all_reached, average, over_floor
from shared.benchmark.comparison_table import cell
from shared.benchmark.experiment import Reporting, cell_folder, check_instruments
from shared.evaluation.clips.score_texts import ABOUT
from shared.evaluation.clips.summary import Arms, measured_scores, relative
from shared.metrics.clips.report import SCHEMA_VERSION, ClipReport, ClipRow
from shared.metrics.clips.scorer import MeasuredClips
from shared.metrics.html import formatted, render, seconds
from shared.metrics.report import Score

COLUMNS = (
    "motion_recognised", "identity", "both", "leakage", "motion_fidelity", "false_motion", "freedom", "class",
    "background", "dynamic_degree", "temporal_consistency", "score",
)  # fmt: skip
REPORT = "work/report"  # path of the report in a cell's folder
RELATIVE = ("identity", "both")  # reports divide these by the share of true pictures that pass


@dataclass(frozen=True)
class ClipGoal:
    """The scores that a recipe must reach, in [0, 1]. None means no requirement.

    over_floor: the margin by which identity must exceed that of the base model
    leaks_less_than: the name of a recipe whose leakage must be higher, if that recipe is in the same table
    """

    motion: float | None = None
    identity: float | None = None
    over_floor: float | None = None
    both: float | None = None
    leaks_less_than: str | None = None

    def met(self, row: ClipsRow, rows: Sequence[ClipsRow] = ()) -> bool | None:
        """Returns whether a row of the table `rows` reaches the goal, or None if the goal requires nothing."""
        found = {
            "motion": row.value("motion_recognised"),
            "identity": row.value("identity"),
            "over_floor": over_floor(row.scores.get("identity")),
            "both": row.value("both"),
        }
        reached = all_reached([(value, getattr(self, name)) for name, value in found.items()])
        other = next((r for r in rows if r.recipe == self.leaks_less_than and r is not row), None)
        if other is None or reached is None:
            return reached
        own, most = row.value("leakage"), other.value("leakage")
        return reached and own is not None and most is not None and own < most


@dataclass(frozen=True)
class ClipsRow:
    """The results of one recipe over all its cells. Every clip counts once, and intervals resample whole motions."""

    recipe: str
    motions: tuple[str, ...]
    clips: int
    scores: Mapping[str, Score]
    training_seconds: float | None
    seconds_per_clip: float | None
    failed: Mapping[str, str] = field(default_factory=dict)  # cell -> error message

    def value(self, key: str) -> float | None:
        return self.scores[key].value if key in self.scores else None


def aggregate_clips(recipe: str, reports: Mapping[str, ClipReport], failed: Mapping[str, str]) -> ClipsRow:
    """Pools all clips of a recipe."""
    motions = tuple(dict.fromkeys(r.motion for r in reports.values()))
    scores = (
        {s.key: _beside(s, reports.values()) for s in measured_scores(_pooled(reports.values()))} if reports else {}
    )
    costs = [r.costs for r in reports.values()]
    made = sum(len(r.of_kind("concept")) for r in reports.values())
    return ClipsRow(
        recipe,
        motions,
        made,
        scores,
        average([c.training_seconds for c in costs]),
        average([c.seconds_per_clip for c in costs]),
        dict(failed),
    )


def _pooled(reports: Iterable[ClipReport]) -> Arms:
    """Joins the arms of several reports. Each motion is one cluster, so that intervals resample all its clips together."""
    listed = list(reports)
    number = {name: i for i, name in enumerate(dict.fromkeys(r.motion for r in listed))}
    made, base, unnamed = ([] for _ in range(3))
    for report in listed:
        made += _rows(report, report.of_kind("concept"))
        base += _rows(report, report.of_kind("base"))
        # A motion without words affects every clip, so its clips also count as clips that do not name it.
        unnamed += _rows(report, report.of_kind("unnamed") or report.of_kind("concept"))
    clusters = [number[r.motion] for r in listed for _ in r.of_kind("concept")]
    said = any(r.score("false_motion") for r in listed)
    return Arms(_measured(made), _measured(base), _measured(unnamed) if said else None, clusters)


def _rows(report: ClipReport, rows: Sequence[ClipRow]) -> list[dict[str, float | None]]:
    """Returns the clips' scores, with those in `RELATIVE` scaled as in the report."""
    identity = report.score("identity")
    least = identity.truth if identity is not None and identity.truth else 1.0

    def of(key: str, value: float | None) -> float | None:
        return value if value is None or key not in RELATIVE else relative(key, value, least)

    return [{k: of(k, v) for k, v in row.scores.items() if k != "ceiling"} for row in rows]


def _measured(rows: Sequence[Mapping[str, float | None]]) -> MeasuredClips:
    keys = dict.fromkeys(k for row in rows for k in row)
    scores = {k: [float("nan") if (v := row.get(k)) is None else v for row in rows] for k in keys}
    return MeasuredClips(scores, [{} for _ in rows], ["" for _ in rows], torch.zeros(0, 0, 0))


def _beside(score: Score, reports: Iterable[ClipReport]) -> Score:
    """Adds the mean score of true clips or pictures, and the mean score of a random guess. Drops the interval if there is
    only one motion."""
    listed = list(reports)
    found = [s for r in listed if (s := r.score(score.key))]
    beside = {"truth": average([s.truth for s in found]), "chance": average([s.chance for s in found])}
    if len({r.motion for r in listed}) < 2:  # a single motion does not show how much motions vary
        beside |= {"low": None, "high": None}
    return score.model_copy(update=beside)


@dataclass(frozen=True)
class ClipComparison:
    """A table sorted by subject × motion × (1 − leakage), with the reports from which it was built."""

    rows: tuple[ClipsRow, ...]
    reports: Mapping[tuple[str, str], ClipReport]  # by (recipe, cell)
    failures: Mapping[tuple[str, str], str]
    goal: ClipGoal

    @property
    def columns(self) -> list[str]:
        return [k for k in COLUMNS if any(k in r.scores for r in self.rows)]

    @staticmethod
    def place(recipe: str, name: str) -> str:
        """Returns the relative link from this page to a cell's own page."""
        return f"{cell_folder(recipe, name).as_posix()}/{REPORT}/index.html"

    def met(self, row: ClipsRow) -> str:
        """Returns "yes" or "no", or a dash if the goal requires nothing."""
        met = self.goal.met(row, self.rows)
        return "–" if met is None else "yes" if met else "no"

    @property
    def floors(self) -> list[tuple[str, list[str]]]:
        """The rows with reference values, which do not depend on the recipe: those of the base model, of true clips or
        pictures, and of a random guess."""
        if not (self.rows and self.rows[0].scores):
            return []
        known = [self.rows[0].scores.get(k) for k in self.columns]

        def row(part: str) -> list[str]:
            values = [(s, getattr(s, part)) for s in known]
            return ["–" if s is None or v is None else formatted(v, s.unit) for s, v in values]

        return [("base model", row("base")), ("true clips or pictures", row("truth")), ("a guess", row("chance"))]

    def markdown(self) -> str:
        """Returns a Markdown table with one line per recipe and the reference values, ready for a README."""
        head = ["recipe", "motions", "clips", *(ABOUT[k].title for k in self.columns), "learning", "one clip", "goal"]
        lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
        for r in self.rows:
            count = f"{len(r.motions)}" + (f", {len(r.failed)} failed" if r.failed else "")
            cells = [cell(r.scores.get(k)) for k in self.columns]
            costs = [seconds(r.training_seconds), seconds(r.seconds_per_clip), self.met(r)]
            lines.append("| " + " | ".join([r.recipe, count, str(r.clips), *cells, *costs]) + " |")
        lines += ["| " + " | ".join([name, "", "", *cells, "", "", ""]) + " |" for name, cells in self.floors]
        toy = any(r.toybox for r in self.reports.values())
        return "\n".join(lines) + "\n" + ("\nToy numbers: generated and evaluated on the toybox.\n" if toy else "")

    def csv(self) -> str:
        """Returns CSV at full precision, with one line per recipe (where the `cell` column is empty) and one per cell."""
        out = io.StringIO()
        keys = [k for k in ABOUT if any(k in r.scores for r in self.rows)]
        names = [f"{k}{end}" for k in keys for end in ("", ".low", ".high", ".base")]
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["recipe", "cell", "clips", *names, "training_seconds", "seconds_per_clip", "error"])
        single = [(aggregate_clips(recipe, {name: r}, {}), name) for (recipe, name), r in self.reports.items()]
        for row, name in [*((r, "") for r in self.rows), *single]:
            numbers = [
                getattr(row.scores[k], part) if k in row.scores else None
                for k in keys
                for part in ("value", "low", "high", "base")
            ]
            rest = [*numbers, row.training_seconds, row.seconds_per_clip]
            writer.writerow([row.recipe, name, row.clips, *("" if v is None else v for v in rest), ""])
        for (recipe, name), error in self.failures.items():
            writer.writerow([recipe, name, 0, *([""] * (len(names) + 2)), error])
        return out.getvalue()

    def html(self) -> str:
        """Returns a self-contained page with the table, each cell's scores, and links to the cells' reports."""
        first = next(iter(self.reports.values()), None)
        return render(
            "compare_clips.html.j2",
            comparison=self,
            columns=[(k, ABOUT[k]) for k in self.columns],
            first=first,
            cells=list(dict.fromkeys(name for _, name in [*self.reports, *self.failures])),
            toybox=any(r.toybox for r in self.reports.values()),
        )


def compare_clips(
    reports: Mapping[tuple[str, str], ClipReport],
    failures: Mapping[tuple[str, str], str] | None = None,
    goal: ClipGoal = ClipGoal(),
) -> ClipComparison:
    """Builds the table from reports keyed by (recipe, cell). Raises ValueError if they were not measured with the same
    instruments."""
    failures = failures or {}
    check_instruments(reports.values())
    rows = []
    for recipe in dict.fromkeys(r for r, _ in [*reports, *failures]):
        of_recipe = {name: report for (r, name), report in reports.items() if r == recipe}
        rows.append(aggregate_clips(recipe, of_recipe, {n: e for (r, n), e in failures.items() if r == recipe}))
    rows.sort(key=lambda r: -1.0 if (v := r.value("score")) is None else v, reverse=True)
    return ClipComparison(tuple(rows), reports, failures, goal)


def clips(goal: ClipGoal = ClipGoal()) -> Reporting[ClipReport, ClipComparison]:
    """Returns the type of clip reports and the function that turns them into a table."""
    return Reporting(ClipReport, SCHEMA_VERSION, lambda reports, failures: compare_clips(reports, failures, goal))
