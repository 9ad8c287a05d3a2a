"""Every recipe in `configs/image` starts from the unchanged model, and its concept can be saved and fully removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_image.runner import ImageRunner
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.concept import attach, read, save
from shared.io.read_subject import read_subject
from shared.recipe.catalog import recipe_files
from shared.recipe.phases import expand_phases
from tests.core.runs import finish, paint, session, small

SHIPPED = sorted(recipe_files("image"))
PLAIN = "a photo of a mug on the beach"


@pytest.fixture(scope="module")
def new(make_tiny_sd: Any) -> Any:
    return lambda: StableDiffusionBackbone(make_tiny_sd(), "tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paints photos with masks, which some recipes require."""
    return paint(tmp_path_factory.mktemp("shipped") / "photos")


@torch.no_grad()
def predicted(backbone: Any, prompt: str = PLAIN) -> Tensor:
    t, noise = torch.tensor([500]), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return backbone.predict(noise, t, backbone.encode([backbone_words(backbone, prompt)], t))


def backbone_words(backbone: Any, prompt: str) -> str:
    return prompt.replace("<mug>", backbone.placeholders["mug"].words) if "mug" in backbone.placeholders else prompt


def trace(backbone: Any) -> Any:
    networks = {**backbone.components, "vae": backbone.vae}
    weights = {f"{c}.{n}": p.detach().clone() for c, m in networks.items() for n, p in m.named_parameters()}
    return [repr(m) for m in networks.values()], weights


def same(a: Any, b: Any) -> bool:
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(v, b[1][k]) for k, v in a[1].items())


@pytest.mark.parametrize("name", SHIPPED)
def test_the_model_is_unchanged_before_training(new, photos, tmp_path, name):
    backbone = new()
    before = predicted(backbone)
    run = session(backbone, small(name, "train.steps=0"), photos, tmp_path / "run")
    finish(run)
    adapted = {
        slot for _, phase in expand_phases(run.recipe) for slot, p in phase.trainable.items() if p.kind != "tokens"
    }
    assert bool(adapted) == (run.run_name in backbone.adapters)
    assert torch.equal(predicted(backbone), before)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_saved_concept_equals_the_learned_one_and_removing_it_restores_the_model(new, photos, tmp_path, name):
    backbone = new()
    before, look = predicted(backbone), trace(backbone)
    runner = ImageRunner(backbone)
    subjects = {"mug": read_subject(photos, "mug")}
    concepts = runner.personalize(subjects, small(name), tmp_path / "run", tensorboard=False)
    learned = predicted(backbone, "a photo of a <mug>"), predicted(backbone)
    assert not torch.equal(learned[0], before)
    save(concepts["mug"], tmp_path / "mug.concept")
    elsewhere = new()
    attach(read(tmp_path / "mug.concept"), elsewhere)
    assert torch.equal(predicted(elsewhere, "a photo of a <mug>"), learned[0])
    assert torch.equal(predicted(elsewhere), learned[1])
    for used in (backbone, elsewhere):
        used.remove("mug")
        assert torch.equal(predicted(used), before) and same(trace(used), look)
        assert not any(p.requires_grad for m in used.components.values() for p in m.parameters())
