"""Fixtures for a tiny backbone in a folder, photos, and concepts learned from photos through the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import Ran

TINY = ("train.steps=2", "train.batch_size=2", "train.resolution=32", "sampling.steps=2")
CLASS = ("sources.class_pictures.num_images=2", "sources.class_pictures.steps=1")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("PCS_CACHE", str(tmp_path_factory.getbasetemp() / "pcs-cache"))


@pytest.fixture
def interrupted(pcs, monkeypatch) -> Callable[..., Ran]:
    """Returns a function that starts a training run as `pcs(…)` does and presses Ctrl-C after the first step."""

    def call(*arguments: Any) -> Ran:
        import os
        import signal

        from shared.commands.progress import Bar

        def step(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Bar, "step", step)
            return pcs(*arguments)

    return call


def paint(folder: Path, n: int = 3, side: int = 32, seed: int = 0) -> Path:
    """Saves `n` smooth random pictures to a folder. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        noise = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(100 * seed + i))
        small = Image.fromarray((noise * 255).byte().numpy())
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def painted() -> Callable[..., Path]:
    return paint


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    return paint(tmp_path_factory.mktemp("given") / "photos")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, make_tiny_sd) -> Path:
    """Saves the tiny Stable Diffusion model as a diffusers folder that can be given as `backbone=PATH`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    make_tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def learn(tiny_folder, photos) -> Callable[..., list[str]]:
    """Returns a function that builds the arguments of `pcs image personalize` for a run of two steps."""

    def arguments(recipe: str, *settings: str, images: Path | None = photos, noun: str = "mug") -> list[str]:
        subject = [f"subject.images={images}", f"subject.class_noun={noun}"] if images else []
        extra = CLASS if recipe == "dreambooth_lora" else ()
        return ["image", "personalize", recipe, f"backbone={tiny_folder}", *TINY, *extra, *subject, *settings]

    return arguments


@pytest.fixture(scope="session")
def concepts(tmp_path_factory, learn) -> dict[str, Path]:
    """Learns two concepts through the command line: `mug` (tokens and LoRA) and `rex` (a rare token and LoRA)."""
    import os

    from shared.cli import build, run

    root = tmp_path_factory.mktemp("concepts")
    before = os.environ.get("PCS_CACHE")
    os.environ["PCS_CACHE"] = str(tmp_path_factory.getbasetemp() / "pcs-cache")
    strong = ("phases.tune.trainable.lora.lr=0.05", "trainable.tokens.lr=0.5")
    assert run(build(), learn("pivotal_tuning", f"output={root / 'mug.concept'}", *strong)) == 0
    other = paint(root / "dogs", seed=1)
    strong = (f"output={root / 'rex.concept'}", "trainable.lora.lr=0.05")
    assert run(build(), learn("dreambooth_lora", *strong, images=other, noun="dog")) == 0
    if before is None:
        del os.environ["PCS_CACHE"]
    return {"mug": root / "mug.concept", "rex": root / "rex.concept"}
