"""Reads untrusted safetensors files. The header is checked against the file, and nothing in the file is executed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared.io.failures import of_the_machine, reading

_MAX_HEADER = 32 * 1024 * 1024  # bytes
_MAX_DIMS = 8
_ITEM = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2},
    **{"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8},
}


def read_safetensors_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads the entries (dtype, shape and data_offsets by tensor name) and the metadata of a safetensors file.

    Raises ValueError, naming the file, if it is missing or truncated, or if the header is invalid or does not match the
    file.
    """
    path = Path(path)
    try:
        with reading(path), path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(
                    f"{path} is truncated, or not a safetensors file: a header of {length:,} bytes does not fit in it"
                )
            header = json.loads(stream.read(length))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path} is damaged, or not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header lists no tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path} is damaged: its metadata is not text")
    for name, entry in header.items():
        _check_entry(path, name, entry, size - 8 - length)
    return header, metadata


def _check_entry(path: Path, name: str, entry: Any, data: int) -> None:
    where = f"{path} is damaged or not made by safetensors: tensor {name!r}"
    if not isinstance(entry, dict) or entry.get("dtype") not in _ITEM:
        raise ValueError(f"{where} has no known dtype: {entry!s:.80}")
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    if not whole or len(shape) > _MAX_DIMS:
        raise ValueError(f"{where} has the invalid shape {shape}")
    pair = isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
    if not pair or not 0 <= span[0] <= span[1] <= data or span[1] - span[0] != math.prod(shape) * _ITEM[entry["dtype"]]:
        raise ValueError(
            f"{where} of shape {shape} and dtype {entry['dtype']} does not match its byte range {span} in the file"
        )


def safe_load_safetensors(path: str | os.PathLike[str], finite: bool = True) -> dict[str, Tensor]:
    """Reads the tensors of a file by name, on the CPU. Nothing in the file is executed.

    Raises ValueError, naming the file and the tensor, if the file is missing, truncated or malformed. If
    `finite` is set, also raises ValueError if a value is NaN or Inf.
    """
    read_safetensors_header(path)
    try:
        tensors = load_file(path, device="cpu")
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if of_the_machine(error):
            raise
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    for name, tensor in tensors.items():
        if finite and tensor.is_floating_point():
            values = tensor.float() if tensor.element_size() == 1 else tensor
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{path}: tensor {name!r} contains NaN or Inf")
    return tensors
