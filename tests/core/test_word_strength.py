"""Like adapters, learned words have a strength. At 0, they have their initial values; at 1, their learned values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.concept import Concept, Provenance, attach, capture, export, read, save
from shared.concept.concept_folder import with_fields
from shared.modifiers import LearnableToken, PlainText, RareToken
from shared.modifiers.base import PlaceholderBase
from shared.prompts import expand
from shared.trainable import Lora
from tests.core.runs import sample


def learned(backbone: Any, lora: bool = False, noun: str = "mug", **settings: Any) -> Concept:
    """Returns a concept with learned tokens (and an adapter if `lora` is set), detached from the backbone."""
    modifier = LearnableToken(**settings)
    placeholder = modifier.attach(backbone, "x", noun, seed=5)
    for parameter in placeholder.parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    if lora:
        for parameter in Lora(rank=2).inject(backbone, "x", "lora", 0).parameters:
            parameter.data += 0.2
    concept = capture(backbone, "x", Provenance(class_noun=noun, modifier=modifier, seed=5))
    backbone.remove("x")
    return concept


def picture(backbone: Any, prompt: str = "a photo of a <x> on the beach") -> Tensor:
    return sample(backbone, [expand(prompt, backbone.placeholders)], seeds=[0], steps=2, height=32, width=32)


def at(backbone: Any, concept: Concept, strength: float) -> Tensor:
    attach(concept, backbone, strength)
    made = picture(backbone)
    backbone.remove("x")
    return made


def test_the_strength_interpolates_between_the_class_noun_and_the_learned_words(
    new_sd: Callable[..., Any], tmp_path: Path
) -> None:
    backbone = new_sd()
    concept = read(save(learned(backbone), tmp_path / "x.concept").path or "")
    none, half, full = (at(backbone, concept, s) for s in (0.0, 0.5, 1.0))
    base = picture(backbone, "a photo of a mug on the beach")
    assert torch.equal(none, base) and not torch.equal(full, base)
    assert not torch.equal(half, full) and not torch.equal(half, base)


def test_the_rows_are_interpolated_linearly_by_strength(backbone: Any) -> None:
    concept = learned(backbone, vectors=3)
    for strength in (0.0, 0.25, 1.0, 1.5):
        attach(concept, backbone, strength)
        for component, rows in concept.learned_words.items():
            start = concept.initial_embeddings[component]
            got = backbone.placeholders["x"].embeddings(component, None, None)
            assert torch.allclose(got, start + strength * (rows - start), atol=1e-6)
            assert strength not in (0.0, 1.0) or torch.equal(got, rows if strength else start)
        assert backbone.strengths == {"x": strength}
        backbone.remove("x")


def test_switching_concepts_sets_and_restores_the_strength_of_their_words(new_sd: Callable[..., Any]) -> None:
    backbone = new_sd()
    attach(learned(backbone), backbone, 0.5)
    before = picture(backbone)
    with backbone.active({"x": 0.0}):
        assert torch.equal(picture(backbone), picture(backbone, "a photo of a mug on the beach"))
        with pytest.raises(RuntimeError), backbone.active({"x": 1.0}):
            assert backbone.strengths == {"x": 1.0}
            raise RuntimeError
        assert backbone.strengths == {"x": 0.0}
    with backbone.active({}):
        assert torch.equal(picture(backbone), before), "words that are not given a new strength keep their current one"
    assert torch.equal(picture(backbone), before)


def test_adapters_and_words_share_one_strength(new_sd: Callable[..., Any]) -> None:
    backbone = new_sd()
    concept = learned(backbone, lora=True)
    assert torch.equal(at(backbone, concept, 0.0), picture(backbone, "a photo of a mug on the beach"))
    attach(concept, backbone, 0.5)
    text = backbone.encode([backbone.placeholders["x"].words]).context
    backbone.set_strength("x", 1.0)
    assert not torch.equal(backbone.encode([backbone.placeholders["x"].words]).context, text)


def test_the_missing_initial_rows_of_an_older_concept_are_computed_from_the_model(new_sd: Callable[..., Any]) -> None:
    backbone = new_sd()
    concept = learned(backbone, vectors=2)
    old = replace(concept, tensors={"embeddings": concept.learned_words})
    for strength in (0.0, 0.5, 1.0):
        assert torch.equal(at(backbone, old, strength), at(backbone, concept, strength)), (
            "the initial rows are recomputed from the run's seed"
        )


@pytest.mark.parametrize("modifier", [PlainText(words="red"), RareToken()])
def test_words_without_learned_rows_have_no_strength(new_sd: Callable[..., Any], modifier: Any) -> None:
    backbone = new_sd()
    modifier.attach(backbone, "x", "mug")
    concept = capture(backbone, "x", Provenance(class_noun="mug", modifier=modifier))
    backbone.remove("x")
    with pytest.raises(ValueError, match="'x' learned nothing that a strength could scale"):
        attach(concept, backbone, 0.5)
    assert not backbone.placeholders
    attach(concept, backbone)


def test_a_placeholder_without_interpolation_refuses_strengths_other_than_1(new_sd: Callable[..., Any]) -> None:
    class Learned(PlaceholderBase):
        components = ("text_encoder",)

        def parameters(self) -> Any:
            return iter([torch.nn.Parameter(torch.ones(1))])

    backbone = new_sd()
    backbone.add_placeholder(Learned("x", "sks"))
    with pytest.raises(ValueError, match="the learned words of 'x' work only at strength 1, not 0.5"):
        backbone.set_strength("x", 0.5)
    with pytest.raises(ValueError, match="work only at strength 1"), backbone.active({"x": 0.5}):
        pass
    assert backbone.strengths == {"x": 1.0}


@pytest.mark.parametrize("lora", [False, True], ids=["tokens", "tokens and lora"])
def test_an_export_folds_the_strength_into_the_words(backbone: Any, tmp_path: Path, lora: bool) -> None:
    concept = learned(backbone, vectors=2)
    concept = with_lora(backbone, concept) if lora else concept
    report = export(concept, tmp_path / "half", backbone=backbone, strength=0.5)
    assert report["checks"]["text"]["ok"] and report["checks"]["text"]["effect"] > 0
    for entry in report["tokens"]:
        component = entry["component"]
        rows = load_file(tmp_path / "half" / entry["file"])["<x>"]
        middle = (concept.initial_embeddings[component] + concept.learned_words[component]) / 2
        assert torch.allclose(rows, middle, atol=1e-6)
    bare = replace(concept, tensors={**concept.tensors, "embeddings": concept.learned_words})
    again = export(bare, tmp_path / "bare", backbone=backbone, strength=0.5)
    assert {n: h for n, h in again["files"].items() if "embeds" in n} == {
        n: h for n, h in report["files"].items() if "embeds" in n
    }


def with_lora(backbone: Any, concept: Concept) -> Concept:
    for parameter in Lora(roles=("attention",), rank=2).inject(backbone, "x", "lora", 0).parameters:
        parameter.data += 0.2
    adapted = capture(backbone, "x")
    backbone.remove("x")
    meta = with_fields(adapted.meta, **{k: getattr(concept.meta, k) for k in ("modifier", "class_noun", "seed")})
    return replace(adapted, meta=meta, tensors={**adapted.tensors, **concept.tensors})
