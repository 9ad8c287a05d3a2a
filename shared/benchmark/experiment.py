"""Runs several recipes on several subjects. Each pair of recipe and subject is a cell, whose report is saved as soon as
the cell is done. At the end, saves the comparison as Markdown, CSV and a web page.

Cells that are already on disk are not run again, so an interrupted comparison resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from pydantic import BaseModel

from shared.benchmark.aggregate import Goal, aggregate
from shared.benchmark.comparison_table import Comparison
from shared.concept.provenance import portable, portable_text
from shared.io.failures import of_the_disk
from shared.io.foreign_files import claim, is_cell, is_claimed
from shared.io.locks import holding
from shared.io.outputs import check_resumable, write_text
from shared.metrics.report import SCHEMA_VERSION, Instrument, Report

_TABLES = ("comparison.md", "comparison.csv", "index.html")
R = TypeVar("R", bound=BaseModel)
Run = Callable[[str, str, Path], R]
T = TypeVar("T", bound="Table")


class Measured(Protocol):
    """A report of any medium."""

    @property
    def instruments(self) -> Sequence[Instrument]: ...


class Table(Protocol):
    """A table of reports."""

    def markdown(self) -> str: ...

    def csv(self) -> str: ...

    def html(self) -> str: ...


@dataclass(frozen=True)
class Experiment:
    """The cells, and the settings that a saved cell must match."""

    recipes: Mapping[str, object]  # name in the table -> resolved recipe
    subjects: Sequence[str]
    prompts: str
    seeds: Sequence[int]
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.recipes or not self.subjects or not self.seeds:
            raise ValueError("a comparison needs at least one recipe, one subject and one seed")
        for what, names in (("recipes", self.recipes), ("subjects", self.subjects)):
            if len({_slug(n) for n in names}) != len(names):
                raise ValueError(f"{what}: two of {', '.join(names)} would share a folder")


@dataclass(frozen=True)
class Reporting(Generic[R, T]):
    """The type of the cells' reports, and the function `table(reports, failures)` that builds a table from them.

    Both arguments of `table` are keyed by (recipe, subject).
    """

    kind: type[R]
    schema: int
    table: Callable[[Mapping[tuple[str, str], R], Mapping[tuple[str, str], str]], T]


def pictures(goal: Goal = Goal(), control: str | None = None) -> Reporting[Report, Comparison]:
    """Returns the type of picture reports and the function that turns them into a table.

    control: the recipe with which the others are compared, subject by subject
    """
    return Reporting(Report, SCHEMA_VERSION, lambda reports, failures: compare(reports, failures, goal, control))


@holding()
def benchmark(
    run: Run[R],
    experiment: Experiment,
    out: Path | str,
    reporting: Reporting[R, T],
    *,
    retry: bool = True,
    progress: Callable[[str, str, str], None] | None = None,
) -> T:
    """Runs `run(recipe, subject, workdir) -> report` for every cell that is not on disk, and writes the comparison to
    `out`.

    A cell's key consists of its prompts, seeds, settings and resolved recipe. A saved cell with a different key is an
    error, so that results of two experiments are never mixed. If running a cell raises an exception, the cell is saved as
    failed and marked as such in every table. The next call runs it again if `retry` is set. Raises ValueError if another
    process is writing to `out`.

    progress: called with (recipe, subject, "kept" | "start" | "done" | "failed: …")
    """
    out = check_benchmark(out)
    shared = {
        "prompts": experiment.prompts,
        "seeds": list(experiment.seeds),
        "settings": dict(experiment.settings),
        "schema": reporting.schema,  # scores from other versions are not comparable
    }
    out.mkdir(parents=True, exist_ok=True)
    for name in _TABLES:  # marks the folder as a benchmark's, even if no cell is ever finished
        claim(out, name, made=True)
    reports: dict[tuple[str, str], R] = {}
    failures: dict[tuple[str, str], str] = {}
    kept = _Kept(run, reporting.kind, retry, progress or (lambda *_: None))
    for recipe, content in experiment.recipes.items():
        key = {**shared, "recipe": content}
        for subject in experiment.subjects:
            outcome = kept.report(recipe, subject, out / cell_folder(recipe, subject), key)
            if isinstance(outcome, str):
                failures[recipe, subject] = outcome
            else:
                reports[recipe, subject] = outcome
    comparison = reporting.table(reports, failures)
    for name, text in zip(_TABLES, (comparison.markdown(), comparison.csv(), comparison.html()), strict=True):
        write_text(out / name, text)
    return comparison


def check_benchmark(out: Path | str, inputs: Iterable[Path] = ()) -> Path:
    """Returns a benchmark's folder as a path. Call this before any work starts.

    Raises ValueError if the folder contains files that do not come from an earlier benchmark, if it overlaps with one of
    `inputs`, or if it cannot be written.
    """
    return check_resumable(out, "benchmark", _is_benchmark, inputs)


def _is_benchmark(folder: Path) -> bool:
    return is_claimed(folder, _TABLES[0]) or any(map(is_cell, folder.glob("cells/*/*/cell.json")))


@dataclass(frozen=True)
class _Kept(Generic[R]):
    """Obtains the cells' reports, from disk or by running the cells."""

    run: Run[R]
    kind: type[R]
    retry: bool
    tell: Callable[[str, str, str], None]

    def report(self, recipe: str, subject: str, folder: Path, key: Mapping[str, object]) -> R | str:
        """Returns the cell's report, or its error."""
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(key, sort_keys=True, default=str)
        kept, mark = folder / "cell.json", hashlib.sha256(content.encode()).hexdigest()
        inputs = portable(json.loads(content))  # the folder may be shared
        if kept.is_file():
            cell = json.loads(kept.read_text(encoding="utf-8"))
            if cell["key"] != mark:
                raise ValueError(
                    f"{folder} contains this cell with different prompts, seeds, settings, recipe or instruments: choose "
                    f"another output, or remove {kept.name} from this folder (a concept that still fits is scored "
                    "again, but not learned again)"
                )
            if cell["error"] is None:
                self.tell(recipe, subject, "kept")
                return self.kind.model_validate(cell["report"])
            if not self.retry:
                return str(cell["error"])
        self.tell(recipe, subject, "start")
        try:
            report = self.run(recipe, subject, folder / "work")
        except Exception as error:
            if of_the_disk(error):
                raise
            message = portable_text(f"{type(error).__name__}: {error}")
            about = {"error": message, "traceback": portable_text(traceback.format_exc()), "report": None}
            write_text(kept, json.dumps({"key": mark, "inputs": inputs, **about}, indent=1))
            self.tell(recipe, subject, f"failed: {message}")
            return message
        about = {"error": None, "report": report.model_dump(mode="json")}
        text = json.dumps({"key": mark, "inputs": inputs, **about}, indent=1, ensure_ascii=False)
        write_text(kept, text)
        self.tell(recipe, subject, "done")
        return report


def failures_told(failures: Mapping[tuple[str, str], str], worked: int) -> None:
    """Raises a ValueError that lists the cells that failed, if any; `worked` is the number of cells that succeeded."""
    if failures:
        lines = [f"{recipe} on {subject}: {error}" for (recipe, subject), error in failures.items()]
        share = f"{len(lines)} of {len(lines) + worked} cells failed"
        raise ValueError("\n".join([f"{share} (run the same command again to retry them):", *lines]))


def compare(
    reports: Mapping[tuple[str, str], Report],
    failures: Mapping[tuple[str, str], str] | None = None,
    goal: Goal = Goal(),
    control: str | None = None,
) -> Comparison:
    """Builds the table from reports keyed by (recipe, subject). Raises ValueError if they were not measured with the same
    instruments, or if their trade-offs have different terms."""
    failures = failures or {}
    terms = {r.terms for r in reports.values() if not r.apart}
    if len(terms) > 1:
        raise ValueError(
            "reports whose trade-offs have different terms cannot share a table: "
            + "; ".join(", ".join(t) for t in sorted(terms))
        )
    check_instruments(reports.values())
    rows = []
    for recipe in dict.fromkeys(r for r, _ in [*reports, *failures]):
        of_recipe = {s: rep for (r, s), rep in reports.items() if r == recipe}
        rows.append(aggregate(recipe, of_recipe, {s: e for (r, s), e in failures.items() if r == recipe}))
    rows.sort(key=lambda r: -1.0 if (v := r.value("trade_off")) is None else v, reverse=True)
    return Comparison(tuple(rows), reports, failures, goal, any(r.toybox for r in reports.values()), control)


def cell_folder(recipe: str, subject: str) -> Path:
    """Returns a cell's folder, relative to the benchmark's. The cell's outputs are in its subfolder `work`."""
    return Path("cells") / _slug(recipe) / _slug(subject)


def check_instruments(reports: Iterable[Measured]) -> None:
    """Raises ValueError if reports were not measured with the same instruments."""
    tools = {tuple(sorted(i.name for i in r.instruments)) for r in reports}
    if len(tools) > 1:
        listed = "; ".join(", ".join(t) for t in sorted(tools))
        raise ValueError(f"reports measured with different instruments cannot share a table: {listed}")


def _slug(name: str) -> str:
    """Turns the name of a recipe or a subject into a folder name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "_"
