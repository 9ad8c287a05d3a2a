"""Starts threestudio's own `launch.py` on a machine without a GPU, or without some of the packages that it imports."""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pcs_3d.threestudio.stand_ins import INDIRECTLY_NEEDED, NEEDED, absent, standing_in


def launch(checkout: Path, arguments: Sequence[str], cpu: bool = False) -> None:
    """Runs `launch.py` with these arguments, in this process and with the checkout as the working directory.

    Missing packages that are listed in `REPLACEABLE` are replaced by stand-ins. If `cpu` is set, Lightning trains on
    the CPU in full precision, and threestudio's modules put their tensors on the CPU. Raises ValueError if there is no
    GPU and `cpu` is not set, or if a package without a stand-in is missing.
    """
    if not (cpu or torch.cuda.is_available()):
        raise ValueError("threestudio needs a GPU, but there is none: add --cpu to train on the CPU")
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    missing = absent()
    if missing:
        print(f"pcs: stand-ins replace packages that are not installed: {', '.join(missing)}", file=sys.stderr)
    imported(missing)
    if cpu:
        train_on_cpu()
        tensors_on_cpu()
    sys.argv = ["launch.py", *arguments]
    runpy.run_path("launch.py", run_name="__main__")


def imported(missing: Sequence[str]) -> Any:
    """Imports and returns the module `threestudio` from the first folder in `sys.path`, with stand-ins for the
    `missing` packages. Raises ValueError if a package without a stand-in is missing."""
    try:
        with standing_in(missing), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated names in torch.cuda.amp
            return import_module("threestudio")
    except ModuleNotFoundError as error:
        package = {**NEEDED, **INDIRECTLY_NEEDED}.get(error.name or "", error.name)
        raise ValueError(f"threestudio imports {error.name}, which is not installed: pip install {package}") from None


def train_on_cpu() -> None:
    """Makes Lightning's `Trainer` use the CPU even if it is asked to use a GPU."""
    import pytorch_lightning as lightning  # pyright: ignore[reportMissingImports]

    real = lightning.Trainer

    def trainer(*given: Any, **settings: Any) -> Any:
        return real(*given, **{**settings, "accelerator": "cpu", "devices": 1, "precision": "32-true"})

    lightning.Trainer = trainer


def tensors_on_cpu() -> None:
    """Makes the threestudio modules that are already imported use the CPU as their device."""
    misc = import_module("threestudio.utils.misc")
    before = misc.get_device
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "threestudio" and getattr(module, "get_device", None) is before:
            module.get_device = _cpu  # type: ignore[attr-defined]


def _cpu() -> torch.device:
    return torch.device("cpu")
