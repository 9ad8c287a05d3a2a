"""Measures the peak memory that a computation adds, and parses memory sizes such as "8G"."""

from __future__ import annotations

import os
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def parse_bytes(text: str, option: str) -> int:
    """Parses a size such as "8G", "8 GiB", "512M" or "1.5gb" into bytes. Units are powers of 1024.

    Raises ValueError, naming the option, if the text is not a size.
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if size <= 0:
        raise ValueError(f"{option} {text!r} is not a size: write 8G, 1.5G or 512M, for example")
    return size


def peak_during(work: Callable[[], Any], device: torch.device) -> int:
    """Returns the peak number of bytes in tensors while `work` runs, minus the number allocated beforehand."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        activity = torch.profiler.ProfilerActivity.CPU
        with _quiet(), torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
            work()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    return _highest(e.nbytes() for e in results.events() if e.name() == "[memory]")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences standard error, to which the profiler's native code writes a notice."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _highest(changes: Iterable[int]) -> int:
    total = most = 0
    for change in changes:
        total += change
        most = max(most, total)
    return most


def in_use(device: torch.device) -> int:
    """Returns the number of bytes in use by tensors if the device is a GPU, and by the whole process otherwise.

    On systems without /proc, the process's peak is returned instead of its current use.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
