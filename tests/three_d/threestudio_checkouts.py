"""Helpers that import threestudio from a checkout and save a concept to use with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pcs_3d.threestudio.launch import imported, tensors_on_cpu
from pcs_3d.threestudio.stand_ins import absent
from shared.concept import Provenance, capture, save
from shared.modifiers.learnable import LearnableToken
from shared.trainable import Lora

CHECKOUT = os.environ.get("PCS_THREESTUDIO")
CONTRACT = Path(__file__).parent / "contract"


def forget() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "threestudio"]:
        del sys.modules[name]
    sys.modules.pop("pcs_3d.threestudio.extension", None)


@contextmanager
def registry(folder: str) -> Iterator[Any]:
    """Imports `threestudio` from a folder, registers the extension, and yields the `threestudio` module."""
    forget()
    if find_spec("omegaconf"):  # importing a checkout registers resolvers, and each name can be registered only once
        import_module("omegaconf").OmegaConf.clear_resolvers()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        module = imported(absent())
        tensors_on_cpu()
        import_module("pcs_3d.threestudio.extension")
        yield module
    forget()


def write_concept(backbone, path: Path, seed: int = 0) -> Path:
    """Saves a concept with learned words and a LoRA, both of which have a visible effect."""
    modifier = LearnableToken(vectors=2, with_class_noun=True)
    modifier.attach(backbone, "my-mug", "mug")
    Lora(roles=("cross_attention",), rank=2).inject(backbone, "my-mug", "lora", 0)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tensors = [p for a in backbone.adapters["my-mug"] for p in a.parameters()]
        for p in [*tensors, *backbone.placeholders["my-mug"].parameters()]:
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
    saved = save(capture(backbone, "my-mug", Provenance(class_noun="mug", modifier=modifier)), path, overwrite=True)
    backbone.remove("my-mug")
    assert saved.path is not None
    return saved.path
