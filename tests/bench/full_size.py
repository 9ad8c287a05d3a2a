"""What the benchmarks of full-size models share: random weights, the use of the GPU, failures and tables."""

from __future__ import annotations

import gc
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch

WEIGHT_STD = 0.02  # small enough that activations stay finite through all layers


def sd_unet(tiny: bool) -> Any:
    """Returns a U-Net of the size of Stable Diffusion 1.5 or, if `tiny`, one with the same structure."""
    channels = (32, 64) if tiny else (320, 640, 1280, 1280)
    crossed = len(channels) - 1  # the number of blocks with cross-attention
    return diffusers.UNet2DConditionModel(
        sample_size=8 if tiny else 64,
        down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
        block_out_channels=channels,
        layers_per_block=1 if tiny else 2,
        cross_attention_dim=sd_width(tiny),
        attention_head_dim=2 if tiny else 8,
    )


def sd_width(tiny: bool) -> int:
    """Returns the width of the text embeddings that `sd_unet` takes."""
    return 16 if tiny else 768


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside the context, `dtype` is the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_model(build: Callable[[], Any], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Builds a model on the device with small, frozen random weights, in the precision that `from_pretrained` would give
    it."""
    with device, default_dtype(dtype):
        model = build().eval().requires_grad_(False)
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


def failure(work: Callable[[], None], device: torch.device) -> str:
    """Does the work and frees the memory that it used. Returns why it failed, or "" if it did not."""
    reason = ""
    try:
        work()
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # the next measurement may still succeed
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except Exception as error:  # some errors make CUDA unusable, which the next row will report
            reason = reason or f"{type(error).__name__} while freeing memory"
    return reason


def peak_gib(device: torch.device) -> float | None:
    """Returns the peak GPU memory allocated since `reset_peak`, in GiB, or None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def shown(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def line(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=False)).rstrip()
