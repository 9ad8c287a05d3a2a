"""Several recipes on several subjects: one report per cell, kept as it is made, then one table, plot and page.

A cell that is on disk is not run again, so a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shared.benchmark.aggregate import Goal, aggregate
from shared.benchmark.comparison_table import Comparison
from shared.io.outputs import write_text
from shared.metrics.report import SCHEMA_VERSION, Report

Run = Callable[[str, str, Path], Report]


@dataclass(frozen=True)
class Experiment:
    """Which cells there are, and what a kept one must have been made with."""

    recipes: Mapping[str, object]  # what the table calls each -> what it says, resolved
    subjects: Sequence[str]
    prompts: str
    seeds: Sequence[int]
    settings: Mapping[str, object] = field(default_factory=dict)
    goal: Goal = field(default_factory=Goal)

    def __post_init__(self) -> None:
        if not self.recipes or not self.subjects or not self.seeds:
            raise ValueError("a comparison needs at least one recipe, one subject and one seed")
        for what, names in (("recipes", self.recipes), ("subjects", self.subjects)):
            if len({_slug(n) for n in names}) != len(names):
                raise ValueError(f"{what}: two of {', '.join(names)} would share a folder")


def benchmark(
    run: Run,
    experiment: Experiment,
    out: Path | str,
    *,
    retry: bool = True,
    progress: Callable[[str, str, str], None] | None = None,
) -> Comparison:
    """Runs `run(recipe, subject, workdir) -> Report` for every cell that is not on disk, and writes the comparison to
    `out`.

    Prompts, seeds, settings and what the recipe says are the cell's key: with others, a kept cell does not count, and is
    an error here rather than a mix of two experiments. A cell that raises is kept as failed, said so in every table, and
    run again next time (`retry`). progress: called with (recipe, subject, "kept" | "start" | "done" | "failed: …").
    """
    shared = {
        "prompts": experiment.prompts,
        "seeds": list(experiment.seeds),
        "settings": dict(experiment.settings),
        "schema": SCHEMA_VERSION,  # scores of another version mean something else
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tell = progress or (lambda *_: None)
    reports, failures = {}, {}
    for recipe, content in experiment.recipes.items():
        key = {**shared, "recipe": content}
        for subject in experiment.subjects:
            outcome = _cell_report(
                run, recipe, subject, out / "cells" / _slug(recipe) / _slug(subject), key, retry, tell
            )
            if isinstance(outcome, Report):
                reports[recipe, subject] = outcome
            else:
                failures[recipe, subject] = outcome
    comparison = compare(reports, failures, experiment.goal)
    write_text(out / "comparison.md", comparison.markdown())
    write_text(out / "comparison.csv", comparison.csv())
    write_text(out / "index.html", comparison.html())
    return comparison


def _cell_report(
    run: Run,
    recipe: str,
    subject: str,
    folder: Path,
    key: Mapping[str, object],
    retry: bool,
    tell: Callable[[str, str, str], None],
) -> Report | str:
    """The cell's report, from disk or by running; or what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    kept, mark = folder / "cell.json", hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    if kept.is_file():
        cell = json.loads(kept.read_text(encoding="utf-8"))
        if cell["key"] != mark:
            raise ValueError(
                f"{folder} holds this cell with other prompts, seeds, settings, recipe or instruments: choose another output, "
                f"or remove {kept.name} there (a concept that still fits is scored again, not learned again)"
            )
        if cell["error"] is None:
            tell(recipe, subject, "kept")
            return Report.model_validate(cell["report"])
        if not retry:
            return str(cell["error"])
    tell(recipe, subject, "start")
    work = folder / "work"
    try:
        report = run(recipe, subject, work)
        report = report.model_copy(update={"recipe": recipe})
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        content = {
            "key": mark,
            "inputs": dict(key),
            "error": message,
            "traceback": traceback.format_exc(),
            "report": None,
        }
        write_text(kept, json.dumps(content, indent=1, default=str))
        tell(recipe, subject, f"failed: {message}")
        return message
    content = {"key": mark, "inputs": dict(key), "error": None, "report": report.model_dump(mode="json")}
    write_text(kept, json.dumps(content, indent=1, ensure_ascii=False, default=str))
    tell(recipe, subject, "done")
    return report


def compare(
    reports: Mapping[tuple[str, str], Report],
    failures: Mapping[tuple[str, str], str] | None = None,
    goal: Goal = Goal(),
) -> Comparison:
    """The table of reports by (recipe, subject). ValueError when they were not measured with the same instruments, or their
    trade-offs have other terms."""
    failures = failures or {}
    terms = {r.terms for r in reports.values() if not r.apart}
    if len(terms) > 1:
        raise ValueError(
            "reports whose trade-offs have other terms cannot share a table: "
            + "; ".join(", ".join(t) for t in sorted(terms))
        )
    tools = {tuple(sorted(i.name for i in r.instruments)) for r in reports.values()}
    if len(tools) > 1:
        listed = "; ".join(", ".join(t) for t in sorted(tools))
        raise ValueError(f"reports measured with different instruments cannot share a table: {listed}")
    rows = []
    for recipe in dict.fromkeys(r for r, _ in [*reports, *failures]):
        of_recipe = {s: rep for (r, s), rep in reports.items() if r == recipe}
        rows.append(aggregate(recipe, of_recipe, {s: e for (r, s), e in failures.items() if r == recipe}))
    rows.sort(key=lambda r: -1.0 if (v := r.value("trade_off")) is None else v, reverse=True)
    return Comparison(tuple(rows), reports, failures, goal, any(r.toybox for r in reports.values()))


def _slug(name: str) -> str:
    """A folder name for a recipe or a subject."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "_"
