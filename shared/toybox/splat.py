"""Splats the surface points of things onto pictures. The points are projected, and the visible ones are looked up.

Pictures here have S×S subpixels, where S is twice the final size. `render` averages the subpixels of each pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.toybox import accessories, faces, patterns
from shared.toybox.part_colors import DETAILS, SLOTS
from shared.toybox.parts import Anchors
from shared.toybox.patterns import PatternTable
from shared.toybox.shapes import cloud
from shared.toybox.world import RGB, Scene, Thing

DISTANCE = 5.0  # from the camera to a thing, in radii of the thing; this gives a mild perspective
FILL = 0.46  # the radius of a thing at scale 1, as a fraction of the picture


@dataclass(frozen=True)
class Instances:
    """The I things in B scenes.

    scene: [I], the index of the thing's scene
    which: [I], 0 for a scene's first thing, 1 for its second
    axes: [I, 3, 3]; the rows point right, up, and towards the camera
    place: [I, 5], x and y of the centre in [0, 1], the scale, and the cosine and sine of the roll
    colors: [I, slots, 3]
    rank: [I], 0 for the thing in front
    ground: [I, 3], the z coordinate of the ground, and half the length and half the width of the thing's footprint
    """

    things: list[Thing]
    scene: Tensor
    which: Tensor
    axes: Tensor
    place: Tensor
    colors: Tensor
    rank: Tensor
    ground: Tensor
    patterns: PatternTable


@dataclass(frozen=True)
class Group:
    """k instances that share a cloud of N points.

    who: [k], the indices of the instances
    points, normals: [k, N, 3], or [1, N, 3] if they are the same for all instances
    slots: [N]
    """

    who: Tensor
    points: Tensor
    normals: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Hits:
    """The M subpixels that show a thing.

    at: [M], the flat index, which is scene * S * S + pixel
    who: [M], the index of the thing
    canonical, position: [M, 3], the position of the visible point before and after the thing's proportions are applied
    normal: [M, 3], the normal after the proportions are applied
    slot: [M], the colour slot
    depth: [M], the distance from the camera in radii
    """

    at: Tensor
    who: Tensor
    canonical: Tensor
    position: Tensor
    normal: Tensor
    slot: Tensor
    depth: Tensor


def instances(scenes: list[Scene], device: torch.device) -> Instances:
    """Collects the scenes' things and cameras as tensors."""
    things, values, colors = [], [], []
    base = np.array(list(DETAILS.values()))
    for b, scene in enumerate(scenes):
        lower = [camera.y + 0.3 * camera.scale for camera in scene.cameras]
        for j, (thing, camera) in enumerate(zip(scene.things, scene.cameras, strict=True)):
            az, el, roll = np.radians([camera.azimuth_deg, camera.elevation_deg, camera.roll_deg])
            axes = [
                -np.sin(az),
                np.cos(az),
                0,
                -np.cos(az) * np.sin(el),
                -np.sin(az) * np.sin(el),
                np.cos(el),
                np.cos(az) * np.cos(el),
                np.sin(az) * np.cos(el),
                np.sin(el),
            ]
            spot = [0.5 + camera.x, 0.5 + camera.y, camera.scale, np.cos(roll), np.sin(roll)]
            if thing.class_name == "face":
                ground = [faces.BOTTOM, *faces.FOOT]
            else:
                shape = cloud(thing.class_name, 0.02)
                ground = [shape.bottom, *shape.foot]
            values.append([b, j, sum(other > lower[j] for other in lower), *axes, *spot, *ground])
            palette = base.copy()
            palette[SLOTS["main"]], palette[SLOTS["second"]] = RGB[thing.main], RGB[thing.second]
            palette[SLOTS["brow"]] = np.array(RGB[thing.main]) * 0.6 + 0.02
            colors.append(palette)
            things.append(thing)
    data = torch.tensor(np.array(values), dtype=torch.float32).to(device)
    return Instances(
        things,
        data[:, 0].long(),
        data[:, 1].long(),
        data[:, 3:12].view(-1, 3, 3),
        data[:, 12:17],
        torch.tensor(np.array(colors), dtype=torch.float32).to(device),
        data[:, 2].long(),
        data[:, 17:20],
        patterns.table(things, device),
    )


def groups(things: Instances, spacing: float, device: torch.device) -> list[Group]:
    """Groups the instances by cloud. Also writes the colours that depend on a face's identity into `things`."""
    result = []
    by_class: dict[str, list[int]] = {}
    worn: dict[str, list[int]] = {}
    for i, thing in enumerate(things.things):
        by_class.setdefault(thing.class_name, []).append(i)
        if thing.accessory != "none":
            worn.setdefault(thing.accessory, []).append(i)
    for name, members in by_class.items():
        who = torch.tensor(members, device=device)
        if name == "face":
            made = faces.faces(np.array([things.things[i].identity for i in members]), spacing, device)
            for slot, color in made.colors.items():
                things.colors[who, SLOTS[slot]] = color
            result.append(Group(who, made.points, made.normals, made.slots))
        else:
            shape = cloud(name, spacing)
            arrays = (shape.points, shape.normals, shape.slots)
            points, normals, slots = (torch.from_numpy(a).to(device) for a in arrays)
            result.append(Group(who, points[None], normals[None], slots))
    for name, members in worn.items():
        points, normals, slots = (torch.from_numpy(a).to(device) for a in accessories.accessory(name, spacing))
        fits = np.array([accessories.fit(name, _anchors(things.things[i])) for i in members])
        scale, shift = torch.tensor(fits, dtype=torch.float32).to(device).unbind(1)
        placed = points * scale[:, None] + shift[:, None]
        bent = torch.nn.functional.normalize(normals / scale[:, None], dim=-1)
        result.append(Group(torch.tensor(members, device=device), placed, bent, slots))
    return result


def _anchors(thing: Thing) -> Anchors:
    return faces.ANCHORS if thing.class_name == "face" else cloud(thing.class_name, 0.02).anchors


def proportion(points: Tensor, shape: Tensor) -> Tensor:
    """Applies the things' proportions to points [..., 3]. `shape` ([..., 4]) contains factors for x, y and z, and a
    taper along z."""
    out = points * shape[..., :3]
    out[..., :2] *= 1 + shape[..., 3:] * points[..., 2:]
    return out


def turned(matrices: Tensor, who: Tensor, vectors: Tensor) -> Tensor:
    """Multiplies each vector [M, 3] by the matrix [I, 3, 3] of its instance [M]."""
    entries = matrices.flatten(1).index_select(0, who)
    a, b, c = vectors.unbind(1)
    return torch.stack([entries[:, k] * a + entries[:, k + 1] * b + entries[:, k + 2] * c for k in (0, 3, 6)], 1)


def projected(view: Tensor, place: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projects points onto a picture of size×size pixels. Returns their columns, rows and depths. Column 0 and row 0
    are at the centre of the first pixel.

    view: [..., 3], the points' coordinates to the right, up and towards the camera, in radii of the thing
    place: [..., 5] as in `Instances`
    """
    x, y, scale, cos, sin = place.unbind(-1)
    depth = DISTANCE - view[..., 2]
    zoom = (FILL * DISTANCE * size) * scale / depth
    right, down = view[..., 0] * zoom, view[..., 1] * -zoom
    return right * cos - down * sin + (x * size - 0.5), right * sin + down * cos + (y * size - 0.5), depth


def _project(group: Group, things: Instances, size: int) -> tuple[Tensor, Tensor]:
    """Returns the index of the subpixel at the top left of each point's 2×2 footprint (-1 if it is outside the
    picture), and the point's depth, both [k, N]."""
    who = group.who
    shape = things.patterns.proportions[who]
    points = group.points.expand(len(who), -1, -1)
    if (shape != shape.new_tensor([1.0, 1, 1, 0])).any():
        points = proportion(points, shape[:, None])
    view = torch.bmm(points, things.axes[who].transpose(1, 2))
    u, v, depth = projected(view, things.place[who][:, None], size)
    u, v = u.floor(), v.floor()
    outside = (u < 0) | (u > size - 1) | (v < 0) | (v > size - 1)
    return torch.where(outside, -1.0, v * size + u).long(), depth


def visible(things: Instances, parts: list[Group], count: int, size: int) -> Hits:
    """Finds the nearest point at each of the count × size × size subpixels."""
    area = size * size
    empty = torch.iinfo(torch.int64).max
    device = things.axes.device
    # One extra cell collects the points that fall outside the picture.
    nearest = torch.full((count * area + 1,), empty, dtype=torch.int64, device=device)
    start, starts = 0, []
    for group in parts:
        pixel, depth = _project(group, things, size)
        k, n = pixel.shape
        # A key sorts by the rank of the thing (the front thing first), then by depth, then by point number. The minimum
        # is therefore unique.
        rank = things.rank[group.who][:, None]
        near = (depth.clamp(2, 9) * (2**20 / 10)).long() + (rank << 21)
        key = (near << 32) | torch.arange(start, start + k * n, device=device).view(k, n)
        cell = torch.where(pixel < 0, count * area, things.scene[group.who][:, None] * area + pixel)
        nearest.scatter_reduce_(0, cell.flatten(), key.flatten(), "amin")
        starts.append(start)
        start += k * n
    nearest = nearest[:-1].view(count, size, size)
    # Each point covers 2×2 subpixels, so each subpixel takes the minimum over itself and its upper and left neighbours.
    nearest[:, 1:] = torch.minimum(nearest[:, 1:], nearest[:, :-1].clone())
    nearest[:, :, 1:] = torch.minimum(nearest[:, :, 1:], nearest[:, :, :-1].clone())
    nearest = _closed(nearest).flatten()
    at = (nearest != empty).nonzero()[:, 0]
    return _look_up(things, parts, starts, at, nearest[at])


def _closed(nearest: Tensor) -> Tensor:
    """Closes one-subpixel holes in the keys [B, S, S]. A subpixel is a hole if both of its neighbours in the row, or
    both in the column, are clearly nearer."""
    far = torch.maximum
    inner = nearest[:, 1:-1, 1:-1]
    around = torch.minimum(
        far(nearest[:, 1:-1, :-2], nearest[:, 1:-1, 2:]), far(nearest[:, :-2, 1:-1], nearest[:, 2:, 1:-1])
    )
    hole = around < inner - (int(0.12 * 2**20 / 10) << 32)
    nearest[:, 1:-1, 1:-1] = torch.where(hole, around, inner)
    return nearest


def _look_up(things: Instances, parts: list[Group], starts: list[int], at: Tensor, key: Tensor) -> Hits:
    """Looks up the point behind each subpixel in `at` by its key."""
    number = key & 0xFFFFFFFF
    m = len(at)
    canonical, normal = at.new_zeros((m, 3), dtype=torch.float32), at.new_zeros((m, 3), dtype=torch.float32)
    who, slot = torch.zeros_like(at), torch.zeros_like(at)
    bounds = torch.tensor(starts, device=at.device)
    which = torch.bucketize(number, bounds, right=True) - 1
    for index, group in enumerate(parts):
        mine = (which == index).nonzero()[:, 0]
        local = number[mine] - starts[index]
        n = group.points.shape[1]
        member, point = local // n, local % n
        row = local if len(group.points) > 1 else point
        canonical[mine] = group.points.flatten(0, 1).index_select(0, row)
        normal[mine] = group.normals.flatten(0, 1).index_select(0, row)
        who[mine], slot[mine] = group.who.index_select(0, member), group.slots.index_select(0, point)
    shape = things.patterns.proportions.index_select(0, who)
    bent = torch.nn.functional.normalize(normal / shape[:, :3], dim=1)
    position = proportion(canonical, shape)
    depth = DISTANCE - (position * things.axes[:, 2].index_select(0, who)).sum(1)
    return Hits(at, who, canonical, position, bent, slot, depth)
