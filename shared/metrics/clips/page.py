"""Renders a report of clips as one self-contained HTML page in which the clips play, without scripts or external files."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageSequence

from shared.metrics.clips.report import ClipReport, ClipRow, Kind
from shared.metrics.html import inline, render
from shared.metrics.report import Score

LARGEST = 256  # in pixels; larger clips are scaled down on the page, but not in the files
MAIN = ("score", "motion_recognised", "motion_fidelity", "false_motion", "leakage", "identity", "both")
PAIR = ("dynamic_degree", "temporal_consistency", "frozen")  # shown together, because none is meaningful on its own
ARMS: dict[Kind, str] = {
    "concept": "with the concepts",
    "base": "base model",
    "unnamed": "motion loaded but not asked for",
}


def clips_html(report: ClipReport) -> str:
    """Renders the self-contained page of one report."""
    by_key = {s.key: s for s in report.scores}
    first = report.files.get(report.clips[0].file) if report.clips else None
    return render(
        "clips.html.j2",
        report=report,
        main=[by_key[k] for k in MAIN if k in by_key],
        pair=[by_key[k] for k in PAIR if k in by_key],
        rest=[s for s in report.scores if s.key not in (*MAIN, *PAIR)],
        motion_clips=[_shown(report, name, f"a clip of the motion {report.motion}") for name in report.motion_clips],
        references=[inline(report.files.get(name)) for name in report.references],
        gallery=[_of_prompt(report, i, text) for i, text in enumerate(report.prompts)],
        has_unnamed=bool(report.of_kind("unnamed")),
        columns=_columns(report.scores, report.of_kind("concept")),
        pixelated=first is not None and max(Image.open(io.BytesIO(first)).size) <= 128,
    )


def _of_prompt(report: ClipReport, prompt: int, text: str) -> dict[str, Any]:
    arms = []
    for kind, title in ARMS.items():
        rows = [c for c in report.of_kind(kind) if c.prompt == prompt]
        if rows:
            arms.append({"title": title, "tiles": [_tile(report, row) for row in rows]})
    made = [c for c in report.of_kind("concept") if c.prompt == prompt]
    return {"text": text, "arms": arms, "good": sum(not c.failed for c in made)}


def _tile(report: ClipReport, row: ClipRow) -> dict[str, Any]:
    wrong = f"; flagged: {', '.join(row.flags)}" if row.flags else ""
    alt = f"“{row.text}”, {ARMS[row.kind]}, seed {row.seed}{wrong}"
    return {**_shown(report, row.file, alt), "row": row}


def _shown(report: ClipReport, name: str, alt: str) -> dict[str, Any]:
    data = report.files.get(name)
    return {"src": "" if data is None else inline_clip(data), "still": _still(data), "alt": alt, "row": None}


def _columns(scores: Sequence[Score], rows: Sequence[ClipRow]) -> list[Score]:
    """Picks the scores that are measured clip by clip."""
    own = {key for row in rows for key in row.scores}
    return [s for s in scores if s.key in own]


def inline_clip(webp: bytes) -> str:
    """Returns an animated WebP as a `data:` URL, scaled down to the size shown on the page."""
    clip = Image.open(io.BytesIO(webp))
    if max(clip.size) <= LARGEST:
        return _url("webp", webp)
    frames, shown_for = [], []
    for frame in ImageSequence.Iterator(clip):
        frame.load()  # the duration is known only after loading
        shown_for.append(int(frame.info.get("duration") or 0))
        small = frame.convert("RGB")
        small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        frames.append(small)
    stream = io.BytesIO()
    how: dict[str, Any] = {"duration": shown_for, "loop": 0, "quality": 80, "method": 4}
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], **how)
    return _url("webp", stream.getvalue())


def _still(webp: bytes | None) -> str:
    """Returns a clip's first frame as a `data:` URL, for readers who have set their system to reduce motion."""
    if webp is None:
        return ""
    frame = Image.open(io.BytesIO(webp)).convert("RGB")
    frame.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    frame.save(stream, "WEBP", quality=80)
    return _url("webp", stream.getvalue())


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()
