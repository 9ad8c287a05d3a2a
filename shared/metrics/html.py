"""Renders one HTML page per report, with inline pictures and plots, and without scripts or external URLs. The page is
readable on a phone, in dark mode and with a screen reader.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from shared.metrics.plots import Point, trade_off_svg
from shared.metrics.report import PictureRow, Report, Score

TEMPLATES = Path(__file__).resolve().parent / "templates"
LARGEST = 320  # in pixels; larger pictures are scaled down on the page, but not in the files
MAIN = ("trade_off", "identity", "text", "freedom")  # shown next to the plot
MORE = ("recognised", "no_face", "copied", "drift", "diversity", "views", "place", "size")
ATTRIBUTES = ("background", "view", "accessory", "style")

WHO = {
    "concept": "with the concept",
    "freedom": "with the concept",
    "base": "base model",
    "drift": "concept loaded",
    "drift_base": "base model",
}


@lru_cache(maxsize=1)
def _templates() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"shown": formatted, "seconds": seconds, "bytes": size, "percent": percent, "pretty": pretty}
    return env


def render(template: str, **values: Any) -> str:
    """Fills one of this package's templates. All values are escaped unless they are marked as safe."""
    return _templates().get_template(template).render(**values)


def report_html(report: Report) -> str:
    """Renders the self-contained page of one report."""
    by_key = {s.key: s for s in report.scores}
    return render(
        "report.html.j2",
        report=report,
        main=[by_key[k] for k in MAIN if k in by_key],
        cards=[by_key[k] for k in (*ATTRIBUTES, *MORE) if k in by_key],
        rest=[s for s in report.scores if s.key not in (*MAIN, *ATTRIBUTES, *MORE)],
        plot=plot_of([report]),
        references=[inline(report.thumbs.get(name)) for name in report.references],
        gallery=_gallery(report),
        drift=_drift_pairs(report),
        pixelated=_is_small(report),
    )


def plot_of(reports: Sequence[Report]) -> str | None:
    """Plots the trade-off of several reports and the base model's floor. Returns None if text was not measured."""
    points = []
    for r in reports:
        identity, text, freedom = (r.score(key) for key in ("identity", "text", "freedom"))
        if identity is None or text is None or identity.value is None or text.value is None:
            continue
        if not points and identity.base is not None and text.base is not None:
            points.append(Point("base model, given only the class", identity.base, text.base, base=True))
        point = Point(r.recipe or r.name, identity.value, text.value, _span(identity), _span(text))
        if freedom is not None:  # no value means that too few pictures show the thing, which counts as 0
            point = replace(point, freedom=freedom.value or 0.0, freedom_range=_span(freedom))
        points.append(point)
    if not points:
        return None
    summary = "; ".join(_said(p) for p in points)
    first = reports[0].score("identity")
    beside = " and freedom" if any(p.freedom is not None for p in points) else ""
    title = f"Identity against prompt following{beside}. {summary}"
    return trade_off_svg(points, title, first.chance if first else None)


def _said(point: Point) -> str:
    freedom = "" if point.freedom is None else f", freedom {point.freedom:.2f}"
    return f"{point.label}: identity {point.identity:.2f}, prompt followed {point.text:.2f}{freedom}"


def _span(score: Score) -> tuple[float, float] | None:
    return None if score.low is None or score.high is None else (score.low, score.high)


def _gallery(report: Report) -> list[dict[str, Any]]:
    """Returns one row per prompt, with the tiles of the pictures made with the concept and of the base model's
    pictures."""
    out = []
    for prompt in report.prompts:
        made = [p for p in (*report.of_kind("concept"), *report.of_kind("freedom")) if p.prompt == prompt.prompt]
        base = [p for p in report.of_kind("base") if p.prompt == prompt.prompt]
        out.append(
            {"prompt": prompt, "made": [_tile(report, p) for p in made], "base": [_tile(report, p) for p in base]}
        )
    return out


def _drift_pairs(report: Report) -> list[dict[str, Any]]:
    base = {(p.prompt, p.seed): p for p in report.of_kind("drift_base")}
    pairs = [(p, base.get((p.prompt, p.seed))) for p in report.of_kind("drift")]
    return [{"made": _tile(report, p), "base": _tile(report, b), "drift": p.scores.get("drift")} for p, b in pairs if b]


def _tile(report: Report, row: PictureRow) -> dict[str, Any]:
    who = WHO[row.kind]
    wrong = f"; flagged: {', '.join(row.flags)}" if row.flags else ""
    return {
        "src": inline(report.thumbs.get(row.file)),
        "alt": f"“{row.text}”, {who}, seed {row.seed}{wrong}",
        "row": row,
    }


def _is_small(report: Report) -> bool:
    """Returns whether the pictures are so small that smoothing would only blur them."""
    data = next(iter(report.thumbs.values()), None)
    return data is not None and max(Image.open(io.BytesIO(data)).size) <= 128


def inline(png: bytes | None, largest: int = LARGEST) -> str:
    """Returns a picture as a `data:` URL, scaled down to the size shown on the page, or "" if there is none."""
    if png is None:
        return ""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    if max(picture.size) <= largest:
        return "data:image/png;base64," + base64.b64encode(png).decode()
    picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def formatted(value: float | None, unit: str = "score") -> str:
    """Formats a score.

    Rates are shown as whole percentages, shares as percentages with one decimal, and other scores with two decimals.
    """
    if value is None:
        return "–"
    if unit == "share":
        return f"{100 * value:.1f}%"
    return percent(value) if unit == "rate" else f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
    return f"{int(value) // 60} min {int(value) % 60:02d} s"


def size(value: float | None) -> str:
    """Formats a size in bytes, in powers of 1024."""
    if value is None:
        return "–"
    amount, units = float(value), ["bytes", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} {units[0]}" if units[0] == "bytes" or amount >= 100 else f"{amount:.1f} {units[0]}"


def pretty(value: Any) -> str:
    """Formats a value as JSON for display."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
