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

`--device meta` computes no steps and needs no GPU either. The table then gives the memory of the weights and of the
activations that one forward pass stores for the backward pass, which follow from the tensors' shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pcs_video.backbones.animatediff import ROLES
from pcs_video.backbones.recomputed_motion import recompute_motion
from pcs_video.backbones.video_transformer import transformer_roles
from shared.backbones.module_roles import RoleSpec, resolve
from shared.backbones.protocol import Group
from shared.trainable.lora import Lora

RANK = 32
LORA = f"the suite's own (shared.trainable.lora.Lora, rank {RANK}, all attention layers)"
WARM_UPS = 2
LEAST_STEPS = 3  # the minimum number of timed steps, however long they take
MOST_STEPS = 500


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
    weights_gib: float | None = None
    stored_gib: float | None = None  # what a forward pass stores for the backward pass, without the weights


def animatediff(tiny: bool) -> Case:
    def build() -> Any:
        pictures = sd_unet(tiny)
        heads = pictures.config.attention_head_dim
        motion = diffusers.MotionAdapter(
            block_out_channels=pictures.config.block_out_channels,
            motion_layers_per_block=pictures.config.layers_per_block,
            motion_num_attention_heads=heads,
            motion_max_seq_length=32,
        )
        unet = diffusers.UNetMotionModel.from_unet2d(pictures, motion)
        recompute_motion(unet)
        return unet

    latents, clip = ((1, 4, 2, 4, 4), "2 x 32x32") if tiny else ((1, 4, 16, 64, 64), "16 x 512x512")
    roles = ("cross_attention", "self_attention", "temporal_attention")
    text = (latents[2], 77, sd_width(tiny))  # this network takes separate text embeddings for each frame
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


class Stored:
    """Counts the memory that a model's forward pass stores for the backward pass: tensors saved by operations, and the
    inputs of parts that are recomputed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[int, torch.UntypedStorage] = {}

    def run(self, part: Any, *inputs: Any) -> Any:
        """Runs a part of the model that is recomputed in the backward pass."""
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                self._keep(tensor)
        return checkpoint(part.__call__, *inputs, use_reentrant=False)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside the context, what is stored is counted. Attention is counted as a fused kernel."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            before, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _fused_attention
            try:
                yield
            finally:
                F.scaled_dot_product_attention = before

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = storage
        return tensor

    @property
    def gib(self) -> float:
        weights = {p.untyped_storage()._cdata for p in self._model.parameters()}
        return sum(s.nbytes() for key, s in self._kept.items() if key not in weights) / 2**30


class _FusedAttention(torch.autograd.Function):
    """Stores what a fused attention kernel stores, but computes nothing. Meta tensors do not support these kernels."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return _FusedAttention.apply(query, key, value)


def measure(case: Case, row: Row, device: torch.device, seconds: float) -> None:
    """Trains the model for about `seconds` seconds and fills in the row."""
    torch.manual_seed(0)
    model = random_model(case.build, device)
    stored = Stored(model)
    if row.checkpointing:
        model.enable_gradient_checkpointing(stored.run)
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

    if device.type == "meta":
        with stored.counting():
            model(x.bfloat16(), t, encoder_hidden_states=text, return_dict=False)
        row.weights_gib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
        row.stored_gib = stored.gib
        return
    for _ in range(WARM_UPS):
        loss = step()
    synchronize(device)
    reset_peak(device)
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
    row.peak_gib = peak_gib(device)


def measured(case: Case, checkpointing: bool, device: torch.device, seconds: float) -> Row:
    """Runs a measurement and returns its row, even if the measurement fails."""
    row = Row(case.name, case.clip, checkpointing)
    row.error = failure(lambda: measure(case, row, device, seconds), device)
    return row


HEADER = ("model", "frames x size", "checkpointing", "trained", "s/step", "steps/s", "peak GiB", "utilisation")
WIDTHS = (20, 14, 13, 9, 7, 7, 8, 11)


def cells(row: Row) -> tuple[str, ...]:
    first = (row.model, row.clip, "on" if row.checkpointing else "off")
    if row.error:
        return (*first, row.error)
    if row.stored_gib is not None:
        return (*first, f"weights {row.weights_gib:.1f} GiB, stored for the backward pass {row.stored_gib:.1f} GiB")
    trained = "n/a" if row.trained is None else f"{row.trained / 1e6:.2f} M"
    busy = "n/a" if row.utilisation is None else f"{row.utilisation:.0f}%"
    numbers = (shown(row.seconds, ".3f"), shown(row.steps_per_second, ".3f"), shown(row.peak_gib, ".2f"))
    return (*first, trained, *numbers, busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="the duration of each measurement, in seconds")
    parser.add_argument("--tiny", action="store_true", help="use tiny sizes, to test this script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write the rows to")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = name_of(device)
    about = {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__, "lora": LORA}
    print(f"{name}; torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    rows: list[Row] = []
    for case in (animatediff(options.tiny), wan(options.tiny)):
        for checkpointing in (True, False):
            began = time.perf_counter()
            row = measured(case, checkpointing, device, options.seconds)
            rows.append(row)
            print(
                f"[{time.perf_counter() - began:.0f} s] {line(cells(row), WIDTHS)}", flush=True
            )  # printed right away, in case the run is cut short
            if options.out:
                options.out.write_text(json.dumps({**about, "rows": [asdict(r) for r in rows]}, indent=2) + "\n")
    print(f"\nLoRA: {LORA}")
    print(line(HEADER, WIDTHS))
    for row in rows:
        print(line(cells(row), WIDTHS))


if __name__ == "__main__":
    main()
