"""An external modifier whose rows depend on the attention site and the timestep can be trained, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from shared.concept import Provenance, attach, capture, export, lines, read, save
from shared.config import Part, default_kind
from shared.io.read_subject import read_subject
from shared.modifiers import Modifier
from shared.modifiers.base import PlaceholderBase
from shared.recipe.resolve import load
from shared.recipe.schema import Recipe
from shared.train.training_run import TrainingRun


class Spread(PlaceholderBase):
    """A placeholder with one row for each attention site and an extra row that is scaled by the timestep."""

    varies_with = frozenset({"time", "site"})
    components = ("text_encoder",)

    def __init__(self, name: str, start: Tensor, sites: tuple[str, ...]) -> None:
        super().__init__(name, f"<{name}>")
        self.tokens, self.sites = (f"<{name}>",), sites
        self.table = {key: nn.Parameter(start.clone(), requires_grad=False) for key in (*sites, "time")}

    def embeddings(self, component: str, t: Tensor | None, site: str | None) -> Tensor | None:
        assert t is not None and site is not None
        return self.table[site] + self.table["time"] * t[:, None, None] / 1000

    def parameters(self) -> Any:
        return iter(self.table.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {f"rows.{k}": v.detach().clone() for k, v in self.table.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert set(state) == {f"rows.{k}" for k in self.table}
        for key, rows in self.table.items():
            rows.data.copy_(state[f"rows.{key}"])


class PerSiteAndTime(Part):
    kind: Literal["per_site_and_time"] = "per_site_and_time"

    def attach(self, backbone: Any, name: str, class_noun: str, seed: int = 0) -> Spread:
        placeholder = Spread(name, backbone.word_embeddings("text_encoder", class_noun)[:1], backbone.text_sites())
        backbone.add_placeholder(placeholder)
        return placeholder


Wider = Annotated[Modifier | Annotated[PerSiteAndTime, Field()], Field()]


class WiderRecipe(Recipe):
    modifier: Annotated[Wider, default_kind("rare_token")] = PerSiteAndTime()  # type: ignore[assignment]


def predicted(backbone: Any) -> Tensor:
    noise, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    with torch.no_grad():
        return backbone.predict(noise, t, backbone.encode(["a photo of a <mug>"], t))


@pytest.fixture
def trained(new_sd: Callable[..., Any], tmp_path: Path) -> Any:
    """Trains for two steps on one picture. Returns the backbone and the recipe."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32), (200, 40, 40)).save(tmp_path / "photos/0.png")
    settings = ["backbone=tiny", "train.steps=2", "train.resolution=32", "modifier.kind=per_site_and_time"]
    recipe = load("textual_inversion", [*settings, "trainable.tokens.lr=0.1"], model=WiderRecipe)
    backbone = new_sd()
    subjects = {"mug": read_subject(tmp_path / "photos", "mug")}
    run = TrainingRun(backbone, recipe, subjects, tmp_path / "run", tmp_path / "cache", tensorboard=False)
    assert len(list(run.steps())) == 2
    return backbone, recipe


def test_an_external_modifier_can_be_trained_saved_and_loaded(
    trained: Any, new_sd: Callable[..., Any], tmp_path: Path
) -> None:
    backbone, recipe = trained
    learned = predicted(backbone)
    concept = capture(backbone, "mug", Provenance(class_noun="mug", recipe=recipe))
    assert concept.meta.embeddings == {"text_encoder": 16} and not concept.meta.layers
    assert len(concept.tensors["embeddings"]) == len(backbone.text_sites()) + 1
    loaded = read(save(concept, tmp_path / "mug.concept").path or "")
    fresh = new_sd()
    attach(loaded, fresh, modifiers=Wider)
    assert torch.equal(predicted(fresh), learned) and fresh.placeholders["mug"].frozen
    fresh.placeholders["mug"].load_state_dict(
        Spread("o", fresh.word_embeddings("text_encoder", "mug")[:1], fresh.text_sites()).state_dict()
    )
    assert not torch.equal(predicted(fresh), learned), "the two steps changed the rows"
    assert any("rows.time: 1 × 16" in line for line in lines(loaded))


def test_unsupported_uses_of_an_external_modifier_are_refused(
    trained: Any, new_sd: Callable[..., Any], tmp_path: Path
) -> None:
    backbone, recipe = trained
    concept = capture(backbone, "mug", Provenance(class_noun="mug", recipe=recipe))
    fresh = new_sd()
    with pytest.raises(ValueError, match="the concept 'mug': modifier: unknown kind 'per_site_and_time'"):
        attach(concept, fresh)
    with pytest.raises(ValueError, match="work only at strength 1"):
        attach(concept, fresh, 0.5, modifiers=Wider)
    assert not fresh.placeholders
    with pytest.raises(
        ValueError, match="diffusers' embedding files can store only one table of vectors per text encoder"
    ):
        export(concept, tmp_path / "out", backbone=backbone)
    assert not (tmp_path / "out").exists()
