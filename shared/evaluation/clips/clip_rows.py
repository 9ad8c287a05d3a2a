"""Turns clips into rows of a report, with flags for their faults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.metrics.clips.report import CLIPS, ClipRow, Kind
from shared.metrics.clips.scorer import ClipScorer, MeasuredClips

HALF = 0.5  # a clip is flagged if less than this share of its frames matches the prompt
STILL = "still"  # the name of the candidate that stands still
OPPOSED = 0.0  # motion fidelity at or below this value indicates an unrelated or opposite motion


@dataclass(frozen=True)
class Made:
    """The clips of one arm, as (prompt index, seed) pairs, with the prompts' texts and what each clip must show."""

    kind: Kind
    shots: Sequence[tuple[int, int]]
    texts: Sequence[str]
    expects: Sequence[Mapping[str, str]]


def clip_rows(made: Made, measured: MeasuredClips, limit: float | None) -> list[ClipRow]:
    """Returns one row per clip. A clip is flagged if its leakage reaches `limit`."""
    rows = []
    for n, (prompt, seed) in enumerate(made.shots):
        flags = _flags(measured, n, made.expects[n], limit) if made.kind == "concept" else []
        rows.append(
            ClipRow(
                kind=made.kind,
                prompt=prompt,
                text=made.texts[prompt],
                seed=seed,
                file=f"{CLIPS}/{made.kind}_{prompt:02d}_{seed}.webp",
                scores={k: v[n] for k, v in measured.scores.items()},
                expects=dict(made.expects[n]),
                seen=measured.seen[n],
                moves_like=measured.moves_like[n],
                flags=flags,
                failed=bool(flags),
            )
        )
    return rows


def leak_limit(scorer: ClipScorer) -> float | None:
    """Returns the leakage at which a clip is flagged: the midpoint between 1 (an identical clip) and the highest
    leakage among the motion's own clips. Returns None if the motion has fewer than two clips."""
    among = scorer.unrelated_looks
    return (max(among) + 1) / 2 if among else None


def _flags(measured: MeasuredClips, n: int, expects: Mapping[str, str], limit: float | None) -> list[str]:
    """Lists what is wrong with clip n."""

    def score(key: str) -> float:
        return measured.scores[key][n] if key in measured.scores else math.nan

    flags = []
    if score("frozen") == 1:
        flags.append("nothing moves")
    elif score("motion_recognised") == 0:
        like = measured.moves_like[n]
        flags.append("nearest to standing still" if like == STILL else f"moves like “{like}”")
    elif math.isnan(score("motion_recognised")) and score("motion_fidelity") <= OPPOSED:
        flags.append("moves unlike the motion's clips")
    if limit is not None and score("leakage") >= limit:
        flags.append("looks like the motion's clips")
    if score("identity") < HALF:
        flags.append(f"shows the subject in only {score('identity'):.0%} of the frames")
    for name, asked in expects.items():
        if score(name) < HALF:
            flags.append(f"{name}: {measured.seen[n].get(name, 'not seen')}, but the prompt asks for {asked}")
    return flags
