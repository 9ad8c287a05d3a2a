"""Renders pictures of scenes, with the ground truth for each pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.toybox import patterns, styles
from shared.toybox.backgrounds import PAINTERS, Canvas
from shared.toybox.part_colors import SLOTS
from shared.toybox.splat import FILL, Hits, Instances, groups, instances, turned, visible
from shared.toybox.surfaces import FAR as FAR
from shared.toybox.surfaces import SPACING, HitImage, halved, near_depth
from shared.toybox.world import Scene

_CHUNK = 32
# Shadows fall only below the horizon, except on these backgrounds, where they fall everywhere.
_ALL_FLOOR = ("brick wall", "white studio", "gray studio", "black studio", "blue studio")


@dataclass(frozen=True)
class Rendered:
    """B rendered pictures of H×W pixels, with their ground truth.

    pixels: [B, 3, H, W] in [0, 1]
    mask: [B, 1, H, W], the share of each pixel that things cover
    thing_mask: int64 [B, H, W]; 0 is the background, 1 the first thing, 2 the second thing
    depth: [B, 1, H, W], the distance from the camera in radii of the thing; 10 in the background
    position: [B, 3, H, W] in the thing's object space (unit sphere, x forward, y left, z up); 0 in the background

    All fields except `pixels` are the same as for a photo, whatever the style. A style may colour pixels slightly
    outside the mask, or leave pixels inside it as background. For example, a watercolour runs and a neon drawing glows.
    Pixel art is 3% larger than the photo, because its 3-pixel squares do not fit evenly into 64 pixels. This shifts
    the picture by up to two pixels near the right and bottom edges.
    """

    pixels: Tensor
    mask: Tensor
    thing_mask: Tensor
    depth: Tensor
    position: Tensor


def render(scenes: Sequence[Scene], size: int = 64, device: str | torch.device = "cpu") -> Rendered:
    """Renders scenes as pictures of size×size pixels. On a CPU, the result is reproducible bit for bit.

    Raises:
        ValueError: if there are no scenes
    """
    if not scenes:
        raise ValueError("nothing to draw: pass at least one scene")
    where = torch.device(device)
    drawn = [_chunk(list(scenes[i : i + _CHUNK]), size, where) for i in range(0, len(scenes), _CHUNK)]
    return Rendered(*(torch.cat([getattr(chunk, field.name) for chunk in drawn]) for field in fields(Rendered)))


@torch.no_grad()
def _chunk(scenes: list[Scene], size: int, device: torch.device) -> Rendered:
    things = instances(scenes, device)
    hits = visible(things, groups(things, SPACING * 64 / size, device), len(scenes), 2 * size)
    return painted(scenes, things, hits, size)


def painted(scenes: list[Scene], things: Instances, hits: Hits, size: int) -> Rendered:
    """Paints scenes from their placed things and the visible hits on those things. The hits are on a grid of
    2 size × 2 size subpixels."""
    fine, device = 2 * size, things.axes.device
    draws = [np.random.default_rng([scene.seed, 11]) for scene in scenes]
    numbers = torch.tensor(np.stack([d.random(48) for d in draws]), dtype=torch.float32).to(device)
    grids = torch.tensor(np.stack([d.uniform(-1, 1, (4, 8, 8)) for d in draws]), dtype=torch.float32).to(device)
    picture = _backgrounds(scenes, things, numbers, grids, fine)
    picture = picture.permute(0, 2, 3, 1).reshape(-1, 3)
    picture[hits.at] = _shade(hits, things, numbers)
    picture = picture.view(len(scenes), fine, fine, 3).permute(0, 3, 1, 2)

    seen = HitImage(hits, len(scenes), fine)
    mask = seen.scatter(torch.ones_like(hits.depth[:, None]))
    which = seen.scatter(things.which[hits.who][:, None] + 1.0)
    depth, position = seen.depth(), seen.scatter(hits.position)
    styled = _styled(
        scenes, picture, mask, depth, lambda: seen.scatter(turned(things.axes, hits.who, hits.normal)), numbers
    )
    cover = halved(mask)
    first = halved((which == 1).float())
    thing = torch.where(cover >= 0.5, torch.where(first * 2 >= cover, 1, 2), 0)[:, 0]
    weight = cover.clamp_min(1e-6)
    return Rendered(
        halved(styled).clamp(0, 1),
        cover,
        thing,
        near_depth(depth, mask),
        halved(position) / weight,
    )


@lru_cache(maxsize=8)
def _stretch(points: int, size: int, device: torch.device) -> Tensor:
    """Returns the matrix [size, points] that interpolates `points` values bicubically to `size` values."""
    basis = torch.eye(points)[None, None]
    return F.interpolate(basis, (size, points), mode="bicubic", align_corners=True)[0, 0].to(device)


def _panned(stretch: Tensor, by: Tensor) -> Tensor:
    """Shifts an interpolation matrix [size, points] to the right by `by` pixels ([B]). Returns [B, size, points].

    The background is mirrored at its borders.
    """
    last = len(stretch) - 1
    at = torch.arange(last + 1, device=by.device) - by[:, None]
    at = last - (last - at % (2 * last)).abs()
    low = at.long().clamp(max=last - 1)
    part = (at - low)[..., None]
    return stretch[low] * (1 - part) + stretch[low + 1] * part


def _backgrounds(scenes: list[Scene], things: Instances, numbers: Tensor, grids: Tensor, fine: int) -> Tensor:
    """Paints the panned backgrounds with the things' shadows. Returns [B, 3, S, S]."""
    device = numbers.device
    step = (torch.arange(fine, device=device) + 0.5) / fine
    y, x = (g[None] for g in torch.meshgrid(step, step, indexing="ij"))
    elevation = torch.tensor([s.cameras[0].elevation_deg for s in scenes], device=device)
    horizon = 0.5 + 0.1 * (numbers[:, 0] - 0.5) - 0.3 * (elevation / 60).clamp(-0.15, 1)
    horizon = horizon.clamp_min(0.18)[:, None, None]
    names = [s.background for s in scenes]
    stretch = _stretch(grids.shape[-1], fine, device)
    panned = any(s.pan for s in scenes)
    pan = torch.tensor([s.pan for s in scenes], device=device)
    picture = torch.empty((len(scenes), 3, fine, fine), device=device)
    for name in dict.fromkeys(names):
        members = torch.tensor([i for i, other in enumerate(names) if other == name], device=device)
        across = _panned(stretch, pan[members] * fine)[:, None] if panned else stretch
        noise = stretch @ grids[members] @ across.mT
        here = x - pan[members, None, None] if panned else x
        picture[members] = PAINTERS[name](Canvas(here, y, horizon[members], numbers[members], noise)).clamp(0, 1)
    everywhere = torch.tensor([name in _ALL_FLOOR for name in names], device=device)[:, None, None]
    floor = torch.where(everywhere, 1.0, ((y - horizon - 0.02) / 0.05).clamp(0, 1))
    dark = torch.zeros((len(scenes), fine, fine), device=device)
    shadow = _shadow(things, x, y)
    for which in (0, 1):
        members = (things.which == which).nonzero()[:, 0]
        dark[things.scene[members]] = torch.maximum(dark[things.scene[members]], shadow[members])
    return picture * (1 - (floor * dark)[:, None])


def _shadow(things: Instances, x: Tensor, y: Tensor) -> Tensor:
    """Returns the contact shadows, which are the fractions [I, S, S] by which each thing darkens the ground under
    it."""
    cx, cy, scale, cos, sin = (v[:, None, None] for v in things.place.unbind(1))
    right, up, toward = things.axes.unbind(1)
    u, v = (x - cx) / (FILL * scale), (y - cy) / (FILL * scale)
    u, v = u * cos + v * sin, v * cos - u * sin
    low, length, width = (g[:, None, None] for g in things.ground.unbind(1))
    steep = toward[:, 2, None, None].clamp_min(0.17)
    # The point of the ground plane that is seen at (u, v) lies a distance `ahead` towards the viewer and u along
    # `right`.
    ahead = (v + up[:, 2, None, None] * low) / steep
    # The ground has two axes. One is (right_x, right_y), and the other, towards the viewer, is the first turned by -90
    # degrees.
    px = right[:, 0, None, None] * u + right[:, 1, None, None] * ahead
    py = right[:, 1, None, None] * u - right[:, 0, None, None] * ahead
    far = ((px / (1.1 * length + 0.1)) ** 2 + (py / (1.1 * width + 0.1)) ** 2).sqrt()
    return 0.5 * (1.25 - far).clamp(0, 0.6) / 0.6


def _shade(hits: Hits, things: Instances, numbers: Tensor) -> Tensor:
    """Computes the hits' colours [M, 3] from the patterned albedo, a light beside the camera, a light from above and a
    sheen."""
    slots = things.colors.shape[1]
    albedo = things.colors.flatten(0, 1).index_select(0, hits.who * slots + hits.slot)
    body = (hits.slot == SLOTS["main"]).nonzero()[:, 0]
    albedo[body] = patterns.paint(albedo[body], hits.canonical[body], hits.who[body], things.patterns)
    u = numbers[things.scene, 40:43].index_select(0, hits.who)
    side, height = -0.45 + 0.5 * (u[:, 0] - 0.5), 0.55 + 0.3 * (u[:, 1] - 0.5)
    light = F.normalize(torch.stack([side, height, torch.full_like(side, 0.75)], 1), dim=1)
    normal = turned(things.axes, hits.who, hits.normal)
    lambert = (normal * light).sum(1).clamp_min(0)
    above = 0.5 + 0.5 * hits.normal[:, 2]
    strength = 0.95 + 0.14 * (u[:, 2] - 0.5)
    shade = (0.44 + 0.14 * above + 0.52 * lambert) * strength
    half = F.normalize(light + light.new_tensor([0.0, 0.0, 1.0]), dim=1)
    sheen = 0.2 * (normal * half).sum(1).clamp_min(0) ** 24
    # A little light at grazing angles sets black things off from dark backgrounds.
    rim = 0.1 * (1 - normal[:, 2].clamp(0, 1)) ** 3 * above
    return (albedo * shade[:, None] + (sheen + rim)[:, None]).clamp(0, 1)


def _styled(
    scenes: list[Scene],
    picture: Tensor,
    mask: Tensor,
    depth: Tensor,
    normals: Callable[[], Tensor],
    numbers: Tensor,
) -> Tensor:
    """Draws each picture in the style of its scene. Normals are computed only if some scene is not a photo."""
    names = [s.style for s in scenes]
    if all(name == "photo" for name in names):
        return picture
    normal, picture = normals(), picture.clone()
    for name in dict.fromkeys(names):
        if name != "photo":
            members = torch.tensor([i for i, other in enumerate(names) if other == name], device=picture.device)
            sheet = styles.Sheet(picture[members], mask[members], depth[members], normal[members], numbers[members])
            picture[members] = styles.draw(name, sheet)
    return picture
