"""Formats a comparison of asset recipes as Markdown, as CSV and as an HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pcs_3d.benchmark.asset_cell import SCHEMA_VERSION, AssetCell
from pcs_3d.benchmark.asset_rows import IDENTITY, AssetGoal, AssetRow, aggregate_assets
from pcs_3d.evaluation.asset_report import HTML_FILE, RENDERS, TRUTH
from pcs_3d.evaluation.headline import said
from pcs_3d.evaluation.page import DASHES, Line, curve_svg
from shared.benchmark.aggregate import average
from shared.benchmark.experiment import Reporting, cell_folder, check_instruments
from shared.metrics.html import formatted, inline, render, seconds, size
from shared.metrics.plots import COLORS
from shared.metrics.report import Score

#: The table's columns, with short titles.
COLUMNS = {
    IDENTITY: "Identity", "recognised": "Recognized", "iou": "Silhouette IoU", "psnr": "PSNR (dB)", "view": "View agreement",
    "fronts": "Fronts", "clip_t": "CLIP-T", "clip_i": "CLIP-I", "identity_i": "Likeness", "watertight": "Watertight",
}  # fmt: skip
CURVES = (IDENTITY, "verified", "recognised", "iou", "psnr", "view", "clip_t", "clip_i", "identity_i", "likeness_true")
ASSET, PLAIN = "asset", "asset-without-concept"  # folders in a cell's `work`
REPORT, PLAIN_REPORT = "report", "report-without-concept"
SHOWN = ("000", "090", "180", "270")  # renders on the page
_GENERIC = "a generic object of the class"


@dataclass(frozen=True)
class AssetComparison:
    """The rows of the table, sorted by identity and then by silhouette overlap, and the cells that they
    summarize."""

    rows: tuple[AssetRow, ...]
    reports: Mapping[tuple[str, str], AssetCell]  # by (recipe, subject)
    failures: Mapping[tuple[str, str], str]
    goal: AssetGoal
    out: Path

    @property
    def columns(self) -> list[Score]:
        """One score per column, with the column's title."""
        found = {k: next((r.scores[k] for r in self.rows if k in r.scores), None) for k in COLUMNS}
        return [s.model_copy(update={"title": COLUMNS[k]}) for k, s in found.items() if s is not None]

    @property
    def toybox(self) -> bool:
        return any(c.made.toybox for c in self.reports.values())

    @property
    def apart(self) -> dict[str, float]:
        """The subjects left out of pooled figures, with the share of their true renders that are verified."""
        return {thing: share for r in self.rows for thing, share in r.apart.items()}

    def met(self, row: AssetRow) -> str:
        """Returns "yes" or "no", or a dash if the goal is empty."""
        met = self.goal.met(row)
        return "–" if met is None else "yes" if met else "no"

    def without(self, row: AssetRow) -> list[str]:
        """Returns the scores that the same recipe gets when the prompt names only the class, one score per column.
        The list is empty if the recipe makes no such asset."""
        if not row.has_base:
            return []
        return [_shown(s, (found := row.scores.get(s.key)) and found.base) for s in self.columns]

    def floors(self) -> list[tuple[str, list[str]]]:
        """Returns the rows of reference values, which do not depend on a recipe: one row each for a generic object of
        the class, a sphere, the real object and a guess. Each row has a title and one value per column."""
        first = next((r for r in self.rows if r.scores), None)
        if first is None:
            return []
        known = [(s, first.scores.get(s.key)) for s in self.columns]
        return [
            (_GENERIC, [_shown(s, first.generic.get(s.key)) for s, _ in known]),
            ("a sphere in the real object's mean colour", [_shown(s, first.sphere.get(s.key)) for s, _ in known]),
            ("the real object", [_shown(s, found and found.truth) for s, found in known]),
            ("a guess", [_shown(s, found and found.chance) for s, found in known]),
        ]

    @property
    def notes(self) -> list[str]:
        """Notes on how to read the table."""
        out = [
            "The generic object has the usual shape of its class and the real object's two colours, but not the real "
            "object's proportions or pattern. It is rendered as is; assets and the sphere are first aligned with the "
            "real object's size and position."
        ]
        if alone := [row.recipe for row in self.rows if not row.has_base]:
            out.append(
                "Recipes that learn the subject themselves have no line without the concept, and the time for making "
                f"their assets includes learning the subject. This applies to {', '.join(alone)}."
            )
        if given := [row.recipe for row in self.rows if row.shape_given]:
            out.append(
                "Recipes that start from a mesh were given the usual shape of the class, so they deserve no credit for "
                f"their silhouettes and view agreement. This applies to {', '.join(given)}."
            )
        if self.apart:
            listed = ", ".join(f"{thing} ({share:.0%})" for thing, share in self.apart.items())
            reason = "because the instruments verify fewer than half of their true renders"
            out.append(f"Shown apart from the pooled figures, {reason}: {listed}.")
        return out

    def markdown(self) -> str:
        """Returns the table as Markdown. Each recipe has a line with the concept and, where possible, one without it;
        the reference values follow."""
        columns = self.columns
        head = ["recipe", "subjects", *(s.title for s in columns), "making", "memory", "goal"]
        lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
        for row in self.rows:
            count = f"{len(row.things)}" + (f", {len(row.failed)} failed" if row.failed else "")
            cells = [_cell(row.scores.get(s.key)) for s in columns]
            costs = [seconds(row.training_seconds), size(row.peak_memory), self.met(row)]
            lines.append("| " + " | ".join([row.recipe, count, *cells, *costs]) + " |")
            if row.scores and (without := self.without(row)):
                plain = [f"{row.recipe}, without the concept", "", *without, "", "", ""]
                lines.append("| " + " | ".join(plain) + " |")
        lines += ["| " + " | ".join([name, "", *values, "", "", ""]) + " |" for name, values in self.floors()]
        notes = ["Toy numbers: generated and evaluated on the toybox."] if self.toybox else []
        return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in [*notes, *self.notes])

    def csv(self) -> str:
        """Returns unrounded numbers as CSV, with one line per recipe (where `thing` is empty) and one per cell. Columns
        whose names end in `.base` contain the scores of the same recipe without the concept."""
        singles = [(aggregate_assets(r, {t: c}, {}, pool_all=True), t) for (r, t), c in self.reports.items()]
        pooled = [(row, "") for row in self.rows]
        keys = list(dict.fromkeys(k for row, _ in [*pooled, *singles] for k in row.scores))
        ends = ("", ".low", ".high", ".base", ".truth", ".sphere", ".generic")
        names = [f"{k}{end}" for k in keys for end in ends]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["recipe", "thing", "assets", *names, "training_seconds", "peak_memory", "error"])
        for row, thing in [*pooled, *singles]:
            numbers = [v for k in keys for v in _numbers(row, k)]
            rest = [*numbers, row.training_seconds, row.peak_memory]
            writer.writerow([row.recipe, thing, len(row.things), *("" if v is None else v for v in rest), ""])
        for (recipe, thing), error in self.failures.items():
            writer.writerow([recipe, thing, 0, *([""] * (len(names) + 2)), error])
        return out.getvalue()

    def html(self) -> str:
        """Returns a self-contained page with the table, plots of the scores by azimuth, and four renders of each cell's
        asset, with a link to its report."""
        return render(
            "compare_assets.html.j2",
            comparison=self,
            columns=self.columns,
            first=next(iter(self.reports.values()), None),
            things=list(dict.fromkeys(thing for _, thing in [*self.reports, *self.failures])),
            plots=list(_plots(self.rows, self.reports)),
            colors={row.recipe: COLORS[i % len(COLORS)] for i, row in enumerate(self.rows)},
            said=_shown,
            span=_span,
        )

    def place(self, recipe: str, thing: str, what: str) -> str:
        """Returns the path from the page to a cell's report, turntable or mesh."""
        paths = {
            "report": f"{REPORT}/{HTML_FILE}",
            "report without": f"{PLAIN_REPORT}/{HTML_FILE}",
            "turntable": f"{ASSET}/turntable.mp4",
            "mesh": f"{ASSET}/asset.glb",
        }
        return f"{cell_folder(recipe, thing).as_posix()}/work/{paths[what]}"

    def sides(self, recipe: str, thing: str, which: str) -> list[str]:
        """Returns four renders, as `data:` URLs, of the asset with the concept ("made"), the asset without the concept
        ("base") or the real object ("truth"). A missing file becomes ""."""
        report, folder = (PLAIN_REPORT if which == "base" else REPORT), (TRUTH if which == "truth" else RENDERS)
        files = [self.out / cell_folder(recipe, thing) / "work" / report / folder / f"{name}.png" for name in SHOWN]
        return [inline(f.read_bytes()) if f.is_file() else "" for f in files]


def _shown(about: Score, value: float | None) -> str:
    """Formats a mean over subjects. Yes-or-no scores become shares."""
    return formatted(value, "rate") if about.key == "watertight" else said(about, value)


def _span(score: Score) -> str:
    return "" if score.low is None else f"{_shown(score, score.low)} to {_shown(score, score.high)}"


def _cell(score: Score | None) -> str:
    """Formats a score's value and, if known, its confidence interval."""
    if score is None:
        return "–"
    span = _span(score)
    return _shown(score, score.value) + (f" ({span})" if span else "")


def _numbers(row: AssetRow, key: str) -> list[float | None]:
    score = row.scores.get(key)
    own = [None] * 5 if score is None else [score.value, score.low, score.high, score.base, score.truth]
    return [*own, row.sphere.get(key), row.generic.get(key)]


def _plots(rows: Sequence[AssetRow], cells: Mapping[tuple[str, str], AssetCell]) -> Iterator[tuple[str, str]]:
    """Yields the title and the SVG of each plot of a score by azimuth. Each plot has one line per recipe, which shows
    means over subjects, and a dashed line for the real objects."""
    for key in CURVES:
        lines, truth, title, azimuths = [], [], "", [0.0]
        for number, row in enumerate(rows):
            of_recipe = [c for (r, thing), c in cells.items() if r == row.recipe and thing not in row.apart]
            found = [curve for c in of_recipe if (curve := c.made.curve(key))]
            if found:
                title, azimuths = found[0].title, found[0].azimuth_deg
                lines.append(Line(_mean([c.asset for c in found]), COLORS[number % len(COLORS)]))
                truth = [c.truth for c in found if c.truth] or truth
        if lines:
            true = [Line(_mean(truth), "currentColor", DASHES["truth"])] if truth else []
            yield title, curve_svg(title, azimuths, [*true, *lines])


def _mean(curves: Sequence[Sequence[float | None]]) -> list[float | None]:
    return [average(column) for column in zip(*curves, strict=True)]


def compare_assets(
    reports: Mapping[tuple[str, str], AssetCell],
    failures: Mapping[tuple[str, str], str],
    out: Path,
    goal: AssetGoal = AssetGoal(),
) -> AssetComparison:
    """Compares the cells, keyed by (recipe, subject), whose files are in the folder `out`. Raises ValueError if they
    were not measured with the same instruments."""
    check_instruments(reports.values())
    rows = []
    for recipe in dict.fromkeys(r for r, _ in [*reports, *failures]):
        of_recipe = {thing: c for (r, thing), c in reports.items() if r == recipe}
        rows.append(aggregate_assets(recipe, of_recipe, {t: e for (r, t), e in failures.items() if r == recipe}))
    rows.sort(key=lambda r: [-1.0 if (v := r.value(key)) is None else v for key in (IDENTITY, "iou")], reverse=True)
    return AssetComparison(tuple(rows), reports, failures, goal, out)


def assets(out: Path, goal: AssetGoal = AssetGoal()) -> Reporting[AssetCell, AssetComparison]:
    """Returns the type of asset cells and the function that compares them, for a benchmark."""
    return Reporting(AssetCell, SCHEMA_VERSION, lambda cells, failures: compare_assets(cells, failures, out, goal))
