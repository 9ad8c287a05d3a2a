"""Computes the U-Net's training data once and caches it on disk. For each picture, memory-mapped arrays contain the
scaled latents, the token ids and attributes of the captions, and the share of each latent cell that things cover."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shared.pretrain.toybox.vae import Pictures, to_signed
from shared.toybox.captions import caption_attributes
from shared.toybox.tokenizer import MAX_LENGTH

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

_VERSION = 2  # of the file format
_CHUNK = 2048
_BATCH = 64


@dataclass(frozen=True)
class Cache:
    """The cached arrays of a data set. Row i of each array belongs to picture i."""

    latents: np.ndarray  # float16 [N, C, H, W], posterior means, scaled to a standard deviation of about 1
    tokens: np.ndarray  # int16 [N, V, 32], the token ids of V captions per picture
    covered: np.ndarray  # uint8 [N, H, W], the share of each latent cell's patch that things cover (255 means all)
    caption_attributes: np.ndarray  # int8 [N, V, 3], as returned by `shared.toybox.captions.caption_attributes`

    def __len__(self) -> int:
        return len(self.latents)


def fingerprint(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> str:
    """Returns a hash of the encoder and the tokenizer, on which the cached values depend. The decoder is left out."""
    known = [_VERSION, vae.config["scaling_factor"], sorted(tokenizer.get_vocab().items())]
    digest = hashlib.sha256(json.dumps(known).encode())
    parts = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    named = {f"{part}.{name}": x for part, net in parts.items() if net for name, x in net.state_dict().items()}
    for name, tensor in sorted(named.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def build(
    folder: Path, pictures: Pictures, vae: AutoencoderKL, tokenizer: CLIPTokenizer, device: torch.device | None = None
) -> Cache:
    """Returns the cache in ``folder``. Missing rows are computed first.

    Existing rows are kept if the encoder and the tokenizer are unchanged. Otherwise, all rows are recomputed.
    Pictures may be appended to the data set but must not change. The state file is written last, and atomically.

    Args:
        folder: the folder for the arrays
        pictures: the N pictures of the data set, with V captions each
        vae: the finished autoencoder, which is moved to ``device`` and left there
        tokenizer: the tokenizer; captions are padded or truncated to 32 tokens
        device: the device on which latents are computed. The default is the autoencoder's current device.

    Returns:
        the arrays, which are memory-mapped and read-only
    """
    folder.mkdir(parents=True, exist_ok=True)
    total, mark = len(pictures), fingerprint(vae, tokenizer)
    state = _state(folder)
    done = min(int(state["count"]), total) if state.get("fingerprint") == mark else 0
    vae = vae.to(device) if device is not None else vae  # pyright: ignore[reportArgumentType]
    vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on a CPU
    for start in range(done, total, _CHUNK):
        stop = min(start + _CHUNK, total)
        latents = encode(vae, pictures.pixels(slice(start, stop)))
        ids = tokenize(tokenizer, [pictures.captions[i] for i in range(start, stop)])
        _append(folder / "latents.f16", latents, start)
        _append(folder / "tokens.i16", ids, start)
        _append(folder / "covered.u8", cover(pictures.masks(slice(start, stop)), latents.shape[-1]), start)
        named = [[caption_attributes(text) for text in pictures.captions[i]] for i in range(start, stop)]
        attributes = np.array(named, np.int8)
        _append(folder / "attributes.i8", attributes, start)
        shapes = {"latents": latents.shape[1:], "tokens": ids.shape[1:], "attributes": attributes.shape[1:]}
        _write_state(folder, {"count": stop, "fingerprint": mark, "shapes": shapes})
    return load(folder)


def load(folder: Path) -> Cache:
    """Memory-maps a finished cache.

    Raises:
        ValueError: if there is no cache
    """
    state = _state(folder)
    if not state:
        raise ValueError(f"{folder} contains no cached latents")
    count, shapes = int(state["count"]), state["shapes"]
    latents = np.memmap(folder / "latents.f16", np.float16, "r", shape=(count, *shapes["latents"]))
    tokens = np.memmap(folder / "tokens.i16", np.int16, "r", shape=(count, *shapes["tokens"]))
    covered = np.memmap(folder / "covered.u8", np.uint8, "r", shape=(count, *shapes["latents"][1:]))
    attributes = np.memmap(folder / "attributes.i8", np.int8, "r", shape=(count, *shapes["attributes"]))
    return Cache(latents, tokens, covered, attributes)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: np.ndarray) -> np.ndarray:
    """Encodes pictures (uint8 [B, S, S, 3]) as scaled posterior means (float16 [B, C, h, w], with a standard deviation
    of about 1)."""
    device, parts = next(vae.parameters()).device, []
    for start in range(0, len(pixels), _BATCH):
        x = to_signed(pixels[start : start + _BATCH]).to(device, memory_format=torch.channels_last)
        encoded: Any = vae.encode(x, return_dict=True)
        parts.append((encoded.latent_dist.mean * vae.config["scaling_factor"]).half().cpu().numpy())
    return np.concatenate(parts)


def cover(masks: np.ndarray, side: int) -> np.ndarray:
    """Averages masks (bool [B, S, S]) over patches. Returns uint8 [B, side, side], which is 255 where a mask covers a
    patch completely."""
    patch = masks.shape[-1] // side
    means = masks.reshape(len(masks), side, patch, side, patch).mean((2, 4))
    return np.round(255 * means).astype(np.uint8)


def tokenize(tokenizer: CLIPTokenizer, captions: list[Any]) -> np.ndarray:
    """Tokenizes V captions for each of B pictures. Returns int16 [B, V, 32], padded and truncated in the same way as
    in the pipeline."""
    flat = [text for variants in captions for text in variants]
    ids = tokenizer(flat, padding="max_length", truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return np.asarray(ids, dtype=np.int16).reshape(len(captions), -1, MAX_LENGTH)


def _append(path: Path, rows: np.ndarray, start: int) -> None:
    row_bytes = rows[0].nbytes
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(start * row_bytes)
        file.seek(start * row_bytes)
        file.write(np.ascontiguousarray(rows).tobytes())


def _state(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    partial = folder / "state.json.partial"
    partial.write_text(json.dumps(state), encoding="utf-8")
    os.replace(partial, folder / "state.json")
