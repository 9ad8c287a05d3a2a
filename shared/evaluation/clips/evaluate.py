"""Evaluates concepts in clips. Generates clips with and without the concepts, scores them, and writes a report.

This module uses no model directly. Clips come from functions that map `(prompts, seeds, progress)` to `[N, 3, F, H, W]`
in [-1, 1].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from shared.evaluation.clips.case_facts import ClipCase, costs, instruments, notes
from shared.evaluation.clips.clip_rows import Made, clip_rows, leak_limit
from shared.evaluation.clips.prompt_sets import ClipTexts
from shared.evaluation.clips.summary import Arms, summary_scores
from shared.evaluation.evaluate import Generate
from shared.io.clips.write_clip import spread, webp_bytes, write_clip_sheet
from shared.io.denoising_progress import Steps, named, part_of
from shared.io.locks import holding
from shared.io.outputs import check_output
from shared.metrics.clips.freedom import freedom_of_clips
from shared.metrics.clips.report import CLIPS, ClipReport, ClipRow, Kind
from shared.metrics.clips.save import save_clip_report
from shared.metrics.clips.scorer import ClipScorer, MeasuredClips, joined

Progress = Callable[[str, int, int], None]
#: (what the clips depend on, their prompts, their seeds) -> (the clips [N, 3, F, H, W], the seconds to generate them)
KeptClips = dict[tuple[Hashable, tuple[str, ...], tuple[int, ...]], tuple[Tensor, float]]


@dataclass(frozen=True)
class Makers:
    """Functions that generate clips with the concepts, without them, and with the motion loaded but not asked for.

    `unnamed` is None if clips of the last kind are not generated. `depends` lists the kinds of clips that several
    evaluations may share. For each kind, the value identifies everything that the clips depend on besides prompts and
    seeds.
    """

    concept: Generate
    base: Generate
    unnamed: Generate | None = None
    depends: Mapping[Kind, Hashable] = field(default_factory=dict)


@dataclass(frozen=True)
class ClipShots:
    """The clips to generate for each prompt, and the folder to write the report to."""

    seeds: Sequence[int]
    out: Path | str | None = None  # the folder for the report; if None, no report is written
    overwrite: bool = False
    fps: float = 8.0  # frames per second of the clips in the report
    chunk: int = 4  # clips per call
    kept: KeptClips | None = None  # evaluations that share this dict also share clips


@holding()
def evaluate_clips(
    makers: Makers,
    case: ClipCase,
    texts: ClipTexts,
    scorer: ClipScorer,
    shots: ClipShots,
    progress: Progress | None = None,
) -> ClipReport:
    """Scores a motion, a subject, or both on every prompt with every seed, and writes the report to `shots.out` if that is set.

    Args:
        progress: called with (what, done, total) after each denoising step and each measured clip

    Raises:
        ValueError: if there are no seeds, a seed is repeated, the output folder exists and may not be overwritten, or a
            clip contains NaN or Inf or has fewer than two frames
    """
    seeds = list(shots.seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: give at least one, without repeats; got {seeds}")
    if shots.out is not None:
        check_output(shots.out, shots.overwrite)
    report = _Evaluation(makers, case, texts, scorer, shots, progress).report()
    if shots.out is not None:
        save_clip_report(report, shots.out, shots.overwrite)
    return report


@dataclass
class _Evaluation:
    makers: Makers
    case: ClipCase
    texts: ClipTexts
    scorer: ClipScorer
    shots: ClipShots
    progress: Progress | None
    files: dict[str, bytes] = field(default_factory=dict)
    frames: int = 0

    def report(self) -> ClipReport:
        """Generates and measures everything."""
        asked = [(i, seed) for i in range(len(self.texts.chosen)) for seed in self.shots.seeds]
        made, rows, seconds = self._arm("concept", self.texts.named, asked, self.makers.concept)
        base, base_rows, base_seconds = self._arm("base", self.texts.plain, asked, self.makers.base)
        unnamed, more = made if self.case.acts_unnamed else None, []
        if self.makers.unnamed is not None:
            unnamed, more, _ = self._arm("unnamed", self.case.unnamed_texts(self.texts), asked, self.makers.unnamed)
        arms = Arms(made, base, unnamed, [i for i, _ in asked])
        self._references()
        known = self.scorer.known if self.scorer.reader is not None else None
        return ClipReport(
            **self._about(),
            frames=self.frames,
            scores=summary_scores(arms, self.scorer, self.case.ceiling),
            clips=[*rows, *base_rows, *more],
            motion_clips=[name for name in self.files if name.startswith(f"{CLIPS}/motion_")],
            references=[name for name in self.files if name.startswith(f"{CLIPS}/reference_")],
            candidates=list(known.candidates(2)) if known else [],
            costs=costs(self.case, seconds, base_seconds),
            notes=notes(self.case, self.scorer, self.texts, self.shots.seeds),
            files=self.files,
        )

    def _about(self) -> dict[str, Any]:
        case = self.case
        return {
            "motion": case.motion,
            "subject": case.subject,
            "class_noun": case.class_noun,
            "recipes": dict(case.recipes),
            "backbone": case.backbone,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "prompt_set": self.texts.prompts.name,
            "prompts": self.texts.named,
            "seeds": list(self.shots.seeds),
            "fps": self.shots.fps,
            "toybox": case.toy or self.scorer.instruments.toybox,
            "instruments": instruments(self.scorer),
            "metadata": dict(case.metadata),
        }

    def _arm(
        self, kind: Kind, texts: Sequence[str], asked: Sequence[tuple[int, int]], generate: Generate
    ) -> tuple[MeasuredClips, list[ClipRow], float]:
        """Generates and measures one arm in chunks, and keeps only the encoded clips. Returns the measurements, the
        rows, and the seconds per clip."""
        what = {"concept": "with the concepts", "base": "without them", "unnamed": "with no motion asked for"}[kind]
        parts, strips, seconds = [], {}, 0.0
        for start in range(0, len(asked), self.shots.chunk):
            some = asked[start : start + self.shots.chunk]
            on_progress = part_of(named(self.progress, what), start, len(some), len(asked))
            clips, took = self._clips(
                kind, [texts[i] for i, _ in some], [seed for _, seed in some], generate, on_progress
            )
            seconds += took
            if clips.ndim != 5 or len(clips) != len(some):
                raise ValueError(f"expected {len(some)} clips [N, 3, F, H, W], got {list(clips.shape)}")
            clips, self.frames = clips.detach().float().cpu(), clips.shape[2]
            plain, expects = self.texts.plain, self.texts.expects
            parts.append(self.scorer.measure(clips, [plain[i] for i, _ in some], [expects[i] for i, _ in some]))
            for (prompt, seed), clip in zip(some, clips, strict=True):
                self._keep(f"{kind}_{prompt:02d}_{seed}", clip, {"prompt": texts[prompt], "seed": str(seed)})
                strips[f"{prompt:02d} {texts[prompt]} (seed {seed})"] = spread(clip, 8).transpose(0, 1)
            if self.progress is not None:
                self.progress(f"measuring clips {what}", start + len(some), len(asked))
        if kind == "concept":
            self._sheet(strips)
        measured = self._with_freedom(joined(parts), [prompt for prompt, _ in asked])
        made = Made(kind, asked, texts, [self.texts.expects[i] for i, _ in asked])
        return measured, clip_rows(made, measured, leak_limit(self.scorer)), seconds / len(asked)

    def _with_freedom(self, measured: MeasuredClips, prompts: Sequence[int]) -> MeasuredClips:
        """Adds `freedom` if each prompt has several seeds and the true subject's range of poses is known."""
        thing, subject = self.scorer.thing, measured.subject
        scale = None if thing is None or thing.figures is None else thing.figures.range
        if scale is None or subject is None or len(self.shots.seeds) < 2:
            return measured
        freedom = freedom_of_clips(subject.crops, subject.verified, prompts, scale)
        return replace(measured, scores={**measured.scores, "freedom": freedom})

    def _clips(
        self, kind: Kind, texts: list[str], seeds: list[int], generate: Generate, progress: Steps | None
    ) -> tuple[Tensor, float]:
        """Returns the clips and the seconds taken to generate them. Clips from an earlier evaluation are reused."""
        key = (self.makers.depends.get(kind), tuple(texts), tuple(seeds))
        kept = {} if self.shots.kept is None or key[0] is None else self.shots.kept
        if key not in kept:
            clock = time.perf_counter()
            clips = generate(texts, seeds, progress)
            kept[key] = clips, time.perf_counter() - clock
        return kept[key]

    def _keep(self, name: str, clip: Tensor, about: Mapping[str, str]) -> None:
        self.files[f"{CLIPS}/{name}.webp"] = webp_bytes(clip, self.shots.fps, about)

    def _sheet(self, strips: Mapping[str, Tensor]) -> None:
        """Adds a contact sheet of the clips generated with the concepts, for viewers that cannot play clips."""
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            self.files["sheet.png"] = write_clip_sheet(Path(folder) / "sheet.png", strips).read_bytes()

    def _references(self) -> None:
        from shared.evaluation.picture_rows import pngs

        for i, clip in enumerate(self.scorer.motion_clips):
            self._keep(f"motion_{i:02d}", clip, {})
        if self.scorer.thing is not None:
            for i, png in enumerate(pngs(self.scorer.thing.references)):
                self.files[f"{CLIPS}/reference_{i:02d}.png"] = png
