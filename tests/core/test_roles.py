"""Tests which layers each role and attention site refers to, and that wrapping layers does not change the roles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from shared.backbones.flux import FluxBackbone
from shared.backbones.module_roles import LEAVES, leaf_names, parameter_holders
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from tests.core.motion import ask_motion, motion_unet


def predict(backbone: Any, prompts: Sequence[str] = ("a mug",)) -> Tensor:
    x = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.predict(x, torch.tensor(300), backbone.encode(prompts))


def test_every_role_except_denoiser_all_consists_of_leaf_modules(backbone: Any) -> None:
    for role in backbone.roles():
        for group in backbone.group(role):
            assert group.modules and len(set(group.modules)) == len(group.modules)
            for name in group.modules:
                module = backbone.components[group.component].get_submodule(name)
                assert isinstance(module, LEAVES) or role == "denoiser.all"


def test_roles_of_stable_diffusion_contain_the_expected_layers(sd: StableDiffusionBackbone) -> None:
    size = {role: sum(len(g.modules) for g in sd.group(role)) for role in sd.roles()}
    blocks = 7  # 2 down, 1 in the middle, 4 up
    assert size["cross_attention"] == size["self_attention"] == 4 * blocks and size["attention"] == 8 * blocks
    assert size["cross_attention.kv"] == 2 * blocks == size["feed_forward"] == size["proj"]
    assert size["text_encoder"] == 8 and size["text_encoder.mlp"] == 4
    assert all(".attn2.to_" in n for g in sd.group("cross_attention") for n in g.modules)
    with pytest.raises(ValueError, match=r"unknown role 'cross_atention'. Did you mean 'cross_attention'.*Available"):
        sd.group("cross_atention")


def test_roles_of_flux_are_exact_ported_or_refused(flux: FluxBackbone) -> None:
    (group,) = flux.group("cross_attention.kv")
    assert group.resolution == "port" and "text stream" in group.note
    assert set(group.modules) == {f"transformer_blocks.{i}.attn.add_{x}_proj" for i in range(2) for x in "kv"}
    assert {g.resolution for r in ("attention", "feed_forward") for g in flux.group(r)} == {"exact"}
    assert [g.component for g in flux.group("text_encoder_2")] == ["text_encoder_2"]
    attention = {n for n in leaf_names(flux.transformer) if ".attn." in n}
    assert set(flux.group("attention")[0].modules) == attention
    with pytest.raises(
        ValueError,
        match=r"flux: unknown role 'conv'.*Available: attention, cross_attention",
    ):
        flux.group("conv")


@pytest.mark.parametrize("kind", ["lora", "loha", "twice"])
def test_roles_are_independent_of_wrappers(tiny_sd: Any, kind: str) -> None:
    backbone = StableDiffusionBackbone(tiny_sd)
    before = {role: backbone.group(role) for role in backbone.roles()}
    targets = [n for r in ("attention", "conv") for g in before[r] for n in g.modules]
    kinds: dict[str, list[Any]] = {"lora": [peft.LoraConfig], "loha": [peft.LoHaConfig], "twice": [peft.LoraConfig] * 2}
    for i, config in enumerate(kinds[kind]):
        peft.inject_adapter_in_model(config(r=2, target_modules=targets), backbone.unet, f"a{i}")
    assert {role: backbone.group(role) for role in backbone.roles()} == before


def test_sites_match_the_attention_layers_in_order_kind_and_scale(
    sd: StableDiffusionBackbone, flux: FluxBackbone
) -> None:
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


def test_sites_of_motion_modules_are_temporal(tiny_sd: Any) -> None:
    tiny_sd.unet = unet = motion_unet(tiny_sd.unet)
    backbone, seen = StableDiffusionBackbone(tiny_sd), []
    names = [n for n, m in unet.named_modules() if isinstance(m, Attention)]
    for name in names:
        unet.get_submodule(name).register_forward_hook(
            lambda m, a, out, n=name: seen.append((n, tuple(a[0].shape[:2])))
        )
    ask_motion(backbone, frames=3)
    assert [n for n, _ in seen] == [s.name for s in backbone.sites()]  # in the order of the forward pass
    for site, (name, shape) in zip(backbone.sites(), seen, strict=True):
        cells = (8 // site.scale) ** 2
        assert (site.kind == "temporal") == ("motion_modules" in name)
        assert shape == ((2 * cells, 3) if site.kind == "temporal" else (2 * 3, cells))
        assert (site.kind == "cross") == (".attn2" in name and site.kind != "temporal")
    assert all("motion_modules" not in n for n in backbone.text_sites()) and len(backbone.text_sites()) == 7


DISJOINT = ("self_attention", "cross_attention", "temporal_attention", "feed_forward", "conv", "proj")
_BLOCK = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\."
_UNET = rf"conv_(in|out)|time_embedding\.linear_[12]|{_BLOCK}(resnets\.\d+\.time_emb_proj|(down|up)samplers\.0\.conv)"
_OTHERS = {  # leaf modules that belong to no role except "denoiser" and "denoiser.all"
    "sd": _UNET,
    "sd_v": _UNET,
    "attention without text": _UNET,
    "motion": rf"{_UNET}|{_BLOCK}motion_modules\.\d+\.(proj_(in|out)|transformer_blocks\.0\.ff\.net\.(0\.proj|2))",
    "flux": r"time_text_embed\..*|context_embedder|x_embedder|(.*\.)?norm\w*\.linear|proj_out",
}


def build(kind: str, request: pytest.FixtureRequest) -> Any:
    if kind == "flux":
        return FluxBackbone(request.getfixturevalue("tiny_flux"))
    pipe = request.getfixturevalue("tiny_sd_v" if kind == "sd_v" else "tiny_sd")
    if kind == "motion":
        pipe.unet = motion_unet(pipe.unet)
    if kind == "attention without text":
        blocks = {"down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")}
        pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, **blocks})
    return StableDiffusionBackbone(pipe)


@pytest.mark.parametrize("kind", _OTHERS)
def test_no_layer_has_two_roles_and_the_layers_without_a_role_are_listed(
    kind: str, request: pytest.FixtureRequest
) -> None:
    backbone = build(kind, request)
    taken: dict[str, str] = {}
    for role in (r for r in DISJOINT if r in backbone.roles()):
        for name in (n for g in backbone.group(role) for n in g.modules):
            assert name not in taken, f"{name} has the roles {taken[name]} and {role}"
            taken[name] = role
            moves = "motion_modules" in name
            assert moves == (role == "temporal_attention"), f"{name} has the role {role}"
    (everything,) = backbone.group("denoiser")
    assert everything.modules == leaf_names(backbone.denoiser)
    left = [n for n in everything.modules if n not in taken]
    assert left and all(re.fullmatch(_OTHERS[kind], n) for n in left), left
    names = {role: {n for g in backbone.group(role) for n in g.modules} for role in backbone.roles()}
    assert names["attention"] == {n for n in names["attention"] if taken[n] in ("self_attention", "cross_attention")}
    for role in (r for r in names if r.endswith((".q", ".kv"))):
        assert names[role] < names[role.rsplit(".", 1)[0]]
    assert ("temporal_attention" in names) == (kind == "motion")


def test_the_error_for_a_model_without_motion_modules_lists_the_available_roles(sd: StableDiffusionBackbone) -> None:
    with pytest.raises(ValueError, match="'temporal_attention' matches no layer of this unet. Available: ") as error:
        sd.group("temporal_attention")
    assert "cross_attention.kv" in str(error.value) and str(error.value).count("temporal_attention") == 1


def test_the_role_denoiser_all_covers_every_parameter_and_ignores_wrappers(backbone: Any) -> None:
    (group,) = backbone.group("denoiser.all")
    network, before = backbone.denoiser, backbone.group("denoiser.all")
    grouped = {f"{m}.{n}" for m in group.modules for n, _ in network.get_submodule(m).named_parameters(recurse=False)}
    assert grouped == {n for n, _ in network.named_parameters()}
    targets = list(backbone.group("attention")[0].modules)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), network)
    assert backbone.group("denoiser.all") == before


def test_a_network_that_directly_holds_a_parameter_is_listed_as_a_holder() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.ReLU())
    network.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert parameter_holders(network) == ("", "0", "1")
