"""Concepts load exactly as they were saved, and concepts that are incompatible with a model are refused."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.concept import Concept, Provenance, attach, capture, detach, fits, read, save
from shared.concept.concept_folder import with_fields
from shared.modifiers import LearnableToken, RareToken
from shared.trainable import Lora
from shared.trainable.adapter import PeftAdapter
from shared.trainable.delta import DeltaAdapter, find_parameter

PROMPT = "a photo of a <my-mug> on the beach"
ROLES = ("cross_attention", "text_encoder")


def output(backbone: Any, prompt: str = "a photo of a mug") -> torch.Tensor:
    noise = torch.randn(1, *backbone.latent_shape(32, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return backbone.predict(noise, torch.tensor([400]), backbone.encode([prompt]))


def learn(backbone: Any, name: str = "my-mug", slot: str = "lora", seed: int = 0, **settings: Any) -> None:
    """Adds an adapter that has an effect, as if it had been trained."""
    group = Lora(**{"roles": ROLES, "rank": 4, "alpha": 2.0, "dropout": 0.3, **settings}).inject(
        backbone, name, slot, 0
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in group.parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    for adapter in backbone.adapters[name]:
        if isinstance(adapter, PeftAdapter):
            adapter.train(False)


def learned(backbone: Any, name: str = "my-mug", **settings: Any) -> Concept:
    modifier = LearnableToken(vectors=2)
    placeholder = modifier.attach(backbone, name, "mug")
    for parameter in placeholder.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    learn(backbone, name, **settings)
    return capture(
        backbone, name, Provenance(class_noun="mug", modifier=modifier, recipe={"method": "test", "seed": 7})
    )


def expanded(backbone: Any, name: str = "my-mug") -> str:
    return PROMPT.replace(f"<{name}>", backbone.placeholders[name].words)


def traces(backbone: Any) -> tuple[Any, ...]:
    """Returns everything that must be restored when a concept is removed."""
    networks = [(repr(m), sorted(m.state_dict()), hasattr(m, "peft_config")) for m in backbone.components.values()]
    return (
        networks,
        output(backbone).tolist(),
        sorted(backbone.placeholders),
        sorted(backbone.adapters),
        backbone.strengths,
    )


# --- round trip


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_reloaded_concept_gives_the_same_outputs_bit_for_bit(family: str, request: Any, tmp_path: Path) -> None:
    make = request.getfixturevalue(f"new_{family}")
    backbone = make()
    roles = ROLES if family == "sd" else ("attention", "text_encoder")
    concept = learned(backbone, roles=roles)
    expected = output(backbone, expanded(backbone))
    save(concept, tmp_path / "my-mug.concept")
    fresh = make()
    before = traces(fresh)
    attach(read(tmp_path / "my-mug.concept"), fresh)
    assert torch.equal(output(fresh, expanded(fresh)), expected)
    assert not torch.equal(output(fresh, expanded(fresh)), output(make(), "a photo of a mug on the beach"))
    assert fresh.placeholders["my-mug"].frozen
    assert not any(p.requires_grad for m in fresh.components.values() for p in m.parameters())
    detach(fresh, "my-mug")
    assert traces(fresh) == before


def test_everything_in_the_description_survives_saving(new_sd: Callable[..., Any], tmp_path: Path) -> None:
    backbone = new_sd()
    learned(backbone)
    picture = tmp_path / "IMG 1.jpg"
    picture.write_bytes(b"not opened")
    concept = capture(
        backbone,
        "my-mug",
        Provenance(
            kind="identity",
            class_noun="mug",
            modifier=LearnableToken(vectors=2),
            recipe={"subject": {"images": "/home/anna/photos"}, "backbone": "/models/sd", "seed": 7},
            metrics={"clip_t": 0.31, "broken": float("nan")},
            references=[picture],
            ports=["cross_attention: the text stream"],
        ),
    )
    again = read(save(concept, tmp_path / "c.concept").path or "")
    assert again.meta.recipe == {"subject": {"images": "photos"}, "backbone": "sd", "seed": 7}
    assert again.meta.references[0].file == "IMG 1.jpg"
    assert again.meta.references[0].sha256 == hashlib.sha256(b"not opened").hexdigest()
    assert again.meta.metrics == {"clip_t": 0.31, "broken": None}
    assert (again.meta.kind, again.meta.seed, again.meta.ports) == (
        "identity",
        7,
        ("cross_attention: the text stream",),
    )
    assert set(again.meta.layers) == {"text_encoder", "unet"} and again.meta.embeddings == {"text_encoder": 16}
    assert "torch" in again.meta.versions and again.meta.created
    for kind, tensors in concept.tensors.items():
        assert all(torch.equal(again.tensors[kind][k], v) for k, v in tensors.items())


def test_strength_moves_the_output_from_the_base_to_the_concept(new_sd: Callable[..., Any]) -> None:
    backbone = new_sd()
    concept = learned(backbone)
    prompt = "a photo of a mug"
    full, base = output(backbone, prompt), output(new_sd(), prompt)
    outs = {}
    for strength in (0.0, 0.5, 1.0):
        fresh = new_sd()
        attach(concept, fresh, strength)
        outs[strength] = output(fresh, prompt)
        assert fresh.strengths == {"my-mug": strength}
    assert torch.equal(outs[0.0], base) and torch.equal(outs[1.0], full)
    assert 0 < (outs[0.5] - base).norm() < (full - base).norm()


def test_a_concept_with_a_rare_token_survives_saving(new_sd: Callable[..., Any], tmp_path: Path) -> None:
    backbone = new_sd()
    RareToken().attach(backbone, "my-mug", "mug")
    learn(backbone)
    concept = capture(backbone, "my-mug", Provenance(class_noun="mug", modifier=RareToken()))
    save(concept, tmp_path / "c")
    fresh = new_sd()
    attach(read(tmp_path / "c"), fresh)
    assert fresh.placeholders["my-mug"].words == "sks mug"
    assert torch.equal(output(fresh, expanded(fresh)), output(backbone, expanded(backbone)))


def test_dora_adapters_convolutions_and_several_slots_survive_saving(
    new_sd: Callable[..., Any], tmp_path: Path
) -> None:
    backbone = new_sd()
    RareToken().attach(backbone, "lora_x", "mug")
    learn(backbone, "lora_x", "lora_A", roles=("self_attention", "conv"), rank=3)
    learn(backbone, "lora_x", "fine", roles=("cross_attention",), dora=True)
    learn(backbone, "lora_x", "both", roles=("attention",), rank=2)
    save(capture(backbone, "lora_x", Provenance(class_noun="mug", modifier=RareToken())), tmp_path / "c")
    fresh = new_sd()
    attach(read(tmp_path / "c"), fresh, 1.0)
    assert torch.equal(output(fresh), output(backbone))


def test_changed_weights_follow_the_strength_and_leave_no_trace_when_removed(
    new_sd: Callable[..., Any], tmp_path: Path
) -> None:
    backbone = new_sd()
    before = traces(backbone)
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    weight = backbone.denoiser.get_parameter(key.partition(".")[2])
    original, change = weight.detach().clone(), torch.randn_like(weight)
    DeltaAdapter.inject(backbone, "a", "weights", {key: change})
    DeltaAdapter.inject(backbone, "b", "weights", {key: 2 * change})
    learn(backbone, "b")  # wraps the same layer
    assert torch.allclose(weight, original + 3 * change)
    with backbone.active({"b": 0.5}):
        assert torch.allclose(weight, original + change)
        with backbone.active({}):
            assert torch.equal(weight, original)
    concept = capture(backbone, "b")
    backbone.remove("a")
    assert torch.allclose(weight, original + 2 * change)
    backbone.remove("b")
    assert traces(backbone) == before and torch.equal(weight, original) and not hasattr(weight, "_delta_stack")
    save(concept, tmp_path / "b.concept")
    attach(read(tmp_path / "b.concept"), backbone, 0.5)
    assert torch.allclose(weight, original + change)
    detach(backbone, "b")
    assert traces(backbone) == before


def test_two_adapters_of_one_kind_stay_separate(new_sd: Callable[..., Any], tmp_path: Path) -> None:
    backbone = new_sd()
    learn(backbone, slot="wide", rank=2, roles=("self_attention",), seed=1)
    learn(backbone, slot="deep", rank=5, roles=("attention", "text_encoder"), seed=2)
    shared, other = "unet.conv_in.bias", "text_encoder.embeddings.position_embedding.weight"
    for slot, keys in {"one": (shared,), "two": (shared, other)}.items():
        deltas = {k: torch.randn_like(find_parameter(backbone, k)) for k in keys}  # type: ignore[arg-type]
        DeltaAdapter.inject(backbone, "my-mug", slot, deltas)
    concept = capture(backbone, "my-mug")
    again = read(save(concept, tmp_path / "c").path or "")
    assert {s: c["unet"]["r"] for s, c in again.meta.adapters.items()} == {"wide": 2, "deep": 5}
    assert again.meta.weights == {
        "one": {"unet": ("conv_in.bias",)},
        "two": {"unet": ("conv_in.bias",), "text_encoder": (other.partition(".")[2],)},
    }
    assert set(again.of("weights")) == {f"one.{shared}", f"two.{shared}", f"two.{other}"}
    fresh = new_sd()
    attach(again, fresh)
    states = [(a.slot, a.state_dict()) for a in fresh.adapters["my-mug"]]
    for adapter, (slot, state) in zip(backbone.adapters["my-mug"], states, strict=True):
        assert adapter.slot == slot and all(torch.equal(v, state[k]) for k, v in adapter.state_dict().items())
    assert torch.equal(output(fresh), output(backbone))


# --- several concepts


def test_concepts_from_one_run_share_their_adapter(new_sd: Callable[..., Any]) -> None:
    backbone = new_sd()
    for name in ("cup", "pot"):
        LearnableToken().attach(backbone, name, "mug")
    learn(backbone, "run")
    both = [
        capture(backbone, n, Provenance(class_noun="mug", modifier=LearnableToken()), adapter_sets=["run"])
        for n in ("cup", "pot")
    ]
    assert both[0].meta.adapter_id == both[1].meta.adapter_id
    expected = output(backbone)
    fresh = new_sd()
    before = traces(fresh)
    for concept in both:
        attach(concept, fresh, 0.7)
    with fresh.active({"cup": 1.0, "pot": 1.0}):
        assert torch.equal(output(fresh), expected)  # the shared adapter is applied once, not twice
    with fresh.active({"pot": 1.0}):
        assert torch.equal(output(fresh), expected)
    with fresh.active({}):
        assert torch.equal(output(fresh), output(new_sd()))
    detach(fresh, "cup")
    other = with_fields(learned(new_sd(), "cup", seed=9).meta)
    attach(Concept(other, learned(new_sd(), "cup", seed=9).tensors), fresh)  # the name 'cup' is free again
    detach(fresh, "cup")
    with fresh.active({"pot": 1.0}):
        assert torch.equal(output(fresh), expected)
    with pytest.raises(ValueError, match=r"learned together.*same strength.*'pot' has 0\.7.*1 was given for 'cup'"):
        attach(both[0], fresh, 1.0)
    detach(fresh, "pot")
    assert traces(fresh) == before


def test_removing_one_concept_leaves_the_others_unchanged(new_sd: Callable[..., Any]) -> None:
    a, b = learned(new_sd(), "cup", seed=1), learned(new_sd(), "pot", seed=2)
    backbone, alone = new_sd(), new_sd()
    attach(a, backbone, 0.0)
    attach(b, backbone)
    detach(backbone, "pot")
    attach(a, alone, 0.0)
    assert torch.equal(output(backbone), output(alone)) and torch.equal(output(backbone), output(new_sd()))
    assert not any(p.requires_grad for p in backbone.denoiser.parameters())


def test_attaching_a_concept_twice_is_refused(new_sd: Callable[..., Any]) -> None:
    concept, backbone = learned(new_sd()), new_sd()
    attach(concept, backbone)
    with pytest.raises(ValueError, match="'my-mug' is already attached"):
        attach(concept, backbone)


# --- incompatible concepts


def _rebuilt(pipe: Any, **changes: Any) -> StableDiffusionBackbone:
    pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, **changes})
    return StableDiffusionBackbone(pipe, "other")


def test_a_model_of_another_family_or_shape_is_refused_with_the_reason(
    new_sd: Callable[..., Any], new_flux: Callable[..., Any], make_tiny_sd: Callable[..., Any]
) -> None:
    concept = learned(new_sd())
    small = _rebuilt(make_tiny_sd(), block_out_channels=(8, 16, 16))
    shallow = _rebuilt(make_tiny_sd(), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"))
    for other, reason in (
        (
            new_flux(),
            r"learned on stable_diffusion \(tiny\), but this backbone is flux \(tiny-flux\), which can load .* flux",
        ),
        (small, r"its unet\.down_blocks\.0\.\S+to_k has shape \[16, 16\], but here the shape is \[8, 16\]"),
        (
            shallow,
            r"4 of the 28 layers of unet that it changes do not exist here \(for example, down_blocks\.0\.attentions",
        ),
    ):
        assert re.search(reason, fits(concept, other) or "")
        before = traces(other)
        with pytest.raises(ValueError, match=reason):
            attach(concept, other)
        assert traces(other) == before


def test_word_embeddings_of_another_width_are_refused_with_the_reason(new_sd: Callable[..., Any]) -> None:
    concept, wide = learned(new_sd(), roles=("cross_attention",)), new_sd()
    table = wide.components["text_encoder"].get_input_embeddings()
    table.weight = torch.nn.Parameter(torch.zeros(len(table.weight), 24))
    with pytest.raises(
        ValueError, match="its word embeddings have 16 values in text_encoder, but this model's have 24"
    ):
        attach(concept, wide)


def test_another_checkpoint_of_the_same_shape_works_with_a_warning(new_sd: Callable[..., Any]) -> None:
    concept, other = learned(new_sd()), new_sd(seed=1)
    with pytest.warns(UserWarning, match="a checkpoint with different weights"):
        attach(concept, other)
    assert "my-mug" in other.adapters
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(concept, new_sd())


def _without(concept: Concept, drop: Callable[[str], bool]) -> Concept:
    tensors = {k: {n: t for n, t in v.items() if not drop(n)} for k, v in concept.tensors.items()}
    return Concept(concept.meta, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: _without(c, lambda k: "mid_block" in k), r"\d+ tensors missing, 0 unknown"),
        (
            lambda c: _without(c, lambda k: k.startswith("lora.unet")),
            r"lora\.unet: no tensors for an adapter on \d+ modules",
        ),
        (
            lambda c: Concept(c.meta, {**c.tensors, "adapter": {**c.of("adapter"), "x.unet.y": torch.ones(1)}}),
            r"1 of \d+ adapter tensors .* belong to no adapter, for example 'x\.unet\.y'",
        ),
        (
            lambda c: Concept(c.meta, {**c.tensors, "embeddings": {"text_encoder": torch.zeros(2, 99)}}),
            r"embeddings of text_encoder are \[2, 99\], but this model needs \[2, 16\]",
        ),
        (
            lambda c: Concept(c.meta, {**c.tensors, "embeddings": {}}),
            "embeddings are for none, but this model needs text_encoder",
        ),
        (
            lambda c: Concept(c.meta, {**c.tensors, "weights": {"w.unet.nowhere.weight": torch.ones(1)}}),
            r"1 changed weights of 'my-mug' belong to no slot, for example 'w\.unet\.nowhere\.weight'",
        ),
        (lambda c: Concept(with_fields(c.meta, embeddings={"text_encoder_2": 16}), c.tensors), "needs text_encoder_2"),
        (
            lambda c: Concept(with_fields(c.meta, embeddings={"unet": 16}), c.tensors),
            "it needs unet; this backbone has",
        ),
        (lambda c: Concept(with_fields(c.meta, modifier={"kind": "magic"}), c.tensors), "unknown kind 'magic'"),
        (
            lambda c: Concept(
                with_fields(c.meta, adapters={"lora": {"unet": {**c.meta.adapters["lora"]["unet"], "r": 4096}}}),
                c.tensors,
            ),
            r"rank 4096 is too large for its",
        ),
    ],
)
def test_a_partly_incompatible_concept_is_refused_and_leaves_no_trace(
    new_sd: Callable[..., Any], change: Callable[[Concept], Concept], message: str
) -> None:
    concept, backbone = change(learned(new_sd())), new_sd()
    before = traces(backbone)
    with pytest.raises(ValueError, match=message):
        attach(concept, backbone)
    assert traces(backbone) == before


def test_target_modules_that_do_not_exist_are_refused(new_sd: Callable[..., Any]) -> None:
    concept, backbone = learned(new_sd()), new_sd()
    settings = {**concept.meta.adapters["lora"]["unet"], "target_modules": ["nowhere.to_q"]}
    text = concept.meta.adapters["lora"]["text_encoder"]
    adapters = {"lora": {"text_encoder": text, "unet": settings}}
    with pytest.raises(ValueError, match=r"unet does not list 'nowhere\.to_q'"):
        with_fields(concept.meta, adapters=adapters)
    layers = {**concept.meta.layers, "unet": {**concept.meta.layers["unet"], "nowhere.to_q": (16, 16)}}
    meta = with_fields(concept.meta, adapters=adapters, layers=layers)
    before = traces(backbone)
    with pytest.raises(
        ValueError, match=r"1 of the 29 layers of unet that it changes do not exist here \(for example, nowhere\.to_q"
    ):
        attach(Concept(meta, concept.tensors), backbone)
    assert traces(backbone) == before


def test_capturing_requires_an_attached_concept_and_its_modifier(new_sd: Callable[..., Any]) -> None:
    backbone = new_sd()
    with pytest.raises(ValueError, match="nothing is attached under 'x'"):
        capture(backbone, "x")
    RareToken().attach(backbone, "x", "mug")
    with pytest.raises(ValueError, match="give the modifier"):
        capture(backbone, "x", Provenance(class_noun="mug"))
