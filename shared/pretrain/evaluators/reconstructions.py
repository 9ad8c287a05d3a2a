"""Reconstructs pictures with the autoencoder. The evaluators are trained on reconstructions as well as renders, because
the pictures that they will judge are decoded by the autoencoder.

`python -m shared.pretrain.evaluators.reconstructions DATA VAE TARGET ROWS`
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.pretrain.evaluators.augment import from_bytes, to_bytes
from shared.pretrain.evaluators.data import IdentityPictures, Pictures
from shared.train.precision import resolve_precision


def reconstruct(folder: Path, vae_folder: Path, target: Path, rows: int, batch_size: int = 64) -> None:
    """Reconstructs the first `rows` pictures of a data set or identity folder with a VAE. Writes the reconstructions to
    the .npy file `target`, as uint8 `[rows, 64, 64, 3]`.
    """
    vae = load_vae(vae_folder).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    whole = IdentityPictures if (folder / "identity.json").is_file() else Pictures
    source = whole.load(folder).pixels
    source = source.reshape(-1, *source.shape[-3:])[:rows]
    fast = resolve_precision("auto", "cpu") == "bf16"
    temporary = target.with_name(target.name + ".part")
    result = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=source.shape)
    for start in range(0, len(source), batch_size):
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):  # bf16 changes pixels by a third of a grey level
            through = round_trip(vae, from_bytes(source[start : start + batch_size]))
        result[start : start + batch_size] = to_bytes(through.float())
    result.flush()
    os.replace(temporary, target)


def load_vae(folder: Path) -> torch.nn.Module:
    """Loads the `AutoencoderKL` from a folder, in float32 and frozen."""
    from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

    return (
        AutoencoderKL.from_pretrained(str(folder), torch_dtype=torch.float32, local_files_only=True)
        .eval()
        .requires_grad_(False)
    )


@torch.no_grad()
def round_trip(vae: torch.nn.Module, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """Encodes pictures (`[B, 3, H, W]` in [0, 1]) and decodes the means of their latents. Clamps the result to
    [0, 1]."""
    parts = []
    for chunk in pixels.split(batch_size):
        latent = vae.encode(chunk * 2 - 1).latent_dist.mean  # pyright: ignore[reportCallIssue]
        parts.append((vae.decode(latent).sample / 2 + 0.5).clamp(0, 1))  # pyright: ignore[reportCallIssue]
    return torch.cat(parts)


def main() -> None:
    """Reconstructs the first ROWS pictures of a data set or identity folder with a VAE. Writes them to an .npy file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name in ("folder", "vae", "target"):
        parser.add_argument(name, type=Path)
    parser.add_argument("rows", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    reconstruct(given.folder, given.vae, given.target, given.rows)


if __name__ == "__main__":
    main()
