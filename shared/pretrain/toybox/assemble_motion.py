"""Packs the result of training the motion module into the shipped folders."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from shared.io.outputs import take_place
from shared.pretrain.toybox.assemble import plain_configs, readable
from shared.pretrain.toybox.motion_module import averaged, motion_folder
from shared.toybox.weights import WEIGHTS
from shared.train import checkpoint


def assemble_motion(work: Path, backbone: Path | None = None, target: Path | None = None) -> Path:
    """Packs the averaged motion module in fp16 into a diffusers `MotionAdapter` folder, and writes the learned words
    into the backbone's tokenizer and text encoder. Each folder is replaced only when the new one is complete.

    Args:
        backbone: the pipeline folder on which the module was trained. The default is the shipped backbone.
        target: the folder for the motion module. The default is ``shared/toybox/weights/motion_adapter``.
    """
    backbone, target = backbone or WEIGHTS / "backbone", target or WEIGHTS / "motion_adapter"
    pipe, adapter = averaged(work, backbone)
    _write(target, lambda fresh: _adapter(adapter, fresh, work))
    _write(backbone, lambda fresh: _words(pipe, backbone, fresh))
    return target


def _adapter(adapter: Any, fresh: Path, work: Path) -> None:
    adapter.to(torch.float16).save_pretrained(str(fresh))
    state = checkpoint.load(motion_folder(work))
    assert state is not None  # the averages have already been read from it
    facts = {"step": state.step, "clips": state.info["pictures"], **state.info["facts"]}
    (fresh / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _words(pipe: Any, backbone: Path, fresh: Path) -> None:
    """Writes a copy of the backbone with the learned embeddings in its text encoder and the new words in its
    tokenizer."""
    shutil.copytree(backbone, fresh, dirs_exist_ok=True)
    pipe.text_encoder.to(torch.float16).save_pretrained(str(fresh / "text_encoder"))
    pipe.tokenizer.save_pretrained(str(fresh / "tokenizer"))


def _write(target: Path, fill: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fill(fresh)
        plain_configs(fresh)
        readable(fresh)
        take_place(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
