"""Writes Gaussians as a PLY file in the 3DGS layout (https://arxiv.org/abs/2308.04079), which splat viewers can
read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pcs_3d.fields.field import Splats
from shared.io.outputs import atomic_write

_C0 = 0.28209479177387814  # value of the constant spherical harmonic
_NAMES = ("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity",
          "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")  # fmt: skip


def write_gaussians(path: Path, splats: Splats) -> Path:
    """Writes positions (z up), colours as spherical harmonics of degree 0, opacities before the sigmoid, logarithms of
    the scales, and quaternions (w first). Raises ValueError if the Gaussians have latents instead of colours, if any
    value is not finite, or if the values read back from the file differ from these."""
    if splats.features.shape[1] != 3:
        raise ValueError(f"the Gaussians have {splats.features.shape[1]} latent channels, but a PLY file needs colours")
    n = len(splats.means)
    columns = [
        splats.means, splats.means.new_zeros(n, 3), (splats.features - 0.5) / _C0,
        splats.opacities.clamp(1e-6, 1 - 1e-6).logit()[:, None], splats.scales.log(), splats.rotations,
    ]  # fmt: skip
    table = np.concatenate([c.detach().float().cpu().numpy() for c in columns], 1).astype("<f4")
    if not np.isfinite(table).all():
        raise ValueError(
            "the Gaussians contain values that are not finite (NaN or Inf), so their training must have failed"
        )
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {n}", *(f"property float {k}" for k in _NAMES)]
    with atomic_write(path) as temporary:
        temporary.write_bytes("\n".join([*head, "end_header\n"]).encode() + table.tobytes())
        if not np.array_equal(read_gaussians(temporary), table):
            raise ValueError(f"{path} does not contain the Gaussians that were written to it")
    return path


def read_gaussians(path: Path) -> np.ndarray:
    """Reads the Gaussians in a PLY file with trimesh and returns the `_NAMES` columns, `[N, 17]`."""
    import trimesh

    with path.open("rb") as stream:
        read = trimesh.load(stream, file_type="ply", process=False)  # type: ignore[arg-type]
    data = read.metadata["_ply_raw"]["vertex"]["data"]
    return np.stack([np.asarray(data[name]).reshape(-1) for name in _NAMES], 1)
