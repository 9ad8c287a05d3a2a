"""Separately learned concepts are merged in closed form (Custom Diffusion).

The results are compared with brute-force solutions in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.cli import build, run
from shared.concept import Concept, Provenance, attach, capture, read, save
from shared.concept.concept_folder import adapter_id, with_fields
from shared.concept.merge import merge, solve
from shared.modifiers import LearnableToken, RareToken
from shared.trainable import Lora, Weights
from shared.trainable.delta import find_parameter

CAPTIONS = [f"a photo of a {thing} {place}" for thing in ("dog", "cat", "toy") for place in ("on the beach", "in snow")]


def learned(
    backbone: Any,
    name: str,
    noun: str,
    seed: int,
    roles: tuple[str, ...] = ("cross_attention.kv",),
    vectors: int = 1,
) -> Concept:
    """Returns a concept with a learned word and changed weights, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    modifier = LearnableToken(with_class_noun=True, vectors=vectors)
    placeholder = modifier.attach(backbone, name, noun)
    group = Weights(roles=roles).inject(backbone, name, "weights", seed=0)
    with torch.no_grad():
        for p in (*placeholder.parameters(), *group.parameters):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    concept = capture(backbone, name, Provenance(class_noun=noun, modifier=modifier))
    backbone.remove(name)
    return concept


@pytest.fixture
def both(sd) -> list[Concept]:
    return [learned(sd, "rex", "dog", 1), learned(sd, "cup", "mug", 2)]


@torch.no_grad()
def features(backbone: Any, prompt: str) -> Tensor:
    """Returns the text features of a prompt at every position, `[L, d]`."""
    return backbone.encode([prompt]).context[0].double()


def words(backbone: Any, concept: Concept) -> Tensor:
    """Returns the text features of the words "<name> noun" in "a photo of a <name> noun".

    In that prompt, they follow five other tokens.
    """
    attach(concept, backbone)
    vectors = features(backbone, f"a photo of a {backbone.placeholders[concept.name].words}")[5:7]
    backbone.remove(concept.name)
    return vectors


def weight_of(backbone: Any, key: str) -> Tensor:
    parameter = find_parameter(backbone, key)
    assert parameter is not None
    return parameter


def changes(concept: Concept) -> dict[str, Tensor]:
    return {k.partition(".")[2]: v.double() for k, v in concept.of("weights").items()}


def test_the_closed_form_is_the_constrained_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    weight, targets, values, regular = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((5, 8), (3, 8), (3, 5), (40, 8))
    )
    gram = regular.T @ regular
    system = torch.cat([torch.cat([2 * gram, targets.T], 1), torch.cat([targets, torch.zeros(3, 3)], 1)])
    right = torch.cat([2 * gram @ weight.T, values])
    expected = torch.linalg.solve(system, right)[:8].T
    change = solve(weight, targets, values, gram)
    assert torch.allclose(weight + change, expected, atol=1e-9)
    assert torch.allclose((weight + change) @ targets.T, values.T, atol=1e-9)


def test_several_changes_to_one_weight_add_up(sd, both):
    """Two parts of one recipe may change the same weight."""
    whole = both[0]
    (paths,) = whole.meta.weights.values()
    halves = {f"{slot}.{k}": v / 2 for slot in ("one", "two") for k, v in changes(whole).items()}
    meta = with_fields(whole.meta, weights={"one": paths, "two": paths})
    twofold = replace(whole, meta=meta, tensors={**whole.tensors, "weights": {k: v.float() for k, v in halves.items()}})
    expected, got = merge(both, sd, CAPTIONS), merge([twofold, both[1]], sd, CAPTIONS)
    for one, two in zip(expected, got, strict=True):
        assert all(torch.allclose(v, changes(two)[k], atol=1e-6) for k, v in changes(one).items())


@pytest.mark.parametrize("method", ["closed_form", "sum"])
def test_another_loaded_concept_is_not_merged_in(sd, both, method):
    alone = merge(both, sd, CAPTIONS, method)
    loaded = Lora(rank=2, roles=("text_encoder", "cross_attention.kv")).inject(sd, "other", "lora", seed=0)
    weights = Weights(roles=("text_encoder", "cross_attention.kv")).inject(sd, "other", "weights", seed=0)
    with torch.no_grad():
        for p in (*loaded.parameters, *weights.parameters):
            p.add_(0.1)
    beside = merge(both, sd, CAPTIONS, method)
    for one, two in zip(alone, beside, strict=True):
        assert all(torch.equal(v, two.of("weights")[k]) for k, v in one.of("weights").items())


def test_concept_words_keep_their_meaning_with_the_least_change_to_other_text(sd, both):
    merged = merge(both, sd, CAPTIONS)
    assert [c.name for c in merged] == ["rex", "cup"] and not sd.adapters and not sd.placeholders
    word_features = [words(sd, c) for c in both]
    targets, regular = torch.cat(word_features), torch.cat([features(sd, c) for c in CAPTIONS])
    # Layer norm confines the features to a hyperplane. Without a small penalty, changes perpendicular to it would be
    # determined by rounding errors alone.
    spread = regular.square().sum(0).mean().sqrt()
    regular = torch.cat([regular, 1e-9**0.5 * spread * torch.eye(regular.shape[1])])
    free = torch.linalg.svd(targets).Vh[len(targets) :].T  # directions in which a change does not affect the words
    new = changes(merged[0])
    assert len(new) == 2 * len(sd.text_sites()) and all(torch.equal(v, changes(merged[1])[k]) for k, v in new.items())
    for key, delta in new.items():
        weight = weight_of(sd, key).detach().double()
        for mine, concept in zip(word_features, both, strict=True):
            value = mine @ (weight + changes(concept)[key]).T
            assert torch.allclose(mine @ (weight + delta).T, value, atol=1e-6)
        # least squares over all changes that meet the constraints, by brute force
        some = torch.linalg.lstsq(targets, targets @ delta.T).solution
        rest = torch.linalg.lstsq(regular @ free, -regular @ some, driver="gelsd").solution
        least = (regular @ (some + free @ rest)).square().sum()
        assert (regular @ delta.T).square().sum() <= least * (1 + 1e-5) + 1e-12


def test_the_merged_change_is_applied_once_and_its_sources_are_recorded(sd, both, tmp_path):
    merged = merge(both, sd, CAPTIONS)
    assert {c.meta.adapter_id for c in merged} == {adapter_id(merged[0].tensors)}, (
        "the id must be set before the concepts are saved"
    )
    for concept in merged:
        save(concept, tmp_path / f"{concept.name}.concept")
    again = [read(tmp_path / f"{c.name}.concept") for c in both]
    key = "unet." + sd.group("cross_attention.kv")[0].modules[0] + ".weight"
    weight = weight_of(sd, key)
    start = weight.detach().clone()
    for concept in again:
        attach(concept, sd)
    assert torch.allclose(weight, start + changes(merged[0])[key].float(), atol=1e-6), (
        "the merged change was not applied exactly once"
    )
    assert again[0].meta.metrics == {"merged": "rex, cup", "merge_method": "closed_form"}
    assert again[0].meta.adapter_id == again[1].meta.adapter_id != both[0].meta.adapter_id
    for concept, old in zip(again, both, strict=True):
        assert all(torch.equal(v, old.of("embeddings")[k]) for k, v in concept.of("embeddings").items())
        sd.remove(concept.name)
    assert torch.equal(weight, start)


def test_the_sum_method_adds_up_the_changes(sd, both):
    summed = changes(merge(both, sd, [], "sum")[0])
    a, b = (changes(c) for c in both)
    assert all(torch.allclose(v, a[k] + b[k], atol=1e-6) for k, v in summed.items())


def test_concepts_that_cannot_be_merged_are_refused_with_the_reason(sd, flux, both):
    rex, cup = both
    lora = Lora(rank=2).inject(sd, "lora", "lora", 0) and capture(sd, "lora")
    sd.remove("lora")
    RareToken().attach(sd, "plain", "dog")
    plain = capture(sd, "plain", Provenance(class_noun="dog", modifier=RareToken()))
    sd.remove("plain")
    wide = learned(sd, "wide", "cat", 3, ("cross_attention",))
    keys = {k: v for k, v in cup.of("weights").items() if ".to_k." in k}
    paths = [k.split(".", 2)[2] for k in keys]
    half = Concept(with_fields(cup.meta, weights={"weights": {"unet": paths}}), {**cup.tensors, "weights": keys})
    other = Concept(with_fields(cup.meta, backbone={**cup.meta.backbone.model_dump(), "family": "flux"}), cup.tensors)
    twin = Concept(with_fields(rex.meta, name="twin"), rex.tensors)
    mixed = Concept(
        with_fields(cup.meta, adapters=lora.meta.adapters, layers=lora.meta.layers, weights={}), cup.tensors
    )
    mixed = Concept(mixed.meta.model_copy(update={"weights": cup.meta.weights}), cup.tensors)
    cut = Concept(cup.meta, {**cup.tensors, "weights": {k: v[:-1] for k, v in cup.of("weights").items()}})
    for concepts, message in (
        ([rex], "two or more"),
        (
            [cut, rex],
            r"has shape \[\d+, 16\] in the concepts, but \[\d+, 16\] here: merge them on the model that they were learned on",
        ),
        ([rex, learned(sd, "long", "cat", 4, vectors=40)], "the prompt is too long"),
        ([rex, mixed], "'cup' has adapters: only changes to the keys and values of cross-attention can be merged"),
        ([rex, cup, rex], "two of the concepts are called 'rex'"),
        ([rex, other], "'rex' was learned on stable_diffusion, but 'cup' on flux"),
        ([rex, lora], "'lora' has adapters: only changes to the keys and values of cross-attention can be merged"),
        ([rex, plain], "'plain' changes no weights: only changes to the keys and values"),
        ([rex, wide], r"'wide' changes unet\..*to_(q|out\.0).*: only changes to the keys and values"),
        ([rex, half], r"'rex' and 'cup' change different layers \(\d+ in only one of them, for example unet\..*to_v"),
        ([rex, twin], "the words of 'rex', 'twin' cannot be told apart"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(concepts, sd, CAPTIONS)
        assert not sd.adapters and not sd.placeholders
    with pytest.raises(ValueError, match="unknown method 'mean'.*closed_form, sum"):
        merge(both, sd, CAPTIONS, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs captions"):
        merge(both, sd, [])


def test_the_command_writes_one_folder_per_concept_or_nothing(sd, both, tmp_path, make_tiny_sd, capsys):
    make_tiny_sd().save_pretrained(tmp_path / "model")
    folders = [save(c, tmp_path / f"{c.name}.concept").path for c in both]
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n\n")
    call = [
        "concept",
        "merge",
        *map(str, folders),
        "--backbone",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "both"),
    ]
    assert run(build(), [*call, "--captions", str(tmp_path / "captions.txt")]) == 0
    assert [p.name for p in sorted((tmp_path / "both").iterdir())] == ["cup.concept", "rex.concept"]
    expected = changes(merge(both, sd, CAPTIONS)[0])
    merged = changes(read(tmp_path / "both" / "rex.concept"))
    assert all(torch.allclose(v, expected[k], atol=1e-6) for k, v in merged.items())
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "both" / f"{n}.concept") for n in ("rex", "cup")]
    assert run(build(), call) == 2 and "already exists" in capsys.readouterr().err
    assert run(build(), [*call, "--overwrite"]) == 0, "without --captions, plain prompts should be used"
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert run(build(), [*call[:-1], str(tmp_path / "new"), "--captions", str(empty)]) == 2
    assert "contains no captions" in capsys.readouterr().err and not (tmp_path / "new").exists()
    empty.write_text("a dog\n" * 2_000_000)
    assert run(build(), [*call[:-1], str(tmp_path / "new"), "--captions", str(empty)]) == 2
    assert "--captions" in (said := capsys.readouterr().err) and "12,000,000 bytes, above the limit" in said
