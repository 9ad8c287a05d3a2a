"""Provides training pictures for the evaluators. The identity encoder is trained on things rendered from many views.
The other evaluators are trained on the backbone's data set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from shared.pretrain.evaluators.augment import from_bytes, to_bytes
from shared.pretrain.toybox import dataset
from shared.toybox import patterns, world
from shared.toybox.evaluators.convnet import write_json
from shared.toybox.render import render

RECONSTRUCTED = 0.7  # probability that a picture is replaced by its reconstruction, if it has one
VIEWS_PER_THING = 4  # maximum number of views of a thing in a batch


@dataclass(frozen=True)
class Pictures:
    """The pictures of a data set, with their masks, labels and captions.

    pixels: uint8 `[N, 64, 64, 3]`
    packed: uint8 `[N, 64, 8]`, the masks, packed at 8 pixels per byte
    labels: for each attribute, int64 `[N]`, the indices into its `values`, or -1 where the attribute is undefined
    captions: the captions of each picture
    values: for each attribute, the names of its values
    reconstructions: uint8 `[M, 64, 64, 3]`, the first M pictures, encoded and decoded by the VAE
    """

    pixels: np.ndarray
    packed: np.ndarray
    labels: dict[str, np.ndarray]
    captions: Sequence[Sequence[str]]
    values: dict[str, tuple[str, ...]]
    reconstructions: np.ndarray | None = None

    @classmethod
    def load(cls, folder: Path, reconstructions: Path | None = None) -> Pictures:
        """Reads the finished chunks of a data set from a folder written by `shared.pretrain.toybox.dataset`.

        reconstructions: an .npy file with the first pictures of the data set, encoded and decoded by the VAE
        """
        stems = [path.name.removesuffix(".captions.jsonl") for path in sorted(folder.glob("chunk-*.captions.jsonl"))]
        if not stems:
            raise ValueError(
                f"{folder} contains no finished chunks of a toybox data set; build one with `pcs toybox train data`"
            )
        pixels = np.concatenate([np.load(folder / f"{stem}.pixels.npy", mmap_mode="r") for stem in stems])
        packed = np.concatenate([np.load(folder / f"{stem}.masks.npy") for stem in stems])
        table = np.concatenate([np.load(folder / f"{stem}.labels.npy") for stem in stems])
        captions = [
            json.loads(line)
            for stem in stems
            for line in (folder / f"{stem}.captions.jsonl").read_text("utf-8").splitlines()
        ]
        labels = labels_of({name: table[:, k] for k, name in enumerate(dataset.LABELS)})
        return cls(pixels, packed, labels, captions, attribute_values(), _open(reconstructions))

    def draw(self, generator: Generator, count: int) -> tuple[np.ndarray, Tensor]:
        """Draws random rows. Returns their indices (`[count]`) and their pictures (`[count, 3, 64, 64]` in [0, 1])."""
        rows = _often_reconstructed(
            torch.randint(len(self.pixels), (count,), generator=generator), self.reconstructions, 1
        )
        rows = rows.numpy()
        return rows, _read(self.pixels, self.reconstructions, rows, generator)

    def masks(self, rows: np.ndarray) -> Tensor:
        """Returns the masks of the things in the pictures of `rows`, as float `[n, 1, 64, 64]` with values 0 and 1."""
        return torch.from_numpy(np.unpackbits(self.packed[rows], axis=-1)).float()[:, None]

    def draw_captions(self, rows: np.ndarray, generator: Generator) -> list[str]:
        """Draws one caption for each row."""
        draws = torch.randint(1 << 30, (len(rows),), generator=generator).tolist()
        return [
            str(self.captions[row][draw % len(self.captions[row])])
            for row, draw in zip(rows.tolist(), draws, strict=True)
        ]


@dataclass(frozen=True)
class IdentityPictures:
    """Pictures of groups of things that share a class and palette but differ in pattern or, if they are faces, in
    identity.

    pixels: uint8 `[groups, things, views, 64, 64, 3]`
    kinds: int64 `[groups * things]`, the kind of each thing's pattern, or -1 for faces
    numbers: float32 `[groups * things, K]`, the remaining parameters of the pattern or face, as returned by
        `individual`
    reconstructions: uint8 `[M, 64, 64, 3]`, the first M pictures, encoded and decoded by the VAE
    """

    pixels: np.ndarray
    kinds: np.ndarray
    numbers: np.ndarray
    reconstructions: np.ndarray | None = None

    @classmethod
    def load(cls, folder: Path, reconstructions: Path | None = None) -> IdentityPictures:
        """Reads the pictures that `build_identity` has finished so far."""
        facts = json.loads((folder / "identity.json").read_text("utf-8"))
        things = [
            scenes[0].things[0]
            for group in range(facts["done"])
            for scenes in sample_group(
                np.random.default_rng([facts["seed"], 11, group]), facts["things"], facts["views"]
            )
        ]
        kinds, numbers = zip(*(individual(thing) for thing in things), strict=True)
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")[: facts["done"]]
        return cls(pixels, np.array(kinds), np.array(numbers, np.float32), _open(reconstructions))

    def draw(self, generator: Generator, count: int) -> Drawn:
        """Draws about `count` pictures in complete groups, and applies `vary` to each group."""
        total, things, views = self.pixels.shape[:3]
        shown = min(VIEWS_PER_THING, views)
        groups = max(1, count // (things * shown))
        chosen = torch.randint(total, (groups,), generator=generator)
        chosen = _often_reconstructed(chosen, self.reconstructions, things * views)
        order = torch.rand(groups, things, views, generator=generator).argsort(-1)[..., :shown]
        rows = (chosen[:, None, None] * things + torch.arange(things)[None, :, None]) * views + order
        flat = self.pixels.reshape(-1, *self.pixels.shape[3:])
        labels = (chosen[:, None] * things + torch.arange(things)[None]).repeat_interleave(shown, 1).flatten()
        pixels = _read(flat, self.reconstructions, rows.flatten().numpy(), generator)
        faces = torch.from_numpy(self.kinds[labels.numpy()] < 0).reshape(groups, -1)[:, 0]
        varied, channels = vary(pixels, groups, faces, generator)
        return Drawn(labels, groups, varied, channels.repeat_interleave(len(labels) // groups, 0))


@dataclass(frozen=True)
class Drawn:
    """A batch for the identity encoder.

    labels: `[B]`, the index of the thing in each picture
    groups: the number of groups. Each group consists of the same number of consecutive rows
    pixels: `[B, 3, 64, 64]` in [0, 1]
    channels: `[B, 3]`, the rendered channel from which each colour channel was taken
    """

    labels: Tensor
    groups: int
    pixels: Tensor
    channels: Tensor


def vary(pixels: Tensor, groups: int, faces: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Turns rendered things into new things. Each group of pictures is mirrored with a probability of one half. Unless
    it shows faces, its colour channels are also permuted with a probability of one half.

    The things within a group still differ from each other as before. Without this variation, the encoder would memorise
    the few thousand rendered things. Faces keep their colours, which are part of their identity.

    Args:
        pixels: `[groups * n, 3, H, W]`
        faces: bool `[groups]`, whether a group shows faces

    Returns:
        the pictures, and the index of the rendered channel from which each colour channel was taken, `[groups, 3]`
    """
    kept = torch.arange(3).expand(groups, 3)
    mixed = torch.rand(groups, 3, generator=generator).argsort(1)
    plain = faces | (torch.rand(groups, generator=generator) < 0.5)
    channels = torch.where(plain[:, None], kept, mixed)
    mirrored = torch.rand(groups, generator=generator) < 0.5
    done = [
        (group.flip(3) if flip else group)[:, order]
        for group, order, flip in zip(pixels.chunk(groups), channels, mirrored.tolist(), strict=True)
    ]
    return torch.cat(done), channels


def individual(thing: world.Thing) -> tuple[int, list[float]]:
    """Describes what distinguishes a thing from others of its class and palette.

    Returns:
        the kind of its pattern (-1 for a face), and 27 numbers. The first 11 numbers describe the pattern's two accent
        colours, its coverage (centred) and its proportions. The other 16 are a face's identity vector. Numbers that do
        not apply are NaN.
    """
    if thing.identity is not None:
        return -1, [float("nan")] * 11 + list(thing.identity)
    assert thing.pattern_seed is not None
    pattern, (first, second) = patterns.pattern(thing.pattern_seed), patterns.accents(thing)
    shape = [8 * (value - 1) for value in pattern.proportions[:3]] + [8 * pattern.proportions[3]]
    colors = [2 * value - 1 for value in (*first, *(second if pattern.two else first))]
    return patterns.KINDS.index(pattern.kind), [*colors, 10 * (pattern.coverage - 0.39), *shape] + [float("nan")] * 16


def accents_as_shown(numbers: Tensor, channels: Tensor) -> Tensor:
    """Permutes the accent colours in `numbers` (`[B, K]`, see `individual`) by `channels` (`[B, 3]`, as returned by
    `vary`)."""
    first, second = numbers[:, :3].gather(1, channels), numbers[:, 3:6].gather(1, channels)
    return torch.cat([first, second, numbers[:, 6:]], 1)


def attribute_values() -> dict[str, tuple[str, ...]]:
    """Returns the names of each attribute's values. The labels are indices into these names."""
    return {
        "class": world.CLASSES,
        "main": world.COLORS,
        "second": world.COLORS,
        "background": world.BACKGROUNDS,
        "view": world.VIEWS,
        "accessory": world.ACCESSORIES,
        "style": world.STYLES,
    }


def labels_of(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts the label columns of a data set to training targets (`[N]` for each attribute).

    A view without a clear name is undefined (-1). In pictures of two things, only background and style are defined.
    """
    labels = {name: columns[name].astype(np.int64).copy() for name in attribute_values()}
    for name, values in labels.items():
        if name not in ("background", "style"):
            values[columns["two_objects"] > 0] = -1
    labels["view"][columns["view_is_clear"] == 0] = -1
    return labels


def build_identity(folder: Path, groups: int = 1500, things: int = 4, views: int = 8, seed: int = 0) -> None:
    """Renders the identity encoder's training pictures into `folder`. Finished pictures can be read while others are
    still being rendered. If a build was interrupted, the next call resumes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts_path, path = folder / "identity.json", folder / "pixels.npy"
    shape = (groups, things, views, 64, 64, 3)
    done = json.loads(facts_path.read_text("utf-8"))["done"] if facts_path.is_file() else 0
    pixels = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=np.uint8, shape=None if done else shape)
    if pixels.shape != shape:
        raise ValueError(
            f"{path} has shape {pixels.shape}, not {shape}; use the same sizes as before, or another folder"
        )
    for group in range(done, groups):
        scenes = [
            scene for thing in sample_group(np.random.default_rng([seed, 11, group]), things, views) for scene in thing
        ]
        pixels[group] = to_bytes(render(scenes).pixels).reshape(shape[1:])
        if (group + 1) % 10 == 0 or group + 1 == groups:
            pixels.flush()
            write_json(
                facts_path, {"done": group + 1, "groups": groups, "things": things, "views": views, "seed": seed}
            )


def sample_group(rng: np.random.Generator, things: int, views: int, split: str = "train") -> list[list[world.Scene]]:
    """Samples a group of things, and returns a list of `views` scenes for each thing. The things share a class and
    palette but differ in pattern or, if they are faces, in identity."""
    first = world.sample_thing(rng, split, pattern=True, accessory="none")
    fixed = {"class_name": first.class_name, "main": first.main, "second": first.second, "pattern": True}
    scenes = []
    for _ in range(things):
        thing = world.sample_thing(rng, split, **fixed, accessory="none")
        keep = {**fixed, "pattern_seed": thing.pattern_seed, "identity": thing.identity, "two": False}
        scenes.append([world.sample_scene(rng, split, **keep) for _ in range(views)])
    return scenes


def _open(path: Path | None) -> np.ndarray | None:
    return None if path is None else np.load(path, mmap_mode="r")


def _often_reconstructed(rows: Tensor, reconstructions: np.ndarray | None, size: int) -> Tensor:
    """Replaces every second row with a row that has reconstructions, because such rows may be rare. A row consists of
    `size` pictures."""
    if reconstructions is None:
        return rows
    return torch.where(torch.arange(len(rows)) % 2 == 0, rows, rows % max(1, len(reconstructions) // size))


def _read(pixels: np.ndarray, reconstructions: np.ndarray | None, rows: np.ndarray, generator: Generator) -> Tensor:
    """Reads the pictures of `rows`, replacing some of them with their VAE reconstructions."""
    found = pixels[rows]
    through = torch.rand(len(rows), generator=generator).numpy() < RECONSTRUCTED
    if reconstructions is not None:
        at = np.flatnonzero(through & (rows < len(reconstructions)))
        found[at] = reconstructions[rows[at]]
    return from_bytes(found)


def main() -> None:
    """Renders the identity encoder's training pictures into a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--groups", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    build_identity(given.folder, groups=given.groups, seed=given.seed)


if __name__ == "__main__":
    main()
