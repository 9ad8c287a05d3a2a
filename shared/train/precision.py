"""The precision that a run computes in."""

from __future__ import annotations

import torch

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(asked: str, device: torch.device | str) -> str:
    """Resolves a precision to "no", "bf16" or "fp16".

    "auto" selects half precision if it is fast on the device, and "no" otherwise.

    Raises ValueError for fp16 on a CPU, and for an unknown precision.
    """
    kind = torch.device(device).type
    if asked != "auto" and asked not in DTYPES:
        raise ValueError(f"train.mixed_precision = {asked!r}: choose auto, no, bf16 or fp16")
    if asked == "fp16" and kind == "cpu":
        raise ValueError("train.mixed_precision=fp16 needs a GPU; use bf16, auto or no")
    if asked != "auto":
        return asked
    if kind == "cuda":  # older GPUs only emulate bf16, which is slow
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if kind == "cpu" and _fast_bf16() else "no"


def _fast_bf16() -> bool:
    """Whether this processor has bf16 instructions."""
    checks = (getattr(torch.cpu, n, None) for n in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)
