"""Caches the latents on which the motion module is trained. The finished autoencoder encodes each clip once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from shared.pretrain.toybox.clip_dataset import CHUNK, Clips
from shared.pretrain.toybox.dataset import save_array, save_text
from shared.pretrain.toybox.latent_cache import cover, encode, fingerprint, tokenize

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer


@dataclass(frozen=True)
class ClipLatents:
    """The cached latents and captions of N clips.

    tokens: int16 [N, V, L], the token ids of V captions per clip
    empty: int64 [L], the token ids of the empty caption
    mark: the fingerprint of the autoencoder and the tokenizer
    """

    latents: tuple[np.ndarray, ...]  # per chunk, float16 [n, F, C, h, w]
    covered: tuple[np.ndarray, ...]  # per chunk, uint8 [n, F, h, w]
    tokens: np.ndarray
    empty: np.ndarray
    mark: str

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: Sequence[int] | np.ndarray, first: int = 0, stride: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Returns every `stride`-th frame of the clips at the n given indices, starting with frame `first`.

        The first array contains the frames' latents, float16 [n, C, F', h, w]. The second array contains the share of
        each latent cell that things cover, uint8 [n, F', h, w], as returned by `latent_cache.cover`."""
        rows = [(i // CHUNK, i % CHUNK) for i in index]
        latents = np.stack([self.latents[c][i][first::stride] for c, i in rows])
        covered = np.stack([self.covered[c][i][first::stride] for c, i in rows])
        return np.ascontiguousarray(latents.transpose(0, 2, 1, 3, 4)), covered


def build(
    folder: Path, clips: Clips, vae: AutoencoderKL, tokenizer: CLIPTokenizer, device: torch.device | None = None
) -> ClipLatents:
    """Returns the cached latents in `folder`. Missing latents are computed first. If the autoencoder or the tokenizer
    has changed, all latents are computed again."""
    folder.mkdir(parents=True, exist_ok=True)
    mark, note = fingerprint(vae, tokenizer), folder / "state.json"
    same = note.is_file() and json.loads(note.read_text(encoding="utf-8")).get("fingerprint") == mark
    if not same:
        for stale in folder.glob("clips-*.npy"):
            stale.unlink()
        save_text(note, json.dumps({"fingerprint": mark}))
    vae = vae.to(device) if device is not None else vae  # pyright: ignore[reportArgumentType]
    vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents, covered = [], []
    for number, frames in enumerate(clips.frame_chunks):
        stem = folder / f"clips-{number:05d}"
        files = stem.with_suffix(".latents.npy"), stem.with_suffix(".covered.npy")
        if not all(file.is_file() for file in files):
            n, f, side = frames.shape[:3]
            made = encode(vae, np.asarray(frames).reshape(n * f, side, side, 3))
            masks = clips.masks(range(number * CHUNK, number * CHUNK + n)).reshape(n * f, side, side)
            save_array(files[1], cover(masks, made.shape[-1]).reshape(n, f, *made.shape[-2:]))
            save_array(files[0], made.reshape(n, f, *made.shape[1:]))
        latents.append(np.load(files[0], mmap_mode="r"))
        covered.append(np.load(files[1], mmap_mode="r"))
    tokens = tokenize(tokenizer, clips.captions)
    empty = tokenize(tokenizer, [[""]])[0, 0].astype(np.int64)
    return ClipLatents(tuple(latents), tuple(covered), tokens, empty, mark)
