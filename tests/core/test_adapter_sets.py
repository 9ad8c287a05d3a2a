"""Adapters in a separate set are trained, survive an interruption, and are saved and loaded with the concept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.concept import Provenance, attach, capture, read, save
from shared.train.training_run import TrainingRun
from shared.trainable import Lora
from tests.core.runs import finish, learned, same, session, small

TWO = (
    *("trainable.near.kind=lora", "trainable.near.rank=2", "trainable.near.lr=0.05"),
    *("trainable.far.kind=lora", "trainable.far.rank=3", "trainable.far.lr=0.05", "trainable.far.adapter_set=far"),
    *("trainable.far.dropout=0.5", "train.checkpoint_every=1", "train.steps=3"),
)


def two_sets(backbone: Any, photos: Any, workdir: Any) -> TrainingRun:
    return session(backbone, small("textual_inversion", *TWO), photos, workdir)


@torch.no_grad()
def output(backbone: Any) -> torch.Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return backbone.predict(noise, torch.tensor([400]), backbone.encode([backbone.placeholders["mug"].words]))


def test_a_concept_includes_adapters_in_another_set(tiny, photos, tmp_path):
    run = two_sets(tiny(), photos, tmp_path / "run")
    finish(run)
    backbone = run.backbone
    assert set(backbone.adapters) == {"mug", "far"}
    provenance = Provenance(class_noun="mug", recipe=run.recipe)
    concept = capture(backbone, "mug", provenance, adapter_sets=run.adapter_sets)
    again = read(save(concept, tmp_path / "mug.concept").path or "")
    assert set(again.meta.adapters) == {"near", "far"}
    fresh = tiny()
    attach(again, fresh)
    by_slot = {adapter.slot: adapter.state_dict() for adapter in fresh.adapters["mug"]}
    for name, slot in (("mug", "near"), ("far", "far")):
        (adapter,) = backbone.adapters[name]
        assert adapter.slot == slot and same(adapter.state_dict(), by_slot[slot])
        assert any(v.abs().max() > 0 for k, v in by_slot[slot].items() if "lora_B" in k), "the set was not trained"
    assert torch.equal(output(fresh), output(backbone))
    fresh.remove("mug")
    assert not fresh.adapters


def test_adapters_in_another_set_survive_an_interruption(tiny, photos, tmp_path):
    whole = finish(two_sets(tiny(), photos, tmp_path / "whole"))
    assert any(key.startswith("adapter/far/") for key in whole)
    cut = two_sets(tiny(), photos, tmp_path / "run")
    steps = cut.steps()
    next(steps), next(steps)
    steps.close()
    assert not same(learned(cut), whole)
    assert same(finish(two_sets(tiny(), photos, tmp_path / "run"), resume=True), whole)


def test_an_adapter_set_with_the_same_name_as_a_loaded_concept_is_refused(tiny, photos, tmp_path):
    """Without this check, the run would go on training the loaded concept and remove it at the end."""
    backbone = tiny()
    Lora(rank=2).inject(backbone, "far", "lora", seed=0)
    with pytest.raises(ValueError, match=r"trainable\.far\.adapter_set = 'far': a loaded concept has this name"):
        two_sets(backbone, photos, tmp_path / "run")
