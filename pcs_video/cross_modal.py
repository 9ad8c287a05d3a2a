"""Generates clips for `pcs concept evaluate`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pcs_video.runner import VideoRunner, clip_rate, opening
from shared.benchmark.modality import Asked, Made
from shared.benchmark.modality_shots import shots_of
from shared.concept import read
from shared.io.clips.write_clip import write_clip
from shared.runner.bars import Bars
from shared.runner.open_runner import open_runner, parse_concept


def check(asked: Asked) -> None:
    """Raises ValueError if the model does not generate clips, if a concept does not fit the model, or if `--motion` is
    not a motion."""
    _motion(asked)
    _opened(asked)


def make(asked: Asked, bars: Bars) -> Made:
    """Generates a clip with the requested motion for each standard prompt and each seed."""
    runner = _opened(asked)
    rate = clip_rate(runner, None)

    def write(pixels: Tensor, path: Path) -> Path:
        return write_clip(path.with_name(f"{path.name}.webp"), pixels, rate)

    return shots_of(runner, asked.inside("clips"), bars, write, _motion(asked))


def _opened(asked: Asked) -> VideoRunner:
    concepts = [asked.concept, *([asked.motion] if asked.motion else [])]
    how = opening(asked.motion_adapter, None)
    return open_runner(VideoRunner, asked.backbone, concepts, asked.device, "auto", asked.download, **how)


def _motion(asked: Asked) -> str:
    """Returns the motion's name, or "" if none is requested."""
    if asked.motion is None:
        return ""
    meta = read(parse_concept(asked.motion, "--motion")[0]).meta
    if meta.kind != "motion":
        raise ValueError(f"--motion {asked.motion}: {meta.name!r} is a {meta.kind}, not a motion")
    return meta.name
