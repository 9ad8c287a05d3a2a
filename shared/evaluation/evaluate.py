"""Evaluates one concept. Generates pictures with and without it, scores them, and writes a report.

This module uses no model directly. Pictures come from the functions `generate` and `base_generate`, which map
`(prompts, seeds, progress)` to pixels [N, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.evaluation.picture_rows import picture_rows, pngs
from shared.evaluation.poses import poses
from shared.evaluation.prompt_sets import PromptSet
from shared.evaluation.report_facts import Case, about, costs, notes, scores_csv, truth_note
from shared.evaluation.summary import Arms, prompt_rows, summary_scores
from shared.evaluation.true_figures import true_figures
from shared.io.denoising_progress import Steps, named, part_of
from shared.io.locks import holding
from shared.io.outputs import check_output
from shared.metrics.encoders import Instruments
from shared.metrics.freedom import SEEDS
from shared.metrics.report import PICTURES, PictureRow, Report
from shared.metrics.save_report import save_report
from shared.metrics.scorer import Measured, Scorer
from shared.metrics.scores import drift

__all__ = ["Case", "Shots", "evaluate", "scores_csv"]

Generate = Callable[[list[str], list[int], Steps | None], Tensor]  # prompts, seeds, progress of denoising
Asked = Sequence[tuple[int, int]]  # (prompt index, seed) of each picture


#: (the base model's prompts, each picture's prompt index and seed) -> (the pictures [N, 3, H, W], the seconds per picture)
KeptPictures = dict[tuple[tuple[str, ...], tuple[tuple[int, int], ...]], tuple[Tensor, float]]


@dataclass(frozen=True)
class Shots:
    """The pictures to generate for each prompt, and the folder to write the report to."""

    seeds: Sequence[int]
    out: Path | str | None = None  # the folder for the report; if None, no report is written
    overwrite: bool = False
    chunk: int = 16  # pictures per call
    kept: KeptPictures | None = None  # the base model's pictures, shared by evaluations with the same sampler


@holding()
def evaluate(
    generate: Generate,
    base_generate: Generate,
    case: Case,
    prompts: PromptSet,
    instruments: Instruments,
    settings: Shots,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Scores a concept on every prompt with every seed, and writes the report to `settings.out` if that is set.

    If a synthetic world can draw the real subject, prompts that leave the pose open get at least `freedom.SEEDS` seeds.
    Pictures from seeds beyond `settings.seeds` count only towards freedom.

    Args:
        generate: generates pictures with the concept loaded. To measure drift, it is also called with prompts that do
            not name the concept
        base_generate: generates pictures without the concept. Its prompts contain the class noun instead of the name
        progress: called with (what, done, total) after each denoising step

    Raises:
        ValueError: if there are no seeds, a seed is repeated, the output folder exists and may not be overwritten, or a
            picture contains NaN or Inf
    """
    seeds, out = settings.seeds, settings.out
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: give at least one, without repeats; got {list(seeds)}")
    if out is not None:
        check_output(out, settings.overwrite)
    scorer = Scorer(
        case.references,
        instruments,
        case.class_noun,
        case.name,
        case.gallery,
        case.fresh,
        through=case.through,
        masks=case.masks,
    )
    scorer.figures = true_figures(scorer, case, prompts, progress)
    run = _Run(generate, base_generate, settings.chunk, progress, settings.kept)
    report = _Evaluation(case, prompts, scorer, run, seeds).report()
    if out is not None:
        # saved together with the pictures, so that the folder is written atomically
        tables = {"scores.csv": scores_csv(report).encode()}
        save_report(report.model_copy(update={"thumbs": {**report.thumbs, **tables}}), out, settings.overwrite)
    return report


@dataclass(frozen=True)
class _Evaluation:
    case: Case
    prompts: PromptSet
    scorer: Scorer
    run: _Run
    seeds: Sequence[int]

    @property
    def named(self) -> list[str]:
        return [p.named(self.case.name, self.case.class_noun) for p in self.prompts.prompts]

    @property
    def plain(self) -> list[str]:
        return [p.plain(self.case.class_noun) for p in self.prompts.prompts]

    def report(self) -> Report:
        """Generates and measures everything."""
        shots = [(i, seed) for i in range(len(self.prompts.prompts)) for seed in self.seeds]
        with_concept, seconds = self.run.pictures(True, self.named, shots, "with the concept")
        without, base_seconds = self.run.pictures(False, self.plain, shots, "without it")
        measured, floor = self._measured(with_concept, shots), self._measured(without, shots)
        rows, thumbs = picture_rows("concept", shots, self.named, with_concept, measured, self._expects(shots))
        base_rows, base_thumbs = picture_rows("base", shots, self.plain, without, floor, self._expects(shots))
        further, further_thumbs, more = self._further()
        drift_rows, drift_thumbs, drifts = self._drift()
        of, free = [i for i, _ in shots], {i for i, p in enumerate(self.prompts.prompts) if p.free}
        turned, base_turned = poses([(measured, of), *more], free), poses([(floor, of)], free)
        of_prompts = prompt_rows(measured, floor, of, (self.named, self.plain), rows, turned)
        arms = Arms(measured, floor, of, rows, base_rows, of_prompts, turned, base_turned, drifts)
        references = {f"{PICTURES}/reference_{i}.png": png for i, png in enumerate(pngs(self.case.references))}
        report = Report(
            **about(self.case, self.scorer.instruments, self.scorer),
            prompt_set=self.prompts.name,
            seeds=list(self.seeds),
            scores=summary_scores(arms, self.scorer),
            prompts=of_prompts,
            pictures=[*rows, *further, *base_rows, *drift_rows],
            references=list(references),
            costs=costs(self.case, seconds, base_seconds),
            notes=notes(self.case, self.scorer, self.prompts, self.seeds),
            thumbs={**references, **thumbs, **further_thumbs, **base_thumbs, **drift_thumbs},
        )
        truth = truth_note(report)
        return report if truth is None else report.model_copy(update={"notes": [truth, *report.notes]})

    def _expects(self, shots: Asked) -> list[Mapping[str, str]]:
        reads = self.scorer.instruments.attributes is not None
        return [self.prompts.prompts[i].expects if reads else {} for i, _ in shots]

    def _measured(self, pixels: Tensor, shots: Asked) -> Measured:
        return self.scorer.measure(pixels, [self.plain[i] for i, _ in shots], self._expects(shots))

    def _further(self) -> tuple[list[PictureRow], dict[str, bytes], list[tuple[Measured, list[int]]]]:
        """Generates pictures from more seeds for the prompts that leave the pose open, if freedom can be measured."""
        figures, seeds = self.scorer.figures, list(self.seeds)
        while len(seeds) < SEEDS:
            seeds.append(max(seeds) + 1)
        free = [i for i, p in enumerate(self.prompts.prompts) if p.free]
        shots = [(i, seed) for i in free for seed in seeds[len(self.seeds) :]]
        if not shots or figures is None or figures.range is None:
            return [], {}, []
        pixels, _ = self.run.pictures(True, self.named, shots, "more seeds, with the concept")
        measured = self._measured(pixels, shots)
        rows, thumbs = picture_rows("freedom", shots, self.named, pixels, measured, self._expects(shots))
        return rows, thumbs, [(measured, [i for i, _ in shots])]

    def _drift(self) -> tuple[list[PictureRow], dict[str, bytes], list[tuple[int, float]]]:
        """Generates pictures for prompts that do not name the concept, with and without it, and measures each pair's drift."""
        if not self.prompts.drift:
            return [], {}, []
        texts = [p.plain(self.case.class_noun) for p in self.prompts.drift]
        shots = [(i, seed) for i in range(len(texts)) for seed in self.seeds]
        asked = [texts[i] for i, _ in shots]
        loaded, _ = self.run.pictures(True, texts, shots, "other things, with the concept")
        base, _ = self.run.pictures(False, texts, shots, "other things, without it")
        nothing: list[Mapping[str, str]] = [{} for _ in shots]
        measured, floor = (self.scorer.measure(p, asked, nothing) for p in (loaded, base))
        values = drift(floor.embeddings, measured.embeddings).tolist()
        rows, thumbs = picture_rows("drift", shots, texts, loaded, measured, nothing)
        base_rows, base_thumbs = picture_rows("drift_base", shots, texts, base, floor, nothing)
        for row, value in zip(rows, values, strict=True):
            row.scores = {"drift": value}
        for row in base_rows:
            row.scores = {}
        return [*rows, *base_rows], thumbs | base_thumbs, [(i, v) for (i, _), v in zip(shots, values, strict=True)]


@dataclass(frozen=True)
class _Run:
    generate: Generate
    base_generate: Generate
    chunk: int
    progress: Callable[[str, int, int], None] | None
    kept: KeptPictures | None = None

    def pictures(
        self, concept: bool, texts: Sequence[str], shots: Sequence[tuple[int, int]], what: str
    ) -> tuple[Tensor, float]:
        """Returns the pictures of all shots (text index, seed) as float32 `[N, 3, H, W]` on the CPU, and the seconds
        per picture. Pictures without the concept are taken from `kept` if an earlier evaluation generated them."""
        if concept or self.kept is None:
            return self._made(concept, texts, shots, what)
        key = (tuple(texts), tuple(shots))
        if key not in self.kept:
            self.kept[key] = self._made(False, texts, shots, what)
        return self.kept[key]

    def _made(
        self, concept: bool, texts: Sequence[str], shots: Sequence[tuple[int, int]], what: str
    ) -> tuple[Tensor, float]:
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
                raise ValueError(f"expected {len(some)} pictures, got {len(pixels)}")
        return torch.cat(parts), seconds / len(shots)
