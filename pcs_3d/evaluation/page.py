"""Builds the self-contained page of an asset's report, with renders from all around, scores, and plots by azimuth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pcs_3d.evaluation.asset_report import ARMS, AssetReport, Curve
from pcs_3d.evaluation.headline import said
from shared.metrics.html import inline, render
from shared.metrics.plots import COLORS

NAMES = {"asset": "the asset", "truth": "the real object", "sphere": "a sphere in its mean colour"}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 150, 38, 8, 10, 24
DASHES = {"asset": "", "truth": "5 3", "sphere": "1.5 3"}


def asset_html(report: AssetReport) -> str:
    """Builds the self-contained page of a report."""
    shown = [
        {
            "row": view,
            "src": inline(report.files.get(view.file)),
            "truth": inline(report.files.get(view.truth_file)) if view.truth_file else "",
        }
        for view in report.views
    ]
    return render(
        "asset.html.j2",
        report=report,
        viewer=report.viewer,
        views=shown,
        references=[inline(report.files.get(name)) for name in report.references],
        rows=[(s, *(said(s, v) for v in (s.value, s.truth, s.base, s.chance))) for s in report.scores],
        plots=[(c.title, curve_svg(c.title, c.azimuth_deg, lines(c))) for c in report.curves],
        names={arm: name for arm, name in NAMES.items() if any(getattr(c, arm) for c in report.curves)},
        colors=dict(zip(ARMS, COLORS, strict=False)),
    )


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    values: the value at each azimuth, or None where it was not measured.
    dash: an SVG dash pattern; "" is a solid line.
    """

    values: Sequence[float | None]
    color: str
    dash: str = ""


def lines(curve: Curve) -> list[Line]:
    """Returns a curve's lines for the asset, the real object and the sphere."""
    columns = [
        (arm, values, color) for arm, color in zip(ARMS, COLORS, strict=False) if (values := getattr(curve, arm))
    ]
    return [Line(values, color, DASHES[arm]) for arm, values, color in columns]


def curve_svg(title: str, azimuth_deg: Sequence[float], drawn: Sequence[Line]) -> str:
    """Plots a score against the azimuth, over one full turn around the object, starting at its front. Returns an
    `<svg>`, or "" if there are no values."""
    known = [v for line in drawn for v in line.values if v is not None]
    if not known:
        return ""
    low, high = min(0.0, *known), max(1.0, *known) if max(known) <= 1 else 1.05 * max(known)
    parts = [_axes(low, high)]
    for line in drawn:
        path = _path([*azimuth_deg, 360.0], [*line.values, line.values[0]], low, high)
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        parts.append(f'<path d="{path}" fill="none" stroke="{line.color}" stroke-width="1.8"{dash}/>')
    name = escape(f"{title} by azimuth", quote=True)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" class="plot" aria-label="{name}"><title>{name}</title>'
        + "".join(parts)
        + "</svg>"
    )


def _place(azimuth: float, value: float, low: float, high: float) -> tuple[float, float]:
    x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * azimuth / 360
    return x, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (high - low))


def _path(azimuths: Sequence[float], values: Sequence[float | None], low: float, high: float) -> str:
    """Returns an SVG path with a gap wherever nothing was measured."""
    out, pen = [], "M"
    for azimuth, value in zip(azimuths, values, strict=True):
        if value is None:
            pen = "M"
            continue
        x, y = _place(azimuth, value, low, high)
        out.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(out)


def _axes(low: float, high: float) -> str:
    parts = []
    for value in (low, (low + high) / 2, high):
        x, y = _place(0, value, low, high)
        parts.append(
            f'<path d="M{x} {y:.1f}H{_WIDTH - _RIGHT}" stroke="currentColor" opacity=".18"/>'
            f'<text x="{x - 4}" y="{y + 3:.1f}" font-size="9" text-anchor="end">{value:.3g}</text>'
        )
    for azimuth, name in ((0, "front"), (90, "left"), (180, "back"), (270, "right"), (360, "front")):
        x, y = _place(azimuth, low, low, high)
        anchor = {0: "start", 360: "end"}.get(azimuth, "middle")
        parts.append(f'<text x="{x:.1f}" y="{y + 15:.1f}" font-size="9" text-anchor="{anchor}">{name}</text>')
    return "".join(parts)
