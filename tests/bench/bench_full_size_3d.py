"""Measures score distillation with full-size models that have random weights, on a GPU.

    PYTHONPATH=. python tests/bench/bench_full_size_3d.py [--seconds 30] [--device cuda] [--tiny] [--out FILE] [--set K=V]

Prints a table with one line per measurement: the model, the field, the side length of the renders, the iterations per
second, how the time of an iteration is split (render, encode, teacher, backward, optimizer, rest), the peak GPU memory
allocated, and the mean GPU utilization. The rate and the peak are those of undisturbed iterations; the split comes from
further iterations in which the GPU is synchronized before and after each activity. If a measurement fails, its line gives
the reason, and the script moves on to the next one. Two more lines say whether the CUDA kernels of gsplat and nerfacc
can be used, and what replaces them otherwise. No files are downloaded or read.

Iterations are those of the recipe `dreamfusion`, with a loaded concept (a learned word and a LoRA). Stable Diffusion has
the size of version 1.5; FLUX is tiny, because only the family's code is of interest. Networks are in bfloat16, or in
float32 on a CPU. `--tiny` makes everything tiny, to test this script. With `--tiny --device cpu`, no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import torch
from bench_asset_step import SHOWN, Stepping, settings_of
from full_size import (
    Utilisation,
    failure,
    line,
    name_of,
    peak_gib,
    random_model,
    reset_peak,
    sd_unet,
    sd_width,
    shown,
    synchronize,
)

from pcs_3d.recipe import Recipe3D
from pcs_3d.renderers.by_gsplat import gsplat
from pcs_3d.runner import Runner3D
from shared.backbones.flux import FluxBackbone
from shared.backbones.protocol import Backbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.recipe.resolve import load
from shared.toybox.tokenizer import PROMPT_WORDS
from shared.toybox.tokenizer import build as build_tokenizer

WARM_UPS = 3
LEAST_STEPS = 3  # the minimum number of timed iterations, however long they take
SPLIT_STEPS = 5
SIDES = (64, 128, 256, 512)
HEADER = ("model", "field", "renders", "iterations/s", *(f"{name} ms" for name in SHOWN), "peak GiB", "utilisation")
WIDTHS = (10, 9, 9, 12, *(max(9, len(f"{name} ms")) for name in SHOWN), 8, 11)


@dataclass(frozen=True)
class Case:
    """A model, a kind of field and the side length of the renders, with further settings of the recipe."""

    name: str
    build: Callable[[torch.device, torch.dtype], Backbone]
    field: str
    side: int
    settings: tuple[str, ...] = ()


@dataclass
class Row:
    """One line of the table. If the measurement failed, `error` gives the reason."""

    model: str
    field: str
    side: int
    iterations_per_second: float | None = None
    milliseconds: Mapping[str, float] = field(default_factory=dict)  # of each activity, per iteration
    peak_gib: float | None = None
    utilisation: float | None = None
    error: str = ""


def stable_diffusion(tiny: bool, device: torch.device, dtype: torch.dtype) -> Backbone:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer(PROMPT_WORDS)
    tokenizer.model_max_length = 77
    width, layers = sd_width(tiny), 2 if tiny else 12
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=layers,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    channels = (32, 32, 32, 32) if tiny else (128, 256, 512, 512)

    def autoencoder() -> Any:
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=channels, layers_per_block=1 if tiny else 2, latent_channels=4, sample_size=512,
        )  # fmt: skip

    networks = [
        random_model(b, device, dtype) for b in (autoencoder, partial(CLIPTextModel, config), partial(sd_unet, tiny))
    ]
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        *networks[:2],
        tokenizer,
        networks[2],
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    return StableDiffusionBackbone(pipe, "full-size")


def tiny_flux(device: torch.device, dtype: torch.dtype) -> Backbone:
    from tests.conftest import build_flux

    return FluxBackbone(build_flux(), "tiny").to(device, dtype)


def cases(tiny: bool) -> list[Case]:
    name, build = ("SD, tiny" if tiny else "SD 1.5"), partial(stable_diffusion, tiny)
    if tiny:
        small = ("field.resolution=8", "renderer.samples=16")
        flux = Case("FLUX, tiny", tiny_flux, "voxels", 16, ("guidance.resolution=32", *small))
        return [Case(name, build, "voxels", 16, small), Case(name, build, "gaussians", 16, ("field.count=60",)), flux]
    found = [Case(name, build, "voxels", side) for side in SIDES]
    found += [Case(name, build, "gaussians", side) for side in SIDES]
    return [*found, Case("FLUX, tiny", tiny_flux, "voxels", 64, ("guidance.resolution=32",))]


def measure(case: Case, row: Row, device: torch.device, seconds: float, settings: Sequence[str]) -> None:
    """Distills for about `seconds` seconds and fills in the row."""
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    how = [
        f"field.kind={case.field}",
        "backbone=random",
        f"train.mixed_precision={'no' if device.type == 'cpu' else 'bf16'}",
    ]
    how += ["penalties.orientation=null"] if case.field == "gaussians" else []
    recipe = load("dreamfusion", [*settings_of(case.side), *how, *case.settings, *settings], "3d", Recipe3D)
    runner = Runner3D(case.build(device, dtype))
    with tempfile.TemporaryDirectory() as temporary, Stepping(recipe, runner, Path(temporary)) as stepping:
        stepping.steps(0, WARM_UPS)
        synchronize(device)
        reset_peak(device)
        done, began = 0, time.perf_counter()
        with Utilisation(device) as utilisation:
            while done < LEAST_STEPS or time.perf_counter() - began < seconds:
                stepping.steps(WARM_UPS + done, 1)
                done += 1
            synchronize(device)
            row.iterations_per_second = done / (time.perf_counter() - began)
        row.peak_gib, row.utilisation = peak_gib(device), utilisation.mean

        def now() -> float:
            synchronize(device)
            return time.perf_counter()

        clock = stepping.split(SPLIT_STEPS, now)
        row.milliseconds = {name: clock.seconds[name] / SPLIT_STEPS * 1e3 for name in SHOWN}


def cells(row: Row) -> tuple[str, ...]:
    first = (row.model, row.field, f"{row.side}x{row.side}")
    if row.error:
        return (*first, row.error)
    split = (shown(row.milliseconds.get(name), ".1f") for name in SHOWN)
    busy = "n/a" if row.utilisation is None else f"{row.utilisation:.0f}%"
    return (*first, shown(row.iterations_per_second, ".2f"), *split, shown(row.peak_gib, ".2f"), busy)


def kernels(device: torch.device) -> list[str]:
    """Says whether the CUDA kernels of gsplat and nerfacc can be used, and what replaces them."""
    cpu = "not tried, because the device is a CPU" if device.type == "cpu" else ""
    why = cpu or gsplat(device).why
    drawn = f"{why}; Gaussians are rendered in PyTorch" if why else "it works and renders Gaussians"
    built = cpu or ("can be used" if _nerfacc_builds() else "cannot be built or imported")
    return [
        f"gsplat {_version('gsplat')}: {drawn}",
        f"nerfacc {_version('nerfacc')}: kernels {built}; in either case, rays are marched with its batched functions, "
        "which are written in PyTorch",
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _nerfacc_builds() -> bool:
    """Imports nerfacc's kernels in a separate process, because they may be built then."""
    code = "from nerfacc.cuda._backend import _C; assert _C is not None"
    try:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=900).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="the duration of each measurement, in seconds")
    parser.add_argument("--tiny", action="store_true", help="use tiny sizes, to test this script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write the rows to")
    parser.add_argument("--set", action="append", default=[], help="a recipe setting as key=value; can be repeated")
    options = parser.parse_args()
    device = torch.device(options.device)
    about = {"device": name_of(device), "torch": torch.__version__, "diffusers": diffusers.__version__}
    print(f"{about['device']}; torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    rows: list[Row] = []
    for case in cases(options.tiny):
        row = Row(case.name, case.field, case.side)
        row.error = failure(partial(measure, case, row, device, options.seconds, options.set), device)
        rows.append(row)
        print(line(cells(row), WIDTHS), flush=True)  # printed right away, in case the run is cut short
        if options.out:
            options.out.write_text(json.dumps({**about, "rows": [asdict(r) for r in rows]}, indent=2) + "\n")
    print()
    for texts in (HEADER, *map(cells, rows)):
        print(line(texts, WIDTHS))
    for found in kernels(device):
        print(found)


if __name__ == "__main__":
    main()
