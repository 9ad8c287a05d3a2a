"""The clip part of the demo. It learns a motion from clips of other objects, and shows the subject moving in the same
way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from pcs_video.clips import ClipFiles, generate
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.demo import Asked, Bars, Exhibit
from shared.io.clips.read_clip import read_clip
from shared.io.clips.write_clip import write_clip
from shared.io.denoising_progress import named
from shared.recipe.resolve import load
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.sampling.settings import SamplingSettings
from shared.toybox.motions.held_out import held_out_motion
from shared.toybox.motions.reference_clips import write_motion

_SCENES = ("on the beach", "in the snow")
_FPS = 8.0
_SHOTS = 5  # frames per clip in the overview


def check(asked: Asked) -> None:
    """Raises ValueError if the motion or the recipe is unknown."""
    held_out_motion(asked.motion)
    load(asked.motion_recipe, _settings(asked), "video", VideoRecipe)


def show(asked: Asked, bars: Bars) -> Iterator[str | Exhibit]:
    """Learns the motion and generates clips with it.

    The clips show the subject if it was learned from pictures. Otherwise, they show an ordinary object of its class.
    """
    start = time.perf_counter()
    clips = write_motion(asked.motion, asked.out / "clips")
    yield f"clips        {len(clips)} clips of {asked.motion} in {asked.out / 'clips'}"
    planned = plan(load(asked.motion_recipe, _settings(asked), "video", VideoRecipe))
    known = [str(asked.concept)] if asked.concept.is_dir() else []
    runner = open_runner(VideoRunner, "toybox", [], "cpu")
    scorers = VideoRunner.scorers(planned, runner.backbone, None, None)
    with bars.bar() as progress:
        personalize(planned, runner, scorers=scorers, progress=progress)
    motion = _concept(asked)
    yield f"motion       {motion} ({time.perf_counter() - start:.0f} s)"
    runner = open_runner(VideoRunner, "toybox", [*known, str(motion)], "cpu")
    noun = asked.thing.thing.class_name
    thing = f"<{asked.concept.stem}>" if known else noun
    prompts = [f"a photo of a {thing} <{motion.stem}> {place}" for place in _SCENES]
    with bars.counter() as counter:
        files = ClipFiles(asked.out / "moving", _FPS, with_sheet=True)
        made = generate(runner, prompts, files, SamplingSettings(), progress=named(counter, "clips"))
    for prompt, file in zip(prompts, made, strict=False):
        yield f"clip         {file}"
        frames = read_clip(file).frames  # [3, F, H, W]
        playing = write_clip(file.with_suffix(".webp"), frames, _FPS)
        chosen = torch.linspace(0, frames.shape[1] - 1, _SHOTS).round().long()
        links = {"the clip": file, "its frames": files.sheet()}
        yield Exhibit("In motion", playing, f"“{prompt}”", more=links, shots=frames[:, chosen].transpose(0, 1))


def _concept(asked: Asked) -> Path:
    return asked.out / f"{asked.motion.split('-', 1)[-1]}.concept"


def _settings(asked: Asked) -> list[str]:
    return [f"subject.clips={asked.out / 'clips'}", f"output={_concept(asked)}"]
