"""Stores training pictures on disk. They are rendered once, in chunks, and read as memory maps.

    FOLDER/recipe.json                                                      the settings of the data set
    FOLDER/chunk-00000.{pixels,masks,labels,identity}.npy, .captions.jsonl  one chunk, complete if its captions exist

An existing data set cannot be built again with different settings. Picture i depends only on i and the data set's seed.
Therefore, an interrupted build can be resumed, and the number of workers does not affect the result.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.toybox.captions import caption
from shared.toybox.render import render
from shared.toybox.world import (
    ACCESSORIES,
    BACKGROUNDS,
    CLASSES,
    COLORS,
    IDENTITY_SIZE,
    STYLES,
    VIEWS,
    Scene,
    sample_scene,
)

CHUNK = 1000
VARIANTS = 4
VERSION = 1
LABELS = (
    "class",
    "main",
    "second",
    "background",
    "view",
    "view_is_clear",
    "accessory",
    "style",
    "pattern_seed",
    "two_objects",
    "other_class",
    "other_main",
    "other_second",
)


@dataclass(frozen=True)
class Dataset:
    """A data set of N pictures.

    captions: N lists of 4 captions
    labels: for each name, int64 [N]. Most labels are indices into the vocabularies of `world`. `view_is_clear` and
        `two_objects` are 0 or 1. `pattern_seed` is a seed, or -1 if there is no pattern. The `other_*` labels describe
        the second thing, or are -1 if there is only one thing.
    identity: float32 [N, IDENTITY_SIZE], NaN except for faces
    """

    folder: Path
    chunks: tuple[np.ndarray, ...]
    mask_chunks: tuple[np.ndarray, ...]
    captions: list[list[str]]
    labels: dict[str, np.ndarray]
    identity: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)

    def pixels(self, index: np.ndarray | list[int] | slice) -> np.ndarray:
        """Returns the n pictures selected by `index`, as uint8 [n, 64, 64, 3]."""
        return self._take(self.chunks, index)

    def masks(self, index: np.ndarray | list[int] | slice) -> np.ndarray:
        """Returns the masks of the things in the n pictures selected by `index`, as bool [n, 64, 64]."""
        packed = self._take(self.mask_chunks, index)
        return np.unpackbits(packed, axis=-1).astype(bool)

    def _take(self, chunks: tuple[np.ndarray, ...], index: np.ndarray | list[int] | slice) -> np.ndarray:
        rows = np.arange(len(self))[index] if isinstance(index, slice) else np.asarray(index)
        out = np.empty((len(rows), *chunks[0].shape[1:]), chunks[0].dtype)
        for chunk in np.unique(rows // CHUNK):
            at = rows // CHUNK == chunk
            out[at] = chunks[chunk][rows[at] % CHUNK]
        return out


def labels_of(scene: Scene) -> list[int]:
    """Returns the labels of a scene in the order of LABELS."""
    first, other = scene.things[0], scene.things[1] if len(scene.things) == 2 else None
    beside = (-1, -1, -1)
    if other:
        beside = (CLASSES.index(other.class_name), COLORS.index(other.main), COLORS.index(other.second))
    return [
        CLASSES.index(first.class_name),
        COLORS.index(first.main),
        COLORS.index(first.second),
        BACKGROUNDS.index(scene.background),
        VIEWS.index(scene.view),
        int(scene.cameras[0].view_is_clear),
        ACCESSORIES.index(first.accessory),
        STYLES.index(scene.style),
        -1 if first.pattern_seed is None else first.pattern_seed,
        int(other is not None),
        *beside,
    ]


def scene_of(seed: int, index: int) -> tuple[Scene, np.random.Generator]:
    """Samples the scene of picture `index` in the data set with the given seed. Also returns the generator for the
    picture's captions."""
    rng = np.random.default_rng([seed, index])
    return sample_scene(rng), rng


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Writes a file under a temporary name and then renames it, so that a file with the final name is always
    complete."""
    part = path.with_name(path.name + ".part")
    save(part)
    os.replace(part, path)


def save_text(path: Path, content: str) -> None:
    """Writes a text file atomically."""

    def save(part: Path) -> None:
        part.write_text(content, encoding="utf-8")

    _write(path, save)


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as an .npy file atomically."""

    def save(part: Path) -> None:
        with open(part, "wb") as file:
            np.save(file, array)

    _write(path, save)


def _chunk(folder: Path, seed: int, number: int, n: int) -> None:
    """Renders one chunk unless it is already complete. The captions are written last and mark it as complete."""
    stem = folder / f"chunk-{number:05d}"
    done = stem.with_suffix(".captions.jsonl")
    if done.exists():
        return
    torch.set_num_threads(1)
    pairs = [scene_of(seed, number * CHUNK + i) for i in range(n)]
    scenes = [scene for scene, _ in pairs]
    drawn = render(scenes)
    pixels = (drawn.pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    identity = np.full((n, IDENTITY_SIZE), np.nan, np.float32)
    for i, scene in enumerate(scenes):
        if scene.things[0].identity is not None:
            identity[i] = scene.things[0].identity
    save_array(stem.with_suffix(".pixels.npy"), np.ascontiguousarray(pixels))
    save_array(stem.with_suffix(".masks.npy"), np.packbits((drawn.mask[:, 0] >= 0.5).numpy(), axis=-1))
    save_array(stem.with_suffix(".labels.npy"), np.array([labels_of(scene) for scene in scenes], np.int64))
    save_array(stem.with_suffix(".identity.npy"), identity)
    lines = "".join(json.dumps([caption(s, rng) for _ in range(VARIANTS)]) + "\n" for s, rng in pairs)
    save_text(done, lines)


def in_processes(work: Callable[..., None], jobs: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Calls `work(*job)` for every job, in `workers` separate processes, or in this process if `workers` is 1."""
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.starmap(work, jobs, chunksize=1)
    else:
        for job in jobs:
            work(*job)


def build(folder: Path, n: int, seed: int, workers: int = 1) -> Dataset:
    """Renders n training pictures into a folder, in `workers` processes with one thread each. Resumes an interrupted
    build.

    Raises ValueError if the folder contains a different data set.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"version": VERSION, "n": n, "seed": seed, "chunk": CHUNK}
    note = folder / "recipe.json"
    if note.exists() and (found := json.loads(note.read_text(encoding="utf-8"))) != recipe:
        raise ValueError(f"{folder} contains a different data set ({found}), not {recipe}; choose another folder")
    save_text(note, json.dumps(recipe))
    jobs = [(folder, seed, k, min(CHUNK, n - k * CHUNK)) for k in range(-(-n // CHUNK))]
    in_processes(_chunk, jobs, workers)
    return load(folder)


def load(folder: Path) -> Dataset:
    """Loads the data set in a folder. Raises ValueError if there is no data set, or if it is incomplete."""
    folder = Path(folder)
    note = folder / "recipe.json"
    if not note.exists():
        raise ValueError(f"{folder} contains no toybox data set (it has no recipe.json)")
    recipe = json.loads(note.read_text(encoding="utf-8"))
    stems = [folder / f"chunk-{k:05d}" for k in range(-(-recipe["n"] // recipe["chunk"]))]
    missing = [stem.name for stem in stems if not stem.with_suffix(".captions.jsonl").exists()]
    if missing:
        lack = f"{len(missing)} of {len(stems)} chunks ({missing[0]}, ...)"
        raise ValueError(f"{folder} lacks {lack}; run the build again to resume it")
    labels = np.concatenate([np.load(stem.with_suffix(".labels.npy")) for stem in stems])
    captions: list[list[str]] = []
    for stem in stems:
        with open(stem.with_suffix(".captions.jsonl"), encoding="utf-8") as file:
            captions += [json.loads(line) for line in file]
    return Dataset(
        folder,
        tuple(np.load(stem.with_suffix(".pixels.npy"), mmap_mode="r") for stem in stems),
        tuple(np.load(stem.with_suffix(".masks.npy"), mmap_mode="r") for stem in stems),
        captions,
        {name: labels[:, k] for k, name in enumerate(LABELS)},
        np.concatenate([np.load(stem.with_suffix(".identity.npy")) for stem in stems]),
    )


if __name__ == "__main__":
    build(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 1)
