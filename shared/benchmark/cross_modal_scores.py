"""Scores one modality, with the encoder, the look-alikes and the verification rule that all modalities share.

A frame shows the subject if three conditions hold: the subject is recognized among its look-alikes, the frame is not a copy
of a reference, and its likeness to the references reaches the level that 95% of true pictures reach. Identity is the share
of frames that pass this test, divided by T, the share of other true pictures that pass it. True pictures show the subject in
the same way as the modality: they are drawn for the same prompts and passed through the model's autoencoder, or rendered
from the same cameras.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shared.benchmark.aggregate import average, interval
from shared.benchmark.cross_modal_report import ModalityRow, ShotRow
from shared.benchmark.modality import Made, Shot
from shared.evaluation.clips.score_texts import ABOUT
from shared.evaluation.prompt_sets import Prompt, PromptSet
from shared.evaluation.score_texts import ABOUT as ABOUT_PICTURES
from shared.evaluation.true_figures import true_figures
from shared.metrics.encoders import Instruments
from shared.metrics.report import Score, number
from shared.metrics.scorer import Scorer
from shared.metrics.true_thing import Bar, TrueFigures
from shared.metrics.verification import PASSING, Verifier

FRAMES = 16  # frames measured per shot, evenly spaced
COLUMNS = ("identity", "recognised", "text", "class", "clip_t", "clip_i", "dino_i", "identity_i", "copied")
Values = dict[str, float]


def scores_of(name: str, made: Made, tools: Instruments, out: Path) -> tuple[ModalityRow, list[ShotRow]]:
    """Returns the modality's row of the table, and a row for each shot. File names are relative to `out`."""
    scorer = _scorer(made, tools)
    measured = [_measured(scorer, made, shot) for shot in made.shots]
    floor = [_measured(scorer, made, shot) for shot in made.floor]
    prompts = [shot.text for shot in made.shots]
    rows = [_row(name, shot, values, out) for shot, values in zip(made.shots, measured, strict=True)]
    row = ModalityRow(
        name=name,
        made=len(made.shots),
        frames=len(made.shots[0].frames),
        prompts=list(dict.fromkeys(prompts)),
        scores=_scores(scorer, measured, floor, prompts),
        seconds_each=made.seconds,
    )
    return row, rows


def _scorer(made: Made, tools: Instruments) -> Scorer:
    """Creates a scorer whose thresholds are set from true pictures."""
    case = made.case
    scorer = Scorer(
        case.references, tools, case.class_noun, case.name, case.gallery, case.fresh,
        through=case.through, masks=case.masks,
    )  # fmt: skip
    if made.true is None:
        told = dict.fromkeys((s.text, tuple(s.expects.items())) for s in made.shots)
        asked = tuple(Prompt(text="{concept}", expects=dict(expects), pose_open=False) for _, expects in told)
        scorer.figures = true_figures(scorer, case, PromptSet(name="standard", prompts=asked))
    elif scorer.chance is not None:
        scorer.figures = _figures(scorer.verifier, *made.true)
    return scorer


def _figures(verifier: Verifier, bar: Tensor, others: Tensor) -> TrueFigures:
    """Computes the likeness threshold from the true renders `bar`, and the share of the true renders `others` that pass at
    that threshold."""
    least = float(torch.quantile(verifier.look(bar).likeness, 1 - PASSING))
    passed = verifier.look(others).passes([least] * len(others)).double().mean()
    return TrueFigures(bars={"": Bar(least=least, passed=float(passed), pictures=len(others))})


def _measured(scorer: Scorer, made: Made, shot: Shot) -> Values:
    """Averages the scores over a shot's frames."""
    count = min(FRAMES, len(shot.frames))
    frames = shot.frames[torch.linspace(0, len(shot.frames) - 1, count).round().long()]
    reads = scorer.instruments.attributes is not None
    expects = dict(shot.expects) if reads else {}
    if reads and made.case.true is not None:  # the subject's class, in the recognizer's vocabulary
        expects["class"] = made.case.class_noun
    found = scorer.measure(frames, [shot.plain] * count, [expects] * count)
    means = {key: found.mean(key) for key in found.scores}
    if reads:  # only the attributes in the prompt itself, without the class
        asked = [v for k in shot.expects if not math.isnan(v := means.get(k, math.nan))]
        means["text"] = sum(asked) / len(asked) if asked else math.nan
    if scorer.figures is None:  # without a threshold, only likeness can be reported
        means.pop("identity", None)
    return means


def _row(name: str, shot: Shot, values: Mapping[str, float], out: Path) -> ShotRow:
    return ShotRow(
        modality=name,
        text=shot.text,
        seed=shot.seed,
        file="" if shot.file is None else shot.file.relative_to(out).as_posix(),
        more={text: path.relative_to(out).as_posix() for text, path in shot.more.items()},
        scores={key: number(values[key]) for key in (*COLUMNS, "ceiling") if key in values},
    )


def _scores(scorer: Scorer, measured: Sequence[Values], floor: Sequence[Values], prompts: Sequence[str]) -> list[Score]:
    passed = _mean(measured, "ceiling")
    out = []
    for key in COLUMNS:
        about = ABOUT_PICTURES.get(key) or ABOUT[key]
        share = passed if key == "identity" and passed else 1.0
        value = _mean(measured, key)
        if value is None:
            continue
        low, high = interval([v.get(key, math.nan) for v in measured], about.unit, prompts)
        base = _mean(floor, key) if key != "copied" else None
        found = {"value": value, "low": low, "high": high, "base": base}
        shares = {k: None if v is None else v / share for k, v in found.items()}
        score = Score(
            key=key, title=about.title, unit=about.unit, better=about.better, explanation=about.explanation, **shares
        )  # fmt: skip
        out.append(_with_beside(score, scorer, passed))
    return out


def _with_beside(score: Score, scorer: Scorer, passed: float | None) -> Score:
    """Adds the values for true pictures, for a random guess, and for each reference compared with the other references. Caps
    rates at 1."""
    update: dict[str, object] = {}
    if score.unit == "rate":
        update = {k: min(1.0, v) for k in ("value", "low", "high", "base") if (v := getattr(score, k)) is not None}
    if score.key == "identity":
        update["truth"] = passed
    if score.key == "recognised":
        update["chance"] = scorer.chance
    if score.key == scorer.likeness_key and scorer.reference_range is not None:
        update |= dict(zip(("among_low", "among_high"), scorer.reference_range, strict=True))
    return score.model_copy(update=update)


def _mean(rows: Sequence[Values], key: str) -> float | None:
    return average([number(row.get(key)) for row in rows])
