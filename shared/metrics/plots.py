"""Draws plots as SVG that can be inlined in HTML.

The SVG contains no external URLs. Its text has the page's own colour, so that it is also readable in dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

INK = "#123456"  # placeholder for the page's own colour
COLORS = ("#2f7fd1", "#d9822b", "#2a9d6f", "#b0579b", "#c0473e", "#8a7a2f", "#5f6fd0", "#4a9aa8")
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Point:
    """One recipe in the trade-off plot; all values are in [0, 1], and the intervals are optional."""

    label: str
    identity: float
    text: float
    identity_range: tuple[float, float] | None = None
    text_range: tuple[float, float] | None = None
    base: bool = False  # the floor: the base model without the concept
    freedom: float | None = None
    freedom_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Axis:
    """The horizontal axis of one panel, with the value and interval of each point on it."""

    label: str
    value: Callable[[Point], float | None]
    span: Callable[[Point], tuple[float, float] | None]


_TEXT = _Axis("prompt followed", lambda p: p.text, lambda p: p.text_range)
_FREEDOM = _Axis("freedom", lambda p: p.freedom, lambda p: p.freedom_range)


def trade_off_svg(points: Sequence[Point], title: str, chance: float | None = None) -> str:
    """Plots identity (up) against prompt following (right). Returns one `<svg>` element.

    If any point has a value for freedom, a second panel plots identity against freedom. Otherwise, grey lines join
    points of equal trade-off.
    """
    axes = [_TEXT, *([_FREEDOM] if any(p.freedom is not None for p in points) else [])]
    plt = _pyplot()
    with plt.rc_context(_style()):
        figure, panels = plt.subplots(
            1,
            len(axes),
            figsize=(5.6 if len(axes) == 1 else 8.2, 4.6),
            layout="constrained",
            sharey=True,
            squeeze=False,
        )
        for axis, panel in zip(axes, panels[0], strict=True):
            if len(axes) == 1:
                _contours(panel)
            if chance is not None:
                panel.axhline(chance, color=INK, alpha=0.5, linewidth=0.9, linestyle=":")
                panel.text(0.01, chance + 0.012, "chance", fontsize=8, alpha=0.8)
            _draw_points(panel, points, axis)
            panel.set(xlim=(0, 1), ylim=(0, 1), xlabel=axis.label)
            panel.grid(alpha=0.12, color=INK)
        panels[0][0].set_ylabel("identity")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        return _inline(figure, title)


def _contours(panel: Any) -> None:
    grid = np.linspace(1e-3, 1, 200)
    x, y = np.meshgrid(grid, grid)
    lines = panel.contour(
        x, y, 2 * x * y / (x + y), levels=[0.2, 0.4, 0.6, 0.8], colors=INK, alpha=0.22, linewidths=0.8
    )
    panel.clabel(lines, fmt="%.1f", fontsize=7)


def _draw_points(panel: Any, points: Sequence[Point], axis: _Axis) -> None:
    """Draws every point that has a value on the axis, with its intervals."""
    number = 0
    for point in points:
        color, marker = (INK, "x") if point.base else (COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)])
        number += not point.base
        at, span = axis.value(point), axis.span(point)
        if at is None:
            continue
        errors: dict[str, Any] = {}
        if span:
            errors["xerr"] = _error(at, span)
        if point.identity_range:
            errors["yerr"] = _error(point.identity, point.identity_range)
        panel.plot(at, point.identity, marker, color=color, markersize=8, label=point.label, clip_on=False)
        if errors:
            panel.errorbar(at, point.identity, fmt="none", ecolor=color, elinewidth=1, capsize=2, alpha=0.7, **errors)


def _error(value: float, span: tuple[float, float]) -> list[list[float]]:
    return [[max(0.0, value - span[0])], [max(0.0, span[1] - value)]]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _style() -> dict[str, Any]:
    ink = {k: INK for k in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    sides = {"axes.spines.top": False, "axes.spines.right": False}
    return {**ink, **sides, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "pcs"}


def _inline(figure: Any, title: str) -> str:
    plt = _pyplot()
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)  # it would apply to the whole page
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" class="plot">', text, count=1)
    text = text.replace(INK, "currentColor").replace("xlink:href", "href")
    name = escape(title, quote=True)
    return text.replace('class="plot">', f'class="plot" aria-label="{name}"><title>{name}</title>', 1)
