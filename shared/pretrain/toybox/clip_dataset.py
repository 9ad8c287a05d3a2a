"""Stores training clips on disk. They are rendered once, in chunks, and read as memory maps.

    FOLDER/recipe.json                                                   the settings of the data set
    FOLDER/clips-00000.{frames,masks,paths,labels}.npy, .captions.jsonl  one chunk, complete if its captions exist

An existing data set cannot be built again with different settings, except that the number of clips may grow. Clip i
depends only on i and the data set's seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shared.pretrain.toybox.dataset import in_processes, labels_of, save_array, save_text
from shared.toybox.motions.captioned import MOTIONS
from shared.toybox.motions.clip_captions import clip_caption
from shared.toybox.motions.clips import MovingScene, draw_clip, sample_moving

CHUNK = 100
FRAMES = 16
VARIANTS = 4
VERSION = 1


@dataclass(frozen=True)
class Clips:
    """A data set of N clips of 16 frames.

    captions: N lists of 4 captions
    motions: int64 [N], indices into `MOTIONS`
    labels: int64 [N, …], the labels of the first frame, in the order of `dataset.LABELS`
    paths: float64 [N, 16, 6]; `motions.motion.PATH` names the columns
    """

    folder: Path
    frame_chunks: tuple[np.ndarray, ...]
    mask_chunks: tuple[np.ndarray, ...]
    captions: list[list[str]]
    motions: np.ndarray
    labels: np.ndarray
    paths: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)

    def frames(self, index: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the clips at the n given indices, as uint8 [n, 16, 64, 64, 3]."""
        return np.stack([self.frame_chunks[i // CHUNK][i % CHUNK] for i in index])

    def masks(self, index: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the masks of the thing in the clips at the n given indices, as bool [n, 16, 64, 64]."""
        packed = np.stack([self.mask_chunks[i // CHUNK][i % CHUNK] for i in index])
        return np.unpackbits(packed, axis=-1).astype(bool)


def clip_of(seed: int, index: int) -> tuple[MovingScene, np.random.Generator]:
    """Samples clip `index` of the data set with the given seed. Also returns the generator for the clip's captions.

    Indices cycle through the motions, so that all motions are equally frequent.
    """
    rng = np.random.default_rng([seed, 16, index])
    motion = tuple(MOTIONS.values())[index % len(MOTIONS)]
    return sample_moving(rng, motion, FRAMES), rng


def _chunk(folder: Path, seed: int, number: int, n: int) -> None:
    stem = folder / f"clips-{number:05d}"
    done = stem.with_suffix(".captions.jsonl")
    if done.exists():
        return
    torch.set_num_threads(1)
    pairs = [clip_of(seed, number * CHUNK + i) for i in range(n)]
    drawn = [draw_clip(moving) for moving, _ in pairs]
    motions = list(MOTIONS)
    labels = [[motions.index(moving.motion.name), *labels_of(moving.scene)] for moving, _ in pairs]
    save_array(stem.with_suffix(".frames.npy"), np.stack([clip.levels.numpy() for clip in drawn]))
    save_array(stem.with_suffix(".masks.npy"), np.packbits(np.stack([(c.mask >= 0.5).numpy() for c in drawn]), axis=-1))
    save_array(stem.with_suffix(".paths.npy"), np.stack([clip.path for clip in drawn]))
    save_array(stem.with_suffix(".labels.npy"), np.array(labels, np.int64))
    lines = "".join(json.dumps([clip_caption(m, rng) for _ in range(VARIANTS)]) + "\n" for m, rng in pairs)
    save_text(done, lines)


def build(folder: Path, n: int, seed: int, workers: int = 1) -> Clips:
    """Renders n training clips into a folder, in `workers` processes with one thread each. Resumes an interrupted
    build.

    Raises ValueError if the folder contains a different data set.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"version": VERSION, "seed": seed, "chunk": CHUNK, "frames": FRAMES, "motions": list(MOTIONS)}
    note = folder / "recipe.json"
    found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    if found is not None and {k: v for k, v in found.items() if k != "n"} != recipe:
        raise ValueError(f"{folder} contains a different data set ({found}), not {recipe}; choose another folder")
    before = found["n"] if found else n
    if n != before and min(n, before) % CHUNK:
        raise ValueError(f"{folder} has {before} clips, not {n}; data sets grow by whole chunks of {CHUNK}")
    save_text(note, json.dumps({**recipe, "n": max(n, before)}))
    jobs = [(folder, seed, k, min(CHUNK, n - k * CHUNK)) for k in range(-(-n // CHUNK))]
    in_processes(_chunk, jobs, workers)
    return load(folder)


def load(folder: Path) -> Clips:
    """Loads a folder's chunks up to the first incomplete or missing chunk. Raises ValueError if even the first
    chunk is incomplete or missing."""
    folder = Path(folder)
    stems = []
    while (stem := folder / f"clips-{len(stems):05d}").with_suffix(".captions.jsonl").exists():
        stems.append(stem)
    if not stems:
        raise ValueError(f"{folder} contains no toybox clips; render them first (`pcs toybox train clips`)")
    captions: list[list[str]] = []
    for stem in stems:
        text = stem.with_suffix(".captions.jsonl").read_text(encoding="utf-8")
        captions += [json.loads(line) for line in text.splitlines()]
    labels = np.concatenate([np.load(stem.with_suffix(".labels.npy")) for stem in stems])
    return Clips(
        folder,
        tuple(np.load(stem.with_suffix(".frames.npy"), mmap_mode="r") for stem in stems),
        tuple(np.load(stem.with_suffix(".masks.npy"), mmap_mode="r") for stem in stems),
        captions,
        labels[:, 0],
        labels[:, 1:],
        np.concatenate([np.load(stem.with_suffix(".paths.npy")) for stem in stems]),
    )
