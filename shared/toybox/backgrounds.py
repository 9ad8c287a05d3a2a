"""Paints backgrounds. A background depends on the horizon and on some of the scene's random numbers, but not on the
camera's azimuth, so it is the same from all sides.

Every painter takes a `Canvas` for b pictures and returns colours [b, 3, S, S].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Color = tuple[float, float, float]


@dataclass(frozen=True)
class Canvas:
    """A painter's inputs.

    x, y: the pixels' coordinates [1, S, S] in [0, 1]; y points down
    horizon: the y coordinate of the horizon [b, 1, 1]
    numbers: random numbers [b, 48] in [0, 1]
    noise: smooth noise [b, 4, S, S], roughly in [-1, 1]
    """

    x: Tensor
    y: Tensor
    horizon: Tensor
    numbers: Tensor
    noise: Tensor

    def u(self, index: int) -> Tensor:
        """Returns the random number with this index for each picture, [b, 1, 1]."""
        return self.numbers[:, index, None, None]

    def at(self, index: Tensor) -> Tensor:
        """Looks up the random number for each pixel of an index map [b, S, S]. Indices are taken modulo 48."""
        flat = (index.long() % 48).flatten(1)
        return self.numbers.gather(1, flat).view(index.shape)

    def edge(self, signed: Tensor, soft: float = 0.012) -> Tensor:
        """Returns 1 where a signed distance is positive and 0 elsewhere, with an anti-aliased edge."""
        return (signed / soft + 0.5).clamp(0, 1)


def mix(a: Tensor | Color, b: Tensor | Color, t: Tensor) -> Tensor:
    """Blends two colours. The result is `a` where `t` ([b, S, S]) is 0, and `b` where `t` is 1."""
    t = t[:, None]
    a, b = (c if isinstance(c, Tensor) else torch.tensor(c, device=t.device)[None, :, None, None] for c in (a, b))
    return a + (b - a) * t


def _sky(c: Canvas, top: Color, low: Color) -> Tensor:
    return mix(top, low, (c.y / (c.horizon + 0.02)).clamp(0, 1))


def _ground(c: Canvas) -> Tensor:
    """Returns a ramp from 0 at the horizon to 1 at the bottom edge."""
    return ((c.y - c.horizon) / (1 - c.horizon)).clamp(0, 1)


def _disc(c: Canvas, x: Tensor, y: Tensor, r: float) -> Tensor:
    return c.edge(r - ((c.x - x) ** 2 + (c.y - y) ** 2).sqrt())


def _clouds(c: Canvas, sky: Tensor, strength: float = 0.7) -> Tensor:
    return mix(sky, (1.0, 1.0, 1.0), ((c.noise[:, 0] - 0.05) * 1.3).clamp(0, 1) * strength)


def beach(c: Canvas) -> Tensor:
    sun = _disc(c, 0.12 + 0.76 * c.u(3), c.horizon * 0.4, 0.06)
    sky = mix(_sky(c, (0.4, 0.72, 0.97), (0.8, 0.93, 1.0)), (1.0, 0.93, 0.45), sun)
    shore = c.horizon + 0.1 + 0.02 * (c.x * 9 + 6 * c.u(4)).sin()
    sand = mix((0.96, 0.86, 0.6), (0.9, 0.75, 0.47), (_ground(c) * 0.7 + 0.25 * c.noise[:, 1]).clamp(0, 1))
    sea = mix((0.1, 0.45, 0.75), (0.25, 0.72, 0.82), ((c.y - c.horizon) / 0.1).clamp(0, 1))
    picture = mix(sky, sea, c.edge(c.y - c.horizon))
    picture = mix(picture, (1.0, 1.0, 1.0), c.edge(c.y - shore + 0.018))
    return mix(picture, sand, c.edge(c.y - shore))


def snow(c: Canvas) -> Tensor:
    sky = _sky(c, (0.56, 0.66, 0.78), (0.8, 0.86, 0.93))
    hill = c.horizon + 0.03 * (c.x * 5 + 6 * c.u(3)).sin()
    picture = _firs(c, sky, hill, (0.32, 0.45, 0.46), 7)
    field = mix((0.88, 0.93, 1.0), (0.97, 0.98, 1.0), (_ground(c) + 0.5 * c.noise[:, 1]).clamp(0, 1))
    picture = mix(picture, field, c.edge(c.y - hill))
    for k in range(16):
        spot = _disc(c, c.u(8 + k), (c.u(24 + k) * 0.97), 0.011)
        picture = mix(picture, (1.0, 1.0, 1.0), spot)
    return picture


def _firs(c: Canvas, behind: Tensor, foot: Tensor, color: Color, count: int) -> Tensor:
    """Draws a row of triangular trees standing on a line."""
    cell = c.x * count + c.u(5)
    tall = 0.12 + 0.16 * c.at(cell.floor() + 11)
    across = (cell - cell.floor() - 0.5).abs() * 2
    return mix(behind, color, c.edge((tall * (1 - across) - (foot - c.y)) * 0.5) * c.edge(foot - c.y + 0.05))


def grass(c: Canvas) -> Tensor:
    sky = _clouds(c, _sky(c, (0.36, 0.64, 0.96), (0.72, 0.88, 1.0)))
    far = mix((0.3, 0.66, 0.2), (0.16, 0.5, 0.12), (_ground(c) + 0.3 * c.noise[:, 1]).clamp(0, 1))
    blades = ((c.x * 60 + 5 * c.noise[:, 2]).sin() * (c.y * 34 + 4 * c.noise[:, 3]).sin() - 0.45).clamp(0, 1)
    far = mix(far, (0.5, 0.82, 0.28), blades * 0.8 * _ground(c).sqrt())
    return mix(sky, far, c.edge(c.y - c.horizon))


def wooden_floor(c: Canvas) -> Tensor:
    wall = mix((0.9, 0.85, 0.74), (0.83, 0.77, 0.65), (c.y + 0.2 * c.noise[:, 0]).clamp(0, 1))
    depth = 1 / (c.y - c.horizon + 0.22).clamp_min(0.05)
    lane = (c.x - 0.5) * depth * 2.1 + c.u(3)
    shade = c.at(lane.floor() + 60)
    floor = mix((0.7, 0.45, 0.23), (0.56, 0.34, 0.16), (0.75 * shade + 0.25 * c.noise[:, 1]).clamp(0, 1))
    line = (0.5 - (lane - lane.floor() - 0.5).abs()) / depth
    floor = mix(floor, (0.3, 0.17, 0.08), 1 - c.edge(line - 0.012, 0.02))
    picture = mix(wall, (0.97, 0.95, 0.9), c.edge(c.y - c.horizon + 0.04))
    return mix(picture, floor, c.edge(c.y - c.horizon))


def brick_wall(c: Canvas) -> Tensor:
    rows = 8.5
    row = (c.y * rows + c.u(3)).floor()
    across = c.x * 4.2 + 0.5 * (row % 2) + c.u(4)
    up = c.y * rows + c.u(3) - row
    gap = torch.minimum((0.5 - (across - across.floor() - 0.5).abs()) / 4.2, (0.5 - (up - 0.5).abs()) / rows)
    tone = c.at(row * 7 + across.floor() * 3 + 90)
    brick = mix((0.66, 0.25, 0.17), (0.54, 0.18, 0.13), tone)
    return mix((0.8, 0.76, 0.7), brick, c.edge(gap - 0.009, 0.01))


def night_sky(c: Canvas) -> Tensor:
    sky = mix((0.02, 0.03, 0.14), (0.12, 0.12, 0.34), (c.y / (c.horizon + 0.25)).clamp(0, 1))
    for k in range(18):
        sky = mix(sky, (1.0, 1.0, 0.88), _disc(c, c.u(4 + k), c.u(24 + k) * (c.horizon + 0.2), 0.006 + 0.004 * (k % 3)))
    level, across = 0 * c.horizon, 0.8 * c.u(3)
    moon = _disc(c, 0.1 + across, 0.13 + level, 0.075) * (1 - _disc(c, 0.14 + across, 0.11 + level, 0.062))
    sky = mix(sky, (1.0, 0.96, 0.72), moon)
    hill = c.horizon + 0.22 + 0.04 * (c.x * 5 + 6 * c.u(2)).sin()
    return mix(sky, mix((0.16, 0.2, 0.36), (0.1, 0.12, 0.24), _ground(c)), c.edge(c.y - hill))


def water(c: Canvas) -> Tensor:
    sky = _clouds(c, _sky(c, (0.5, 0.76, 0.96), (0.86, 0.95, 1.0)))
    top = c.horizon - 0.1
    depth = ((c.y - top) / (1 - top)).clamp(0.001, 1)
    phase = depth.sqrt() * 44 + 1.8 * (c.x * (9 - 4 * depth) + 6 * c.u(3)).sin() + 1.2 * c.noise[:, 1]
    crest = (phase.sin() * 1.4 - 0.45).clamp(0, 1) * 0.75
    sea = mix(mix((0.1, 0.5, 0.76), (0.03, 0.28, 0.58), depth), (0.45, 0.8, 0.93), crest)
    return mix(sky, sea, c.edge(c.y - top))


def city(c: Canvas) -> Tensor:
    picture = _sky(c, (0.62, 0.78, 0.93), (0.93, 0.91, 0.86))
    for layer, (count, tall, color) in enumerate(((7, 0.1, (0.58, 0.63, 0.72)), (5, 0.0, (0.33, 0.38, 0.48)))):
        cell = c.x * count + 3 * c.u(3 + layer)
        index = cell.floor() + 17 * layer
        roof = c.horizon * (0.62 - 0.5 * c.at(index)) - tall * c.horizon
        inside = c.edge((0.5 - (cell - cell.floor() - 0.5).abs()) / count - 0.006) * c.edge(c.y - roof)
        body = mix(color, (color[0] * 1.25, color[1] * 1.15, color[2] * 1.05), c.at(index + 5))
        if layer:
            wx, wy = cell * 3 - (cell * 3).floor(), c.y * 17 - (c.y * 17).floor()
            lit = c.edge(0.27 - (wx - 0.5).abs(), 0.1) * c.edge(0.27 - (wy - 0.5).abs(), 0.2)
            lit = lit * c.edge(c.y - roof - 0.03)
            body = mix(body, (1.0, 0.9, 0.5), lit * (c.at((cell * 3).floor() * 5 + (c.y * 17).floor() * 3 + 99) > 0.3))
        picture = mix(picture, body, inside)
    road = mix((0.5, 0.5, 0.53), (0.36, 0.36, 0.4), _ground(c))
    picture = mix(picture, road, c.edge(c.y - c.horizon))
    curb = c.edge(0.012 - (c.y - c.horizon - 0.05).abs())
    return mix(picture, (0.8, 0.8, 0.78), curb)


def mountain(c: Canvas) -> Tensor:
    picture = _sky(c, (0.42, 0.7, 0.96), (0.83, 0.93, 1.0))
    for k, (color, wide) in enumerate((((0.47, 0.5, 0.6), 0.44), ((0.38, 0.4, 0.49), 0.36), ((0.43, 0.46, 0.55), 0.4))):
        peak_x = 0.2 + 0.3 * k + 0.2 * (c.u(3 + k) - 0.5)
        peak_y = c.horizon * (0.12 + 0.3 * c.u(6 + k))
        jag = 0.02 * (c.x * 40 + 9 * c.u(9 + k)).sin() * (c.x * 23).cos()
        slope = peak_y + (c.x - peak_x).abs() * (c.horizon - peak_y + 0.02) / wide * 1.1 + jag * 0.6
        shade = mix(color, (color[0] * 0.72, color[1] * 0.72, color[2] * 0.75), c.edge(c.x - peak_x - jag, 0.05))
        cap = c.edge(peak_y + 0.33 * (c.horizon - peak_y) + 0.8 * jag + 0.015 * (c.x * 60).sin() - c.y)
        picture = mix(picture, mix(shade, (0.98, 0.98, 1.0), cap), c.edge(c.y - slope))
    meadow = mix((0.5, 0.64, 0.3), (0.36, 0.5, 0.2), (_ground(c) + 0.3 * c.noise[:, 1]).clamp(0, 1))
    return mix(picture, meadow, c.edge(c.y - c.horizon))


def forest(c: Canvas) -> Tensor:
    picture = mix((0.12, 0.34, 0.2), (0.42, 0.62, 0.32), (c.y / (c.horizon + 0.1)).clamp(0, 1))
    for layer, (count, color) in enumerate(((9, (0.26, 0.26, 0.16)), (5, (0.34, 0.21, 0.11)))):
        cell = c.x * count + 3 * c.u(3 + layer)
        off = (cell - cell.floor() - 0.3 - 0.4 * c.at(cell.floor() + 20 * layer)).abs() / count
        foot = c.horizon + 0.03 + 0.05 * layer
        picture = mix(picture, color, c.edge(0.016 + 0.014 * layer - off) * c.edge(foot - c.y))
    leaves = 0.22 * c.horizon + 0.05 + 0.06 * c.noise[:, 0] + 0.025 * (c.x * 30 + 6 * c.u(6)).sin().abs()
    green = mix((0.05, 0.27, 0.1), (0.14, 0.46, 0.14), (0.5 + 0.9 * c.noise[:, 2]).clamp(0, 1))
    picture = mix(picture, green, c.edge(leaves - c.y, 0.03))
    floor = mix((0.3, 0.36, 0.14), (0.24, 0.22, 0.1), (_ground(c) + 0.5 * c.noise[:, 1]).clamp(0, 1))
    bush = c.horizon + 0.05 + 0.02 * (c.x * 26 + 6 * c.u(7)).sin()
    return mix(picture, floor, c.edge(c.y - bush, 0.02))


def _studio(tone: Color) -> Callable[[Canvas], Tensor]:
    def paint(c: Canvas) -> Tensor:
        fade = (0.6 * (c.y - c.horizon).clamp(0, 1) + 0.5 * ((c.x - 0.4) ** 2 + (c.y - 0.35) ** 2)).clamp(0, 1)
        dark = (tone[0] * 0.72, tone[1] * 0.72, tone[2] * 0.76)
        return mix(tone, dark, fade) * (0.95 + 0.1 * c.u(3)[:, None])

    return paint


PAINTERS: dict[str, Callable[[Canvas], Tensor]] = {
    "beach": beach,
    "snow": snow,
    "grass": grass,
    "wooden floor": wooden_floor,
    "brick wall": brick_wall,
    "night sky": night_sky,
    "water": water,
    "city": city,
    "mountain": mountain,
    "forest": forest,
    "white studio": _studio((0.93, 0.93, 0.93)),
    "gray studio": _studio((0.55, 0.55, 0.56)),
    "black studio": _studio((0.13, 0.13, 0.145)),
    "blue studio": _studio((0.42, 0.66, 0.92)),
}
