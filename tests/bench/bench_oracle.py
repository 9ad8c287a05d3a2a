"""Reconstructs a known object with each score-distillation recipe, using the object's exact scores as the teacher.

    python tests/bench/bench_oracle.py [RECIPE …]

Each recipe is run through the whole engine. Phases that train or use the diffusion model itself are left out. Prints the
overlap of the silhouettes (IoU) and the PSNR of the renders over 16 unseen views. The targets are 0.9 and 25 dB. The
script takes several minutes on one core.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shared.backbones.stable_diffusion import StableDiffusionBackbone
from tests.conftest import build_sd
from tests.three_d.oracle_runs import GUIDANCES, PHASED, reconstructed


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'recipe':<18} {'IoU':>6} {'PSNR':>6} {'seconds':>8}")
    for name in sys.argv[1:] or (*GUIDANCES, *PHASED):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = reconstructed(StableDiffusionBackbone(build_sd(), "tiny"), name, Path(folder))
        print(f"{name:<18} {found.iou:6.3f} {found.psnr:6.1f} {time.perf_counter() - start:8.0f}", flush=True)


if __name__ == "__main__":
    main()
