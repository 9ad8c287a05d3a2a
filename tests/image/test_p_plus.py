"""P+ learns separate rows for each cross-attention layer. They can be saved, loaded and scaled, but not exported."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_image.runner import ImageRunner
from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.concept import Concept, export, read, save
from shared.io.read_subject import read_subject
from shared.modifiers import LearnableToken
from shared.recipe.resolve import load

SMALL = ("backbone=tiny", "train.steps=2", "train.batch_size=2", "train.resolution=32", "trainable.tokens.lr=0.1")


@pytest.fixture(scope="module")
def new(make_tiny_sd: Callable[..., Any]) -> Callable[[], StableDiffusionBackbone]:
    return lambda: StableDiffusionBackbone(make_tiny_sd(), "tiny")


@pytest.fixture(scope="module")
def learned(new: Callable[[], StableDiffusionBackbone], photos: Path, tmp_path_factory: Any) -> tuple[Any, Concept]:
    """Trains for two steps. Returns the backbone, with the concept attached, and the concept itself."""
    runner, folder = ImageRunner(new()), tmp_path_factory.mktemp("p_plus")
    frozen = _weights(runner.backbone)
    subjects = {"mug": read_subject(photos, "mug")}
    concepts = runner.personalize(subjects, load("p_plus", SMALL), folder / "run", tensorboard=False)
    after = _weights(runner.backbone)
    assert all(torch.equal(after[key], value) for key, value in frozen.items()), (
        "training changes none of the model's weights"
    )
    return runner.backbone, save(concepts["mug"], folder / "mug.concept")


def _weights(backbone: Any) -> dict[str, Tensor]:
    return {f"{c}.{k}": v.clone() for c, m in backbone.components.items() for k, v in m.state_dict().items()}


def predicted(backbone: Any) -> Tensor:
    noise, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    with torch.no_grad():
        return backbone.predict(noise, t, backbone.encode(["a photo of a <mug>"]))


def test_p_plus_matches_textual_inversion_before_training(new: Callable[[], StableDiffusionBackbone]) -> None:
    one, apart = new(), new()
    LearnableToken().attach(one, "mug", "mug")
    placeholder = LearnableToken(per="layer").attach(apart, "mug", "mug")
    prompt = ["a photo of a <mug> in the snow"]
    context, by_site = one.encode(prompt).context, apart.encode(prompt).context
    assert isinstance(by_site, dict) and tuple(by_site) == apart.text_sites() and len(by_site) > 1
    assert all(torch.equal(c.key, context) and torch.equal(c.value, context) for c in by_site.values())
    assert torch.equal(predicted(one), predicted(apart))
    assert sorted(placeholder.state_dict()) == sorted(f"text_encoder.{site}" for site in apart.text_sites())
    pooled = placeholder.embeddings("text_encoder", None, None)
    assert pooled is not None and torch.allclose(pooled, placeholder.start[f"text_encoder.{apart.text_sites()[0]}"])


def test_after_two_steps_every_layer_has_different_rows(learned: tuple[Any, Concept]) -> None:
    backbone, concept = learned
    rows, start = concept.learned_words, concept.initial_embeddings
    assert set(rows) == set(start) == {f"text_encoder.{site}" for site in backbone.text_sites()}
    assert not any(torch.equal(rows[key], start[key]) for key in rows)
    assert not any(torch.equal(a, b) for a, b in pairwise(rows.values()))


def test_a_saved_concept_loads_bit_for_bit_and_its_strength_can_be_lowered(
    learned: tuple[Any, Concept], new: Callable[[], StableDiffusionBackbone]
) -> None:
    backbone, concept = learned
    assert concept.path is not None
    runner = ImageRunner(new())
    LearnableToken(per="layer").attach(runner.backbone, "mug", "mug")
    start = predicted(runner.backbone)
    runner.backbone.remove("mug")
    runner.load(read(concept.path))
    full = predicted(runner.backbone)
    assert torch.equal(full, predicted(backbone)) and not torch.equal(full, start)
    runner.backbone.set_strength("mug", 0)
    assert torch.equal(predicted(runner.backbone), start)
    runner.backbone.set_strength("mug", 0.5)
    half, site = runner.backbone.placeholders["mug"], runner.backbone.text_sites()[1]
    rows, begun = (state[f"text_encoder.{site}"] for state in (concept.learned_words, concept.initial_embeddings))
    state = half.embeddings("text_encoder", None, site)
    assert state is not None and torch.allclose(state, (rows + begun) / 2, atol=1e-6)
    before = runner.backbone.tokens.current["text_encoder"]
    runner.unload("mug")
    assert runner.backbone.tokens.current["text_encoder"] is not before and not runner.backbone.placeholders


def test_the_error_for_exporting_p_plus_states_the_reason(learned: tuple[Any, Concept], tmp_path: Path) -> None:
    backbone, concept = learned
    with pytest.raises(
        ValueError, match="'mug' learned the tensors text_encoder.*store only one table of vectors per text encoder"
    ):
        export(concept, tmp_path / "out", backbone=backbone)
    assert not (tmp_path / "out").exists()


def test_rows_for_other_layers_are_refused(new: Callable[[], StableDiffusionBackbone]) -> None:
    backbone = new()
    placeholder = LearnableToken(per="layer").attach(backbone, "mug", "mug")
    state = placeholder.state_dict()
    first, *_ = state
    with pytest.raises(ValueError, match=r"embeddings are for text_encoder\..* and \d+ more"):
        placeholder.load_state_dict({("text_encoder.gone" if k == first else k): v for k, v in state.items()})


def test_a_model_without_cross_attention_refuses_p_plus(make_tiny_flux: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"modifier\.per=layer: flux has no cross-attention layers"):
        LearnableToken(per="layer").attach(FluxBackbone(make_tiny_flux(), "tiny"), "mug", "mug")


def test_p_plus_has_the_same_training_settings_as_textual_inversion_on_the_toybox() -> None:
    on_toybox, elsewhere = load("p_plus"), load("p_plus", ["backbone=x"])
    inversion = load("textual_inversion")
    assert on_toybox.train == inversion.train and on_toybox.trainable == inversion.trainable
    assert (elsewhere.train.steps, elsewhere.train.batch_size, elsewhere.trainable["tokens"].lr) == (500, 8, 5e-3)
