"""Helpers that run training on tiny backbones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shared.io.read_subject import read_subject
from shared.recipe.resolve import load
from shared.recipe.schema import Recipe
from shared.sampling import sampler
from shared.sampling.settings import SamplingSettings
from shared.train.learned_state import gather
from shared.train.training_run import TrainingRun
from shared.train.tune import Tune
from shared.types import Step

SMALL = ("backbone=tiny", "train.steps=2", "train.batch_size=2", "train.resolution=32")
CLASS = ("sources.class_pictures.num_images=3", "sources.class_pictures.steps=1", "sources.class_pictures.batch_size=3")


def paint(folder: Path) -> Path:
    """Writes three 32×32 pictures with masks to `folder`, and three of another subject to its sibling `other`."""
    (folder / "masks").mkdir(parents=True)
    other = folder.parent / "other"
    other.mkdir()
    area = Image.new("L", (32, 32))
    area.paste(255, (8, 4, 24, 28))
    for i in range(3):
        noise = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(i))
        picture = Image.fromarray((noise * 255).byte().numpy()).resize((32, 32), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i}.png")
        picture.rotate(90).save(other / f"{i}.png")
        area.save(folder / "masks" / f"{i}.png")
    return folder


def sample(backbone: Any, prompts: Any, *, seeds: Any, **settings: Any) -> Tensor:
    """Calls `shared.sampling.sampler.sample`. The keyword arguments are the fields of its `SamplingSettings`."""
    return sampler.sample(backbone, prompts, seeds=seeds, settings=SamplingSettings(**settings))


def small(name: str, *settings: str) -> Recipe:
    """Loads a shipped recipe, cut down to two steps on tiny pictures."""
    return load(name, [*SMALL, *(CLASS if "class_pictures" in load(name).sources else ()), *settings])


def session(backbone: Any, recipe: Recipe, photos: Path, workdir: Path, **changes: Any) -> TrainingRun:
    def generate(prompts, seeds, *, guidance: float, steps: int, resolution: int, progress=None) -> Tensor:
        return sample(
            backbone, prompts, seeds=seeds, guidance=guidance, steps=steps, height=resolution, width=resolution
        )

    def make(prompts, seeds, recipe: Recipe, start=None) -> Tensor:
        how = {"guidance": recipe.sampling.guidance, "steps": recipe.sampling.steps, "start": start}
        return sample(backbone, prompts, seeds=seeds, height=32, width=32, **how)

    subjects = {"mug": read_subject(photos, "mug")}
    cache = workdir.parent / "cache"
    settings = {"class_pictures": generate, "make": make, "tensorboard": False, **changes}
    return TrainingRun(backbone, recipe, settings.pop("subjects", subjects), workdir, cache, **settings)


def learned(run: TrainingRun) -> dict[str, Tensor]:
    return gather(run.backbone, run.names, run.adapter_sets)


def finish(run: TrainingRun, resume: bool = False) -> dict[str, Tensor]:
    for _ in run.steps(resume):
        pass
    return learned(run)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def tuning(run: TrainingRun) -> Tune:
    """Returns the task of a run's first phase, ready for its first step."""
    if run.names[0] not in run.backbone.placeholders:
        run._attach_names()
    return Tune(run.context(0, run._unfreeze(run.phases[0][1])))


def predicted(task: Tune, step: int = 0) -> Step:
    """Returns the state of one training step."""
    with task.state(step, 0) as state:
        return state
