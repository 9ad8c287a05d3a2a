"""Compares imported LoRA files for Wan and LTX with merged weights and with diffusers' own loader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from pcs_video.backbones.ltx import LTXBackbone
from pcs_video.backbones.wan import WanBackbone
from shared.concept import Provenance, attach, capture, export
from shared.concept.lora_import import import_lora
from shared.concept.lora_names import looks_like
from tests.core.lora_pairs import LORA, Pairs, by_diffusers, imported, low_rank, merged, same, spelled
from tests.video.transformer_models import build_ltx, build_wan
from tests.video.transformer_runs import ask, learn

ROLES = ("attention", "feed_forward")
WAN = (("attn1.to_", "self_attn."), ("attn2.to_", "cross_attn."), ("out.0", "o"), ("net.0.proj", "0"), ("net.2", "2"))


def wan_names(pairs: Pairs) -> Pairs:
    """Renames the layers of the pairs as in Wan's own checkpoints."""
    out: Pairs = {}
    for (component, path), pair in pairs.items():
        for ours, theirs in WAN:
            path = path.replace(ours, theirs)
        assert re.fullmatch(r"blocks\.\d\.((self|cross)_attn\.[qkvo]|ffn\.[02])", path)
        out[component, path] = pair
    return out


@pytest.mark.parametrize("program", ["diffusers", "diffusion-pipe", "musubi"])
def test_wan_files_with_the_layer_names_of_each_program_are_imported(tmp_path: Path, program: str) -> None:
    wan = WanBackbone(build_wan(), "tiny")
    pairs = low_rank(wan, ROLES, scaled=program == "musubi")
    if program == "diffusers":
        state = spelled(pairs, {"transformer": "transformer."}, ("lora_A", "lora_B"), flat=False, alphas=False)
    elif program == "diffusion-pipe":
        own = wan_names(pairs)
        state = spelled(own, {"transformer": "diffusion_model."}, ("lora_A", "lora_B"), flat=False, alphas=False)
    else:
        own = wan_names(pairs)
        state = spelled(own, {"transformer": "lora_unet_"}, ("lora_down", "lora_up"), flat=True, alphas=True)
    save_file(state, tmp_path / LORA)
    assert looks_like(list(state)) == "Wan"
    ours = imported(wan, tmp_path / LORA)
    same(ours, merged(wan, pairs))
    same(ours, by_diffusers(wan, build_wan(), tmp_path / LORA))


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_ltx_files_with_the_layer_names_of_each_program_are_imported(tmp_path: Path, prefix: str) -> None:
    ltx = LTXBackbone(build_ltx(), "tiny")
    pairs = low_rank(ltx, ROLES, scaled=False)
    state = spelled(pairs, {"transformer": prefix}, ("lora_A", "lora_B"), flat=False, alphas=False)
    save_file(state, tmp_path / LORA)
    assert looks_like(list(state)) == "LTX"
    ours = imported(ltx, tmp_path / LORA)
    same(ours, merged(ltx, pairs))
    same(ours, by_diffusers(ltx, build_ltx(), tmp_path / LORA))


def test_the_files_of_two_experts_are_loaded_into_the_right_experts(tmp_path: Path) -> None:
    backbone: Any = WanBackbone(build_wan(experts=2), "tiny")
    learn(backbone)
    expected = ask(backbone)
    concept = capture(backbone, "my-mug", Provenance(class_noun="mug"))
    backbone.remove("my-mug")
    export(concept, tmp_path / "out", backbone=backbone)
    for i, file in enumerate((LORA, LORA.replace(".", ".transformer_2.", 1))):
        attach(import_lora(tmp_path / "out" / file, backbone, "", name=f"part-{i}"), backbone)
    assert {a.component for name in ("part-0", "part-1") for a in backbone.adapters[name]} == set(backbone.experts)
    assert (ask(backbone) - expected).abs().max() < 1e-4


def test_a_file_that_does_not_name_its_expert_is_refused(tmp_path: Path) -> None:
    one, two = WanBackbone(build_wan(), "tiny"), WanBackbone(build_wan(experts=2), "tiny")
    pairs = wan_names(low_rank(one, ("self_attention",), scaled=False))
    state = spelled(pairs, {"transformer": "diffusion_model."}, ("lora_A", "lora_B"), flat=False, alphas=False)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError,
        match=r"is ambiguous: it lacks the prefix that tells transformer\.blocks.* and transformer_2\.blocks.* apart",
    ):
        import_lora(tmp_path / "a.safetensors", two, "")
