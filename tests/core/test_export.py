"""diffusers itself loads our exports and gives the same results with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.backbones.flux import FluxBackbone
from shared.concept import Concept, Provenance, attach, capture, export
from shared.concept import diffusers_format as files
from shared.modifiers import LearnableToken, PlainText
from shared.trainable import Lora
from shared.trainable.delta import DeltaAdapter

LORA, TOKENS = files.LORA_FILE, files.TOKEN_FILE


def learn(backbone: Any, name: str = "my-mug", slot: str = "lora", **settings: Any) -> None:
    group = Lora(**{"roles": ("cross_attention",), "rank": 4, **settings}).inject(backbone, name, slot, 0)
    generator = torch.Generator().manual_seed(len(slot))
    for parameter in group.parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def with_tokens(backbone: Any, vectors: int, name: str = "my-mug", **settings: Any) -> LearnableToken:
    modifier = LearnableToken(vectors=vectors, **settings)
    for parameter in modifier.attach(backbone, name, "mug").parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return modifier


def taken(backbone: Any, modifier: Any = None, name: str = "my-mug") -> Concept:
    concept = capture(backbone, name, Provenance(class_noun="mug", modifier=modifier))
    backbone.remove(name)
    return concept


def state(backbone: Any) -> Any:
    with torch.no_grad():
        hidden = backbone.encode(["a photo of a mug"])
    networks = [(repr(m), sorted(m.state_dict()), hasattr(m, "peft_config")) for m in backbone.components.values()]
    tokenizers = [len(t) for t in backbone.tokens.base.values()]
    return networks, hidden.context.tolist(), tokenizers, sorted(backbone.placeholders), sorted(backbone.adapters)


# --- LoRA


@pytest.mark.parametrize(
    "slots",
    [
        {"lora": {}},
        {"lora": {"rank": 4, "alpha": 1.0}},
        {"lora": {"rank": 2, "alpha": 7.0, "roles": ("self_attention", "conv", "feed_forward", "proj")}},
        {"lora": {"roles": ("cross_attention", "text_encoder", "text_encoder.mlp"), "alpha": 2.0}},
        {"lora": {"roles": ("text_encoder",)}},
        {"one": {"rank": 2, "alpha": 3.0}, "another": {"rank": 5, "alpha": 1.0, "roles": ("attention", "conv")}},
        {"dora": {"dora": True, "alpha": 2.0, "roles": ("cross_attention", "conv", "text_encoder")}},
        {"dora": {"dora": True}, "words": {"roles": ("text_encoder",), "rank": 3, "alpha": 1.0}},
    ],
    ids=["plain", "alpha", "convolutions", "text too", "text alone", "overlapping", "dora", "dora and text"],
)
def test_lora_exports_for_stable_diffusion_match_the_concept(
    new_sd: Callable[..., Any], tmp_path: Path, slots: Any, request: Any
) -> None:
    backbone, strength = new_sd(), 1.0 if request.node.callspec.id == "plain" else 0.6
    for slot, settings in slots.items():
        learn(backbone, slot=slot, **settings)
    concept = taken(backbone)
    before = state(backbone)
    report = export(concept, tmp_path / "out", backbone=backbone, strength=strength)
    check = report["checks"]["denoiser"]
    assert check["ok"] and check["max_abs_difference"] < 1e-4
    only_text = {r for s in slots.values() for r in s.get("roles", ("cross_attention",))} == {"text_encoder"}
    assert check["effect"] == 0 if only_text else check["effect"] > 0.01
    assert state(backbone) == before
    assert all("alpha" not in k for k in load_file(tmp_path / "out" / LORA))
    assert json.loads((tmp_path / "out/export.json").read_text()) == report


@pytest.mark.parametrize("dora", [False, True])
def test_lora_exports_for_flux_match_the_concept(new_flux: Callable[..., Any], tmp_path: Path, dora: bool) -> None:
    backbone = new_flux()
    learn(backbone, roles=("attention", "feed_forward", "proj", "text_encoder"), alpha=2.0, dora=dora)
    if not dora:
        learn(backbone, slot="second", roles=("cross_attention",), rank=2)
    report = export(taken(backbone), tmp_path / "out", backbone=backbone)
    assert all(c["ok"] and c["effect"] > 0.01 for k, c in report["checks"].items() if k != "text")
    keys = set(load_file(tmp_path / "out" / LORA))
    assert {k.split(".")[0] for k in keys} == {"transformer", "text_encoder"}
    assert all(k.startswith("text_encoder.text_model.encoder.layers.") for k in keys if k.startswith("text"))


def test_exports_from_a_half_precision_backbone_are_also_checked(new_sd: Callable[..., Any], tmp_path: Path) -> None:
    backbone = new_sd().to(dtype=torch.bfloat16)
    learn(backbone, roles=("attention", "text_encoder"), rank=8)
    assert export(taken(backbone), tmp_path / "out", backbone=backbone)["checks"]["denoiser"]["ok"]


# --- tokens


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("with_class_noun", [True, False])
def test_token_exports_for_stable_diffusion_match_the_concept(
    new_sd: Callable[..., Any], tmp_path: Path, vectors: int, with_class_noun: bool
) -> None:
    backbone = new_sd()
    modifier = with_tokens(backbone, vectors, with_class_noun=with_class_noun)
    concept = taken(backbone, modifier)
    before = state(backbone)
    report = export(concept, tmp_path / "out", backbone=backbone)
    assert report["checks"]["text"]["effect"] > 0.01 and state(backbone) == before
    stored = load_file(tmp_path / "out" / TOKENS)
    assert list(stored) == ["<my-mug>"] and stored["<my-mug>"].shape == (vectors, 16)
    assert report["prompt"] == "a photo of a <my-mug>" + (" mug" if with_class_noun else "")
    assert not (tmp_path / "out" / LORA).exists()


@pytest.mark.parametrize("vectors", [1, 3])
def test_token_and_lora_exports_for_flux_match_the_concept(
    new_flux: Callable[..., Any], tmp_path: Path, vectors: int
) -> None:
    backbone = new_flux()
    modifier = with_tokens(backbone, vectors, "Cup_2")
    learn(backbone, "Cup_2", roles=("attention",))
    before_remove = taken(backbone, modifier, "Cup_2")
    report = export(before_remove, tmp_path / "out", backbone=backbone)
    assert {"denoiser", "text", "pooled text"} == set(report["checks"])
    assert all(c["effect"] > 0.01 for c in report["checks"].values())
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted(
        [
            "README.txt",
            "export.json",
            "learned_embeds.text_encoder.safetensors",
            "learned_embeds.text_encoder_2.safetensors",
            LORA,
        ]
    )


def test_the_readme_sets_the_end_token_of_an_old_clip(
    new_flux: Callable[..., Any], make_tiny_flux: Callable[..., Any], tmp_path: Path
) -> None:
    pipe = make_tiny_flux()
    # With this id, as in FLUX.1, CLIP pools at the highest token id, which would be the id of an added token.
    pipe.text_encoder.eos_token_id = 2
    pipe.tokenizer.add_tokens("not a token of CLIP's")
    backbone = FluxBackbone(pipe, "old")
    concept = taken(backbone, with_tokens(backbone, 1))
    assert export(concept, tmp_path / "out", backbone=backbone)["checks"]["pooled text"]["ok"]
    line = "pipe.text_encoder.eos_token_id = pipe.tokenizer.eos_token_id"
    assert line in (tmp_path / "out/README.txt").read_text() and pipe.text_encoder.eos_token_id == 2
    learned = new_flux()
    export(taken(learned, with_tokens(learned, 1)), tmp_path / "new", backbone=learned)
    assert line not in (tmp_path / "new/README.txt").read_text()


def test_the_code_in_the_readme_works(new_sd: Callable[..., Any], tmp_path: Path) -> None:
    backbone = new_sd()
    model = tmp_path / "model"
    backbone.pipeline().save_pretrained(model)
    backbone.name = str(model)
    modifier = with_tokens(backbone, 2)
    learn(backbone, roles=("attention", "text_encoder"), alpha=2.0)
    concept = taken(backbone, modifier)
    export(concept, tmp_path / "out", strength=0.8)  # the backbone is found through the concept's record
    text = (tmp_path / "out/README.txt").read_text()
    code = "\n".join(re.findall(r"^    (.*)$", text, re.M)).replace("{folder}", str(tmp_path / "out"))
    assert str(tmp_path) not in text and "{model} with the path of model (weights " in text
    code = code.replace("{model}", str(model))
    *load, use = code.splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(load), names)  # safe to execute, because we wrote these lines ourselves
    assert use == "pipe(\"a photo of a <my-mug>\").images[0].save('picture.png')"
    attach(concept, backbone, 0.8)
    with torch.no_grad():
        theirs = names["pipe"].encode_prompt("a photo of a <my-mug>", "cpu", 1, False)[0]
        ours = backbone.encode([f"a photo of a {backbone.placeholders['my-mug'].words}"]).context
    assert torch.allclose(theirs, ours, atol=1e-4)


# --- refused exports


def _dora_on_part(backbone: Any) -> None:
    learn(backbone, slot="a", dora=True)
    learn(backbone, slot="b", roles=("self_attention",))


def _dora_shared(backbone: Any) -> None:
    learn(backbone, slot="a", dora=True)
    learn(backbone, slot="b")


def _weights(backbone: Any) -> None:
    learn(backbone)
    DeltaAdapter.inject(backbone, "my-mug", "weights", {"unet.conv_in.bias": torch.ones(16)})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_dora_on_part, r"unet has DoRA on \d+ layers and plain LoRA on \d+"),
        (_dora_shared, "DoRA and another slot are both on"),
        (_weights, "contains changed weights"),
    ],
)
def test_the_error_says_what_the_format_cannot_store(
    new_sd: Callable[..., Any], tmp_path: Path, build: Callable[[Any], None], message: str
) -> None:
    backbone = new_sd()
    build(backbone)
    with pytest.raises(ValueError, match=message):
        export(taken(backbone), tmp_path / "out", backbone=backbone)
    assert list(tmp_path.iterdir()) == [] and not backbone.adapters


def test_the_error_names_a_text_encoder_that_diffusers_cannot_adapt(
    new_flux: Callable[..., Any], tmp_path: Path
) -> None:
    backbone = new_flux()
    learn(backbone, roles=("text_encoder_2",))
    with pytest.raises(ValueError, match="into transformer, text_encoder, not into text_encoder_2"):
        export(taken(backbone), tmp_path / "out", backbone=backbone)


def test_a_concept_of_plain_words_cannot_be_exported(new_sd: Callable[..., Any], tmp_path: Path) -> None:
    backbone, modifier = new_sd(), PlainText(words="shiny")
    modifier.attach(backbone, "my-mug", "mug")
    with pytest.raises(ValueError, match=r"plain words \('shiny mug'\), so there is nothing to export"):
        export(taken(backbone, modifier), tmp_path / "out", backbone=backbone)


def test_bad_requests_are_refused_before_any_work(new_sd: Callable[..., Any], tmp_path: Path) -> None:
    backbone = new_sd()
    learn(backbone)
    concept = taken(backbone)
    with pytest.raises(ValueError, match=r"unknown format 'difusers'.*Did you mean 'diffusers'"):
        export(concept, tmp_path / "out", "difusers", backbone=backbone)
    with pytest.raises(ValueError, match="strength 0"):
        export(concept, tmp_path / "out", backbone=backbone, strength=0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="already exists"):
        export(concept, tmp_path / "out", backbone=backbone)
    assert (tmp_path / "out/mine.txt").read_text() == "keep"
    (tmp_path / "out/mine.txt").unlink()
    export(concept, tmp_path / "out", backbone=backbone)
    export(concept, tmp_path / "out", backbone=backbone, overwrite=True)


@pytest.mark.parametrize("fault", ["scale", "lost layer", "empty"])
def test_an_export_with_different_results_is_not_kept(
    new_sd: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    backbone = new_sd()
    modifier = with_tokens(backbone, 1)
    learn(backbone, roles=("attention",), alpha=2.0)
    concept = taken(backbone, modifier)
    write = files.save_file

    def faulty(tensors: dict[str, torch.Tensor], file: Path, **settings: Any) -> None:
        if file.name == LORA and fault == "scale":
            tensors = {k: v * 1.1 if "lora_B" in k else v for k, v in tensors.items()}
        elif file.name == LORA and fault == "lost layer":
            tensors = {k: v for k, v in tensors.items() if "mid_block" not in k}
        elif file.name == LORA:
            tensors = {k: torch.zeros_like(v) for k, v in tensors.items()}
        write(tensors, file, **settings)

    monkeypatch.setattr(files, "save_file", faulty)
    with pytest.raises(ValueError, match="does not match the concept and was not kept: denoiser differs by"):
        export(concept, tmp_path / "out", backbone=backbone)
    assert list(tmp_path.iterdir()) == [] and not backbone.adapters and not backbone.placeholders


def test_other_loaded_concepts_are_not_exported(new_sd: Callable[..., Any], tmp_path: Path) -> None:
    backbone = new_sd()
    learn(backbone)
    concept = taken(backbone)
    learn(backbone, "another", roles=("attention", "text_encoder"))
    DeltaAdapter.inject(backbone, "another", "weights", {"unet.conv_in.bias": torch.ones(16)})
    before = state(backbone)
    assert export(concept, tmp_path / "out", backbone=backbone)["checks"]["denoiser"]["ok"]
    assert state(backbone) == before
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
