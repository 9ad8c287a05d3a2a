"""Measures the speed and peak memory of a LoRA training step on full-size video models with random weights, on a GPU.

    PYTHONPATH=. python3 tests/bench/bench_full_size.py [--seconds 30] [--device cuda] [--tiny] [--out FILE]

Prints the device and the versions of torch and diffusers, then a table with one line per measurement. Each line gives
the model, the clip's size (frames x pixels), whether layers are recomputed in the backward pass (checkpointing), the
number of trained parameters, the median step time in seconds, the steps per second, the peak GPU memory allocated
during the steps, and the mean GPU utilization. If a measurement fails, its line gives the reason, and the script moves
on to the next one. No files are downloaded or read.

Only the denoiser is measured. Its inputs (latents and text embeddings) are random tensors that stand in for cached
ones. Its weights are frozen and in bfloat16, as in the pipelines. The suite's own LoRA (rank 32, on all attention
layers) is in float32 and is trained with AdamW under bfloat16 autocast. `--tiny` runs the same measurements at tiny
sizes, to test this script. With `--tiny --device cpu`, no GPU is needed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from pcs_video.backbones.animatediff import ROLES
from pcs_video.backbones.video_transformer import transformer_roles
from shared.backbones.module_roles import RoleSpec, resolve
from shared.backbones.protocol import Group
from shared.trainable.lora import Lora

RANK = 32
LORA = f"the suite's own (shared.trainable.lora.Lora, rank {RANK}, all attention layers)"
WARM_UPS = 2
LEAST_STEPS = 3  # the minimum number of timed steps, however long they take
MOST_STEPS = 500
WEIGHT_STD = 0.02  # small enough that activations stay finite through all layers


class Network:
    """A denoiser and its role table, the only parts of a backbone that a LoRA needs."""

    def __init__(self, name: str, model: nn.Module, role_table: Mapping[str, Sequence[RoleSpec]]) -> None:
        self.components = {name: model}
        self.family, self._role_table = name, role_table

    def group(self, role: str) -> tuple[Group, ...]:
        return resolve(role, self._role_table, self.components, self.family)

    def add_adapter(self, name: str, adapter: Any) -> None:
        adapter.set_strength(1.0)


@dataclass(frozen=True)
class Case:
    """A model to measure.

    Args:
        build: builds the model on the default device and in the default dtype
        latents: shape of the clip's latents, [1, C, frames, h, w]
        text: shape of the text embeddings, [1, tokens, D] or [frames, tokens, D]
        clip: frames x size in pixels, for the table
    """

    name: str
    component: str
    build: Callable[[], Any]
    role_table: Mapping[str, Sequence[RoleSpec]]
    roles: tuple[str, ...]
    latents: tuple[int, ...]
    text: tuple[int, ...]
    clip: str


@dataclass
class Row:
    """One line of the table. If the measurement failed, `error` gives the reason."""

    model: str
    clip: str
    checkpointing: bool
    trained: int | None = None
    steps: int | None = None
    seconds: float | None = None
    steps_per_second: float | None = None
    peak_gib: float | None = None
    utilisation: float | None = None
    error: str = ""


def animatediff(tiny: bool) -> Case:
    channels = (32, 64) if tiny else (320, 640, 1280, 1280)
    width, heads = (16, 2) if tiny else (768, 8)
    crossed = len(channels) - 1  # the number of blocks with cross-attention

    def build() -> Any:
        pictures = diffusers.UNet2DConditionModel(
            sample_size=64,
            down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
            block_out_channels=channels,
            layers_per_block=2,
            cross_attention_dim=width,
            attention_head_dim=heads,
        )
        motion = diffusers.MotionAdapter(
            block_out_channels=channels, motion_num_attention_heads=heads, motion_max_seq_length=32
        )
        return diffusers.UNetMotionModel.from_unet2d(pictures, motion)

    latents, clip = ((1, 4, 4, 8, 8), "4 x 64x64") if tiny else ((1, 4, 16, 64, 64), "16 x 512x512")
    roles = ("cross_attention", "self_attention", "temporal_attention")
    text = (latents[2], 77, width)  # this network takes separate text embeddings for each frame
    return Case("AnimateDiff, SD 1.5", "unet", build, ROLES, roles, latents, text, clip)


def wan(tiny: bool) -> Case:
    def build() -> Any:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2 if tiny else 12,
            attention_head_dim=12 if tiny else 128,
            in_channels=16,
            out_channels=16,
            text_dim=32 if tiny else 4096,
            freq_dim=256,
            ffn_dim=32 if tiny else 8960,
            num_layers=2 if tiny else 30,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
            rope_max_seq_len=1024,
        )

    latents, clip = ((1, 16, 2, 8, 8), "5 x 64x64") if tiny else ((1, 16, 9, 60, 104), "33 x 480x832")
    text = (1, 16, 32) if tiny else (1, 512, 4096)
    table = transformer_roles(("transformer",), r"blocks\.\d+\.", "ffn")
    return Case(
        "Wan 2.1, 1.3B", "transformer", build, table, ("cross_attention", "self_attention"), latents, text, clip
    )


@contextmanager
def half_precision() -> Iterator[None]:
    """Inside the context, bfloat16 is the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_model(case: Case, device: torch.device) -> Any:
    """Builds the model with small, frozen random weights, in the precision that `from_pretrained` would give it."""
    with device, half_precision():
        model = case.build().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, WEIGHT_STD)
    kept = model._keep_in_fp32_modules or ()
    for name, parameter in model.named_parameters():
        if any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.float()
    return model


class Utilisation:
    """Samples the GPU utilization from NVML in a thread. `mean` is None if NVML is unavailable."""

    def __init__(self, device: torch.device, every: float = 0.1) -> None:
        self._device, self._every = device, every
        self._samples: list[int] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Utilisation:
        if self._device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.ident:
            self._thread.join(timeout=2)

    def _sample(self) -> None:
        while not self._end.wait(self._every):
            try:
                self._samples.append(torch.cuda.utilization(self._device))
            except Exception:  # without pynvml or with an unsupported driver, the table shows "n/a"
                return

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self._samples) if self._samples else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(case: Case, row: Row, device: torch.device, seconds: float) -> None:
    """Trains the model for about `seconds` seconds and fills in the row."""
    torch.manual_seed(0)
    model = random_model(case, device)
    if row.checkpointing:
        model.enable_gradient_checkpointing()
    network: Any = Network(case.component, model, case.role_table)
    group = Lora(roles=case.roles, rank=RANK).inject(network, "bench", "lora", seed=0)
    row.trained = sum(p.numel() for p in group.parameters)
    optimizer = torch.optim.AdamW(group.parameters, lr=1e-4)
    x = torch.randn(case.latents, device=device)
    target = torch.randn(case.latents, device=device)
    text = torch.randn(case.text, device=device, dtype=torch.bfloat16)
    t = torch.tensor([500], device=device)

    def step() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            predicted = model(x.bfloat16(), t, encoder_hidden_states=text, return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted.float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    for _ in range(WARM_UPS):
        loss = step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    began = time.perf_counter()
    with Utilisation(device) as utilisation:
        while len(times) < LEAST_STEPS or (time.perf_counter() - began < seconds and len(times) < MOST_STEPS):
            start = time.perf_counter()
            loss = step()
            synchronize(device)
            times.append(time.perf_counter() - start)
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss is {loss.item()} after {len(times)} steps")
    row.steps, row.seconds = len(times), statistics.median(times)
    row.steps_per_second, row.utilisation = 1 / row.seconds, utilisation.mean
    if device.type == "cuda":
        row.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30


def measured(case: Case, checkpointing: bool, device: torch.device, seconds: float) -> Row:
    """Runs a measurement and returns its row, even if the measurement fails."""
    row = Row(case.name, case.clip, checkpointing)
    try:
        measure(case, row, device, seconds)
    except torch.OutOfMemoryError:
        row.error = "out of memory"
    except Exception as error:  # the next measurement may still succeed
        row.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except Exception as error:  # some errors make CUDA unusable, which the next row will report
            row.error = row.error or f"{type(error).__name__} while freeing memory"
    return row


HEADER = ("model", "frames x size", "checkpointing", "trained", "s/step", "steps/s", "peak GiB", "utilisation")


def cells(row: Row) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "n/a" if value is None else format(value, form)

    first = (row.model, row.clip, "on" if row.checkpointing else "off")
    if row.error:
        return (*first, row.error)
    trained = "n/a" if row.trained is None else f"{row.trained / 1e6:.2f} M"
    busy = "n/a" if row.utilisation is None else f"{row.utilisation:.0f}%"
    numbers = (shown(row.seconds, ".3f"), shown(row.steps_per_second, ".3f"), shown(row.peak_gib, ".2f"))
    return (*first, trained, *numbers, busy)


def line(texts: Sequence[str]) -> str:
    return "  ".join(
        text.ljust(width) for text, width in zip(texts, (20, 14, 13, 9, 7, 7, 8, 11), strict=False)
    ).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="the duration of each measurement, in seconds")
    parser.add_argument("--tiny", action="store_true", help="use tiny sizes, to test this script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write the rows to")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    about = {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__, "lora": LORA}
    print(f"{name}; torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    rows: list[Row] = []
    for case in (animatediff(options.tiny), wan(options.tiny)):
        for checkpointing in (True, False):
            began = time.perf_counter()
            row = measured(case, checkpointing, device, options.seconds)
            rows.append(row)
            print(
                f"[{time.perf_counter() - began:.0f} s] {line(cells(row))}", flush=True
            )  # printed right away, in case the run is cut short
            if options.out:
                options.out.write_text(json.dumps({**about, "rows": [asdict(r) for r in rows]}, indent=2) + "\n")
    print(f"\nLoRA: {LORA}")
    print(line(HEADER))
    for row in rows:
        print(line(cells(row)))


if __name__ == "__main__":
    main()
