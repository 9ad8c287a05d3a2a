"""Evaluation of one concept: pictures with it and without it, scores, and a report.

Nothing here knows a model: `generate` and `base_generate` are functions `(prompts, seeds) -> pixels [N, 3, H, W]` in
[-1, 1].
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.evaluation.prompt_sets import PromptSet
from shared.evaluation.summary import prompt_rows, summary_scores
from shared.io.denoising_progress import Steps, named, part_of
from shared.io.outputs import check_output
from shared.metrics.encoders import Instruments, to_pil
from shared.metrics.report import PICTURES, Costs, Instrument, Kind, PictureRow, Report
from shared.metrics.save_report import save_report
from shared.metrics.scorer import SUBJECT, Measured, Scorer
from shared.metrics.scores import drift
from shared.train.costs import peak_memory

Generate = Callable[[list[str], list[int], Steps | None], Tensor]  # prompts, seeds, who is told of denoising steps
SMALL_GALLERY = 8


@dataclass(frozen=True)
class Case:
    """What is evaluated, and what is known of it."""

    name: str  # prompts say `<name>`
    class_noun: str
    references: Tensor  # [R, 3, H, W] in [-1, 1]
    gallery: Mapping[str, Tensor] | None = None  # other things of the class: name -> [n, 3, H, W]
    fresh: Tensor | None = None  # [F, 3, H, W]: pictures of the subject that are no references (new renders)
    through: Callable[[Tensor], Tensor] | None = None  # the model's autoencoder: what is compared passes it too
    concept: Path | None = None  # its folder, for the size on disk
    recipe: str = ""
    backbone: str = ""
    toy: bool = False  # made by a model of a world of its own
    training_seconds: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shots:
    """Which pictures are made of each prompt, and where the report goes."""

    seeds: Sequence[int]
    out: Path | str | None = None  # a folder; None writes none
    overwrite: bool = False
    chunk: int = 16  # pictures asked for at once


def evaluate(
    generate: Generate,
    base_generate: Generate,
    case: Case,
    prompts: PromptSet,
    instruments: Instruments,
    settings: Shots,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Scores a concept on every prompt with every seed; with `settings.out`, the report is written there.

    Args:
        generate: the model with the concept; must also take prompts that do not name it (for drift)
        base_generate: the same without the concept, which is told the class noun instead
        progress: called with (what, done, of all) after each denoising step

    Raises:
        ValueError: no seeds, an output folder that exists, pictures that are not finite
    """
    seeds, out = settings.seeds, settings.out
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: give at least one, each once; got {list(seeds)}")
    if out is not None:
        check_output(out, settings.overwrite)
    scorer = Scorer(
        case.references, instruments, case.class_noun, case.name, case.gallery, case.fresh, through=case.through
    )
    shots = [(i, seed) for i in range(len(prompts.prompts)) for seed in seeds]
    plain = [p.plain(case.class_noun) for p in prompts.prompts]
    named = [p.named(case.name, case.class_noun) for p in prompts.prompts]
    expects = [prompts.prompts[i].expects if instruments.attributes else {} for i, _ in shots]
    run = _Run(generate, base_generate, settings.chunk, progress)
    with_concept, seconds = run.pictures(True, named, shots, "with the concept")
    without, base_seconds = run.pictures(False, plain, shots, "without it")
    texts = [plain[i] for i, _ in shots]
    measured, floor = scorer.measure(with_concept, texts, expects), scorer.measure(without, texts, expects)
    rows, thumbs = _rows("concept", shots, named, with_concept, measured, expects)
    base_rows, base_thumbs = _rows("base", shots, plain, without, floor, expects)
    drift_rows, drift_thumbs, drifts = _drift(run, case, prompts, seeds, scorer)
    references = {f"{PICTURES}/reference_{i}.png": png for i, png in enumerate(_pngs(case.references))}
    report = Report(
        **_about(case, instruments, scorer),
        prompt_set=prompts.name,
        seeds=list(seeds),
        scores=summary_scores(measured, floor, [i for i, _ in shots], drifts, scorer),
        prompts=prompt_rows(measured, floor, [i for i, _ in shots], named, plain, rows),
        pictures=[*rows, *base_rows, *drift_rows],
        references=list(references),
        costs=_costs(case, seconds, base_seconds),
        notes=_notes(case, instruments, prompts, seeds),
        thumbs={**references, **thumbs, **base_thumbs, **drift_thumbs},
    )
    if out is not None:
        tables = {
            "scores.csv": scores_csv(report).encode()
        }  # a file of the folder like the pictures: whole or not at all
        save_report(report.model_copy(update={"thumbs": {**report.thumbs, **tables}}), out, settings.overwrite)
    return report


def scores_csv(report: Report) -> str:
    """The summary_scores scores, one a row, and what the concept cost; empty where something was not measured."""
    out = io.StringIO()
    columns = ("key", "title", "value", "low", "high", "unit", "better", "base", "chance")
    writer: Any = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: v for k, v in s.model_dump().items() if k in columns and v is not None} for s in report.scores)
    costs = report.costs.model_dump(exclude={"peak_memory_of"})
    units = {"seconds": "seconds", "memory": "bytes", "bytes": "bytes"}
    for key, value in costs.items():
        unit = next(u for word, u in units.items() if word in key)
        row = {"key": key, "title": key.replace("_", " "), "value": value, "unit": unit, "better": "lower"}
        writer.writerow({k: v for k, v in row.items() if v is not None})
    return out.getvalue()


@dataclass(frozen=True)
class _Run:
    generate: Generate
    base_generate: Generate
    chunk: int
    progress: Callable[[str, int, int], None] | None

    def pictures(
        self, concept: bool, texts: Sequence[str], shots: Sequence[tuple[int, int]], what: str
    ) -> tuple[Tensor, float]:
        """All pictures `[N, 3, H, W]` of (number of the text, seed), float32 on the CPU, and the seconds that one took;
        with the concept or without it."""
        generate = self.generate if concept else self.base_generate
        parts, seconds = [], 0.0
        for start in range(0, len(shots), self.chunk):
            some = shots[start : start + self.chunk]
            clock = time.perf_counter()
            on_progress = part_of(named(self.progress, what), start, len(some), len(shots))
            pixels = generate([texts[i] for i, _ in some], [seed for _, seed in some], on_progress)
            parts.append(pixels.detach().float().cpu())
            seconds += time.perf_counter() - clock
            if len(pixels) != len(some):
                raise ValueError(f"asked for {len(some)} pictures, got {len(pixels)}")
        return torch.cat(parts), seconds / len(shots)


def _rows(
    kind: Kind,
    shots: Sequence[tuple[int, int]],
    texts: Sequence[str],
    pixels: Tensor,
    measured: Measured,
    expects: Sequence[Mapping[str, str]],
) -> tuple[list[PictureRow], dict[str, bytes]]:
    """One row and one PNG per picture."""
    rows, thumbs = [], {}
    for n, ((prompt, seed), png) in enumerate(zip(shots, _pngs(pixels), strict=True)):
        name = f"{PICTURES}/{kind}_{prompt:02d}_{seed}.png"
        thumbs[name] = png
        scores: dict[str, float | None] = {k: v[n] for k, v in measured.scores.items()}
        flags = _flags(measured, n, expects[n]) if kind == "concept" else []
        rows.append(
            PictureRow(
                kind=kind,
                prompt=prompt,
                text=texts[prompt],
                seed=seed,
                file=name,
                scores=scores,
                expects=dict(expects[n]),
                seen=measured.seen[n],
                nearest=measured.nearest[n],
                flags=flags,
                failed=bool(flags),
            )
        )
    return rows, thumbs


def _flags(measured: Measured, n: int, expects: Mapping[str, str]) -> list[str]:
    """What is wrong with picture n, in words; empty when nothing is."""
    flags = []
    if measured.copying is not None and bool(measured.copying.copied[n]):
        flags.append(f"copies reference {int(measured.copying.nearest[n]) + 1}")
    if measured.nearest[n] and measured.nearest[n] != SUBJECT:
        flags.append(f"taken for {measured.nearest[n]}")
    for name, hit in measured.hits[n].items():
        if not hit:
            flags.append(f"{name}: {measured.seen[n][name]}, asked for {expects[name]}")
    return flags


def _drift(
    run: _Run, case: Case, prompts: PromptSet, seeds: Sequence[int], scorer: Scorer
) -> tuple[list[PictureRow], dict[str, bytes], list[tuple[int, float]]]:
    """Pictures of the prompts that do not name the concept, with it loaded and without; and (prompt, drift) of each
    pair.
    """
    if not prompts.drift:
        return [], {}, []
    texts = [p.plain(case.class_noun) for p in prompts.drift]
    shots = [(i, seed) for i in range(len(texts)) for seed in seeds]
    asked = [texts[i] for i, _ in shots]
    loaded, _ = run.pictures(True, texts, shots, "other things, with the concept")
    base, _ = run.pictures(False, texts, shots, "other things, without it")
    nothing: list[Mapping[str, str]] = [{} for _ in shots]
    measured, floor = scorer.measure(loaded, asked, nothing), scorer.measure(base, asked, nothing)
    values = drift(floor.embeddings, measured.embeddings).tolist()
    rows, thumbs = _rows("drift", shots, texts, loaded, measured, nothing)
    base_rows, base_thumbs = _rows("drift_base", shots, texts, base, floor, nothing)
    for row, value in zip(rows, values, strict=True):
        row.scores = {"drift": value}
    for row in base_rows:
        row.scores = {}
    return [*rows, *base_rows], thumbs | base_thumbs, [(i, v) for (i, _), v in zip(shots, values, strict=True)]


def _about(case: Case, instruments: Instruments, scorer: Scorer) -> dict[str, Any]:
    limits = scorer.limits
    return {
        "name": case.name,
        "class_noun": case.class_noun,
        "recipe": case.recipe,
        "backbone": case.backbone,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "toybox": instruments.toybox or case.toy,
        "gallery": list(case.gallery or {}),
        "copy_limits": {"pixel": limits.pixel, "embed": limits.embed, "calibrated_on": float(limits.calibrated_on)},
        "metadata": dict(case.metadata),
        "instruments": [
            Instrument(name=i.name, measures=i.measures, toybox=i.toybox, accuracy=dict(i.accuracy))
            for i in instruments.infos()
        ],
    }


def _costs(case: Case, seconds: float, base_seconds: float) -> Costs:
    gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    peak, of = peak_memory(torch.device("cuda" if gpu else "cpu"))
    size = None
    if case.concept is not None and case.concept.exists():
        files = [case.concept] if case.concept.is_file() else [p for p in case.concept.rglob("*") if p.is_file()]
        size = sum(p.stat().st_size for p in files)
    return Costs(
        seconds_per_picture=seconds,
        base_seconds_per_picture=base_seconds,
        training_seconds=case.training_seconds,
        peak_memory=peak,
        peak_memory_of=of,
        concept_bytes=size,
    )


def _notes(case: Case, instruments: Instruments, prompts: PromptSet, seeds: Sequence[int]) -> list[str]:
    notes = []
    if case.gallery and len(case.gallery) < SMALL_GALLERY:
        notes.append(f"The gallery holds only {len(case.gallery)} other things: recognition is easier than it sounds.")
    if not case.gallery:
        notes.append(
            "No gallery of similar things was given, so identity is the likeness to the references, "
            "not recognition among others."
        )
    if instruments.text_image is None:
        notes.append("No CLIP was given: how well the prompt was followed is not measured.")
    if instruments.attributes is None and any(p.expects for p in prompts.prompts):
        notes.append("No recognizer was given: backgrounds, views and styles that the prompts ask for are not checked.")
    if not prompts.drift:
        notes.append("The prompt set has no drift prompts: what else the concept changed is not measured.")
    if len(seeds) < 2:
        notes.append("With one seed per prompt, diversity is not measured.")
    if len(case.references) < 2 and case.fresh is None:
        notes.append("With one reference, the limits for copying are defaults, not calibrated.")
    return notes


def _pngs(pixels: Tensor) -> list[bytes]:
    out = []
    for picture in to_pil(pixels):
        stream = io.BytesIO()
        picture.save(stream, "PNG", optimize=True)
        out.append(stream.getvalue())
    return out
