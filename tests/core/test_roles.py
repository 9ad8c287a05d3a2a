"""Roles and sites: exact, ported or refused, and blind to what wraps the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from shared.backbones.flux import FluxBackbone
from shared.backbones.module_roles import leaf_names
from shared.backbones.stable_diffusion import StableDiffusionBackbone


def predict(backbone: Any, prompts: Sequence[str] = ("a mug",)) -> Tensor:
    x = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.predict(x, torch.tensor(300), backbone.encode(prompts))


def test_every_role_is_made_of_leaves(backbone: Any) -> None:
    for role in backbone.roles():
        for group in backbone.group(role):
            assert group.modules and len(set(group.modules)) == len(group.modules)
            for name in group.modules:
                assert isinstance(backbone.components[group.component].get_submodule(name), (nn.Linear, nn.Conv2d))


def test_roles_of_stable_diffusion(sd: StableDiffusionBackbone) -> None:
    size = {role: sum(len(g.modules) for g in sd.group(role)) for role in sd.roles()}
    blocks = 7  # 2 down, 1 in the middle, 4 up
    assert size["cross_attention"] == size["self_attention"] == 4 * blocks and size["attention"] == 8 * blocks
    assert size["cross_attention.kv"] == 2 * blocks == size["feed_forward"] == size["proj"]
    assert size["text_encoder"] == 8 and size["text_encoder.mlp"] == 4
    assert all(".attn2.to_" in n for g in sd.group("cross_attention") for n in g.modules)
    with pytest.raises(ValueError, match=r"unknown role 'cross_atention'. Did you mean 'cross_attention'.*There are"):
        sd.group("cross_atention")


def test_roles_of_flux_are_ports_or_errors(flux: FluxBackbone) -> None:
    (group,) = flux.group("cross_attention.kv")
    assert group.resolution == "port" and "text stream" in group.note
    assert set(group.modules) == {f"transformer_blocks.{i}.attn.add_{x}_proj" for i in range(2) for x in "kv"}
    assert {g.resolution for r in ("attention", "feed_forward") for g in flux.group(r)} == {"exact"}
    assert [g.component for g in flux.group("text_encoder_2")] == ["text_encoder_2"]
    attention = {n for n in leaf_names(flux.transformer) if ".attn." in n}
    assert set(flux.group("attention")[0].modules) == attention
    with pytest.raises(ValueError, match=r"flux: unknown role 'conv'.*There are: attention, cross_attention"):
        flux.group("conv")


@pytest.mark.parametrize("kind", ["lora", "loha", "twice"])
def test_roles_do_not_see_what_wraps_the_layers(tiny_sd: Any, kind: str) -> None:
    backbone = StableDiffusionBackbone(tiny_sd)
    before = {role: backbone.group(role) for role in backbone.roles()}
    targets = [n for r in ("attention", "conv") for g in before[r] for n in g.modules]
    kinds: dict[str, list[Any]] = {"lora": [peft.LoraConfig], "loha": [peft.LoHaConfig], "twice": [peft.LoraConfig] * 2}
    for i, config in enumerate(kinds[kind]):
        peft.inject_adapter_in_model(config(r=2, target_modules=targets), backbone.unet, f"a{i}")
    assert {role: backbone.group(role) for role in backbone.roles()} == before


def test_sites_say_where_and_how_small(sd: StableDiffusionBackbone, flux: FluxBackbone) -> None:
    seen: dict[str, int] = {}
    handles = [
        sd.unet.get_submodule(s.name).to_q.register_forward_hook(
            lambda m, a, out, name=s.name: seen.__setitem__(name, out.shape[1])
        )
        for s in sd.sites()
    ]
    predict(sd)
    assert list(seen) == [s.name for s in sd.sites()]  # in the order of the forward pass
    for site in sd.sites():
        assert seen[site.name] == (8 // site.scale) ** 2
        assert sd.unet.get_submodule(site.name).is_cross_attention == (site.kind == "cross")
    for handle in handles:
        handle.remove()
    assert len(sd.sites()) == 14 and sd.text_sites() == tuple(s.name for s in sd.sites() if s.kind == "cross")
    assert {s.kind for s in flux.sites()} == {"joint"} and len(flux.sites()) == 4 and flux.text_sites() == ()
