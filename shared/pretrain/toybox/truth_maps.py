"""What the renderer knows of the training pictures, twice as fine as latents, beside the pictures on disk.

    FOLDER/chunk-00000.truth.npy     int8 [n, 9, 32, 32], written under another name and renamed

The pictures are drawn from (seed, index), so that their geometry can be had again at any time: a data set that was rendered
without it gets it in a pass of its own, which goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.pretrain.toybox.dataset import save_array, scene_of
from shared.toybox.splat import DISTANCE
from shared.toybox.surfaces import Surfaces, surfaces

SIDE = 32  # cells to a side: two to a latent
#: Channels: mask; depth before the thing's centre, normal, position, all of the covered part; slot.
MASK, DEPTH, NORMAL, POSITION, SLOT = slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 8), 8
CHANNELS = 9
_UNIT = 100  # of what is measured: hundredths, up to 1.27
_RENDERED = 64


def encode(seen: Surfaces, side: int = SIDE) -> Tensor:
    """Surfaces of B pictures as int8 [B, 9, side, side]: hundredths, and slots (-1 where no thing is).

    A cell's slot is that of most of its pixels; of two that share it equally, the one with the higher number: the smaller
    detail.
    """
    patch = seen.mask.shape[-1] // side
    cover = F.avg_pool2d(seen.mask, patch)

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values * seen.mask, patch) / cover.clamp_min(1e-6)

    measured = torch.cat([cover, mean(DISTANCE - seen.depth), mean(seen.normal), mean(seen.position)], 1)
    cells = seen.slot.unflatten(1, (side, patch)).unflatten(3, (side, patch)).transpose(2, 3).flatten(3)
    slot = -(-cells).mode(-1).values
    exact = (measured * _UNIT).round().clamp(-127, 127)
    return torch.cat([exact, slot[:, None].to(exact.dtype)], 1).to(torch.int8)


def decode(maps: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [B, 9, S, S] to what is measured [B, 8, S, S], in radii and unit vectors, and slots int64 [B, S, S]."""
    return maps[:, :SLOT].float() / _UNIT, maps[:, SLOT].long()


@dataclass(frozen=True)
class TruthMaps:
    """The maps of a data set; row i belongs to picture i."""

    chunks: Sequence[np.ndarray]  # int8 [n, 9, S, S]
    chunk: int  # rows of each but the last

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.chunks)

    def take(self, index: np.ndarray) -> np.ndarray:
        """int8 [n, 9, S, S] of pictures [n]."""
        return np.stack([self.chunks[i // self.chunk][i % self.chunk] for i in index])


def build(folder: Path, workers: int = 1) -> TruthMaps:
    """The maps of a data set's pictures, those that are missing rendered in `workers` processes of one thread each.

    Raises:
        ValueError: there is no data set
    """
    folder = Path(folder)
    note = folder / "recipe.json"
    if not note.is_file():
        raise ValueError(f"{folder} holds no toybox data set (no recipe.json)")
    recipe = json.loads(note.read_text(encoding="utf-8"))
    n, chunk, seed = recipe["n"], recipe["chunk"], recipe["seed"]
    files = [folder / f"chunk-{k:05d}.truth.npy" for k in range(-(-n // chunk))]
    jobs = [(file, seed, k * chunk, min(chunk, n - k * chunk)) for k, file in enumerate(files) if not file.is_file()]
    if workers > 1 and len(jobs) > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.starmap(_chunk, jobs, chunksize=1)
    else:
        for job in jobs:
            _chunk(*job)
    return TruthMaps([np.load(file, mmap_mode="r") for file in files], chunk)


def _chunk(file: Path, seed: int, first: int, n: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scenes = [scene_of(seed, first + i)[0] for i in range(n)]
        save_array(file, encode(surfaces(scenes, _RENDERED)).numpy())
    finally:
        torch.set_num_threads(threads)
