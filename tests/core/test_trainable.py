"""Which parameters LoRA, DoRA and learned tokens add and train, and how adapters are switched and removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.modifiers import LearnableToken, RareToken
from shared.trainable import Lora, Tokens
from shared.trainable.adapter import PeftAdapter

PROMPT = "a photo of a mug on the beach"
KINDS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture
def sd(make_tiny_sd):
    return StableDiffusionBackbone(make_tiny_sd(), "tiny")


@pytest.fixture
def flux(make_tiny_flux):
    return FluxBackbone(make_tiny_flux(), "tiny")


@torch.no_grad()
def output(backbone: Any, prompt: str = PROMPT) -> Tensor:
    """Makes one complete prediction, from the prompt to the denoiser's output."""
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return backbone.predict(x_t, torch.tensor([500]), backbone.encode([prompt]))


def everything(backbone: Any) -> dict[str, nn.Parameter]:
    return {f"{c}.{n}": p for c, m in backbone.components.items() for n, p in m.named_parameters()}


def trained(backbone: Any) -> set[int]:
    return {id(p) for p in everything(backbone).values() if p.requires_grad}


@torch.no_grad()
def stir(parameters: Any, seed: int = 7, size: float = 0.3) -> None:
    """Changes every parameter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.add_(size * torch.randn(p.shape, generator=generator))


# --- injecting and ejecting ------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_an_adapter_starts_as_the_identity_and_ejecting_it_restores_everything(request, family, dora):
    backbone = request.getfixturevalue(family)
    before, look = output(backbone), {c: repr(m) for c, m in backbone.components.items()}
    bytes_before = {n: p.detach().clone() for n, p in everything(backbone).items()}
    roles = ("self_attention", "cross_attention", "feed_forward", "text_encoder")
    group = Lora(roles=roles, rank=2, dora=dora).inject(backbone, "mug", "lora", seed=0)
    assert torch.equal(output(backbone), before)
    assert any(repr(m) != look[c] for c, m in backbone.components.items())
    stir(group.parameters)
    assert not torch.allclose(output(backbone), before, atol=1e-3)
    backbone.remove("mug")
    assert torch.equal(output(backbone), before)
    assert {c: repr(m) for c, m in backbone.components.items()} == look
    after = everything(backbone)
    assert after.keys() == bytes_before.keys()
    assert all(torch.equal(p, bytes_before[n]) and not p.requires_grad for n, p in after.items())
    assert not backbone.adapters and not any(hasattr(m, "peft_config") for m in backbone.components.values())


def test_convolutions_can_also_be_adapted(sd):
    before = output(sd)
    group = Lora(roles=("conv", "proj"), rank=2).inject(sd, "mug", "lora", seed=0)
    assert torch.equal(output(sd), before)
    stir(group.parameters)
    assert not torch.allclose(output(sd), before, atol=1e-3)
    sd.remove("mug")
    assert torch.equal(output(sd), before)


def test_the_same_seed_gives_the_same_start_without_using_the_global_generator(sd):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    states = []
    for seed in (0, 0, 1):
        Lora(rank=2).inject(sd, "mug", "lora", seed)
        states.append(sd.adapters["mug"][0].state_dict())
        sd.remove("mug")
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert any(not torch.equal(v, states[2][k]) for k, v in states[0].items())


# --- what is trained ----------------------------------------------------------------------------


@KINDS
def test_only_declared_parameters_are_trainable(sd, dora):
    group = Lora(roles=("cross_attention.kv",), rank=2, dora=dora).inject(sd, "mug", "lora", seed=0)
    assert trained(sd) == {id(p) for p in group.parameters}
    names = {n for n, p in everything(sd).items() if p.requires_grad}
    assert names and all(".attn2.to_k." in n or ".attn2.to_v." in n for n in names)
    assert all(("lora_" in n and "base_layer" not in n) for n in names)
    layers = sum(len(g.modules) for g in sd.group("cross_attention.kv"))
    assert len(names) == layers * (3 if dora else 2)


@KINDS
def test_a_loaded_concept_stays_frozen_when_another_is_injected_and_trained(sd, dora):
    old = Lora(rank=2, dora=dora).inject(sd, "old", "lora", seed=0)
    stir(old.parameters)
    for p in old.parameters:
        p.requires_grad_(False)
    kept = sd.adapters["old"][0].state_dict()
    new = Lora(rank=4, dora=dora).inject(sd, "new", "lora", seed=1)
    assert trained(sd) == {id(p) for p in new.parameters}
    optimizer = torch.optim.SGD(new.parameters, lr=1.0)
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        sd.predict(x_t, torch.tensor([500]), sd.encode([PROMPT])).square().mean().backward()
        optimizer.step()
    assert all(p.grad is None for p in old.parameters)
    assert all(torch.equal(v, kept[k]) for k, v in sd.adapters["old"][0].state_dict().items())
    sd.remove("new")
    assert trained(sd) == set(), "removing one concept does not unfreeze another"
    assert all(torch.equal(v, kept[k]) for k, v in sd.adapters["old"][0].state_dict().items())


def test_an_adapter_injected_directly_is_frozen_and_leaves_other_adapters_trainable(sd):
    group = Lora(roles=("cross_attention",), rank=2).inject(sd, "mug", "lora", seed=0)
    config = LoraConfig(r=2, target_modules=list(sd.group("attention")[0].modules))
    loaded = PeftAdapter.inject(sd, "old", "lora", "unet", config, seed=0)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert trained(sd) == {id(p) for p in group.parameters}


def test_only_the_trained_adapter_applies_dropout(sd):
    old = Lora(rank=2, dropout=0.5).inject(sd, "old", "lora", seed=0)
    stir(old.parameters)
    sd.adapters["old"][0].train(False)
    new = Lora(rank=2, dropout=0.5).inject(sd, "new", "lora", seed=1)
    stir(new.parameters)
    assert not torch.equal(output(sd), output(sd)), "the trained adapter applies dropout"
    with sd.active({"old": 1.0}):
        assert torch.equal(output(sd), output(sd)), "the loaded adapter applies no dropout"
    sd.adapters["new"][0].train(False)
    assert torch.equal(output(sd), output(sd))


# --- strength --------------------------------------------------------------------------------


def layer_of(backbone: Any, role: str = "cross_attention.kv") -> nn.Module:
    group = backbone.group(role)[0]
    return backbone.components[group.component].get_submodule(group.modules[0])


@torch.no_grad()
def test_strength_scales_the_change_to_each_layer(sd):
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    plain = layer_of(sd)(x)
    group = Lora(roles=("cross_attention.kv",), rank=4, alpha=2.0).inject(sd, "mug", "lora", seed=0)
    stir(group.parameters)
    layer: Any = layer_of(sd)
    a, b = (next(m.weight for m in layer_.values()) for layer_ in (layer.lora_A, layer.lora_B))
    full = (x @ a.T @ b.T) * (2.0 / 4)
    for strength in (1.0, 0.5, -1.0, 2.0):
        with sd.active({"mug": strength}):
            assert torch.allclose(layer(x), plain + strength * full, atol=1e-5)
    with sd.active({"mug": 0.0}):
        assert torch.equal(layer(x), plain)
    with sd.active({}):
        assert torch.equal(layer(x), plain)
    assert torch.allclose(layer(x), plain + full, atol=1e-5), "the previous strength is restored afterwards"


@KINDS
def test_strength_scales_the_effect_on_the_whole_network(sd, dora):
    before = output(sd)
    stir(Lora(rank=2, dora=dora).inject(sd, "mug", "lora", seed=0).parameters, size=0.05)
    full = output(sd)
    with sd.active({"mug": 0.0}):
        assert torch.equal(output(sd), before)
    with sd.active({"mug": 0.5}):
        half = output(sd)
    assert 0 < (half - before).abs().max() < (full - before).abs().max()
    assert torch.equal(output(sd), full)


# --- several adapters ------------------------------------------------------------------------


def test_two_slots_with_different_roles_and_ranks_work_together(sd):
    before = output(sd)
    one = Lora(roles=("cross_attention",), rank=2).inject(sd, "mug", "narrow", seed=0)
    two = Lora(roles=("self_attention", "cross_attention.q"), rank=5).inject(sd, "mug", "wide", seed=0)
    assert trained(sd) == {id(p) for p in (*one.parameters, *two.parameters)}
    first, second = sd.adapters["mug"]
    assert {v.shape[0] for k, v in first.state_dict().items() if "lora_A" in k} == {2}
    assert {v.shape[0] for k, v in second.state_dict().items() if "lora_A" in k} == {5}
    assert any(".attn2.to_q." in k for k in first.state_dict()), "both adapters are on the same layer"
    assert any(".attn2.to_q." in k for k in second.state_dict())
    stir(one.parameters)
    alone = output(sd)
    stir(two.parameters, seed=8)
    assert not torch.allclose(output(sd), alone, atol=1e-3) and not torch.allclose(alone, before, atol=1e-3)
    with sd.active({}):
        assert torch.equal(output(sd), before), "switching the concept off switches off both adapters"
    sd.remove("mug")
    assert torch.equal(output(sd), before)


@KINDS
def test_a_saved_state_recreates_the_same_adapter_on_another_model(make_tiny_sd, dora):
    one, two = (StableDiffusionBackbone(make_tiny_sd(), "tiny") for _ in range(2))
    part = Lora(roles=("attention", "text_encoder"), rank=3, alpha=6.0, dora=dora)
    stir(part.inject(one, "mug", "lora", seed=0).parameters)
    part.inject(two, "mug", "lora", seed=5)
    assert len(one.adapters["mug"]) == 2, "there is one adapter per component"
    for first, second in zip(one.adapters["mug"], two.adapters["mug"], strict=True):
        state = first.state_dict()
        assert all(v.dtype == torch.float32 and v.device.type == "cpu" for v in state.values())
        second.load_state_dict(state)
        assert all(torch.equal(v, state[k]) for k, v in second.state_dict().items())
    assert torch.equal(output(one), output(two))


def test_an_incompatible_state_is_refused_and_changes_nothing(sd):
    Lora(rank=2).inject(sd, "mug", "lora", seed=0)
    adapter = sd.adapters["mug"][0]
    state = adapter.state_dict()
    key = sorted(state)[0]
    for wrong in ({k: v for k, v in state.items() if k != key}, {**state, "x": state[key]}, {}):
        with pytest.raises(ValueError, match=r"tensors missing, \d+ unknown"):
            adapter.load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"has shape \[3, \d+\], but this model needs \[2, \d+\]"):
        adapter.load_state_dict({**state, key: torch.zeros(3, state[key].shape[1])})
    assert all(torch.equal(v, state[k]) for k, v in adapter.state_dict().items())


# --- roles -----------------------------------------------------------------------------------


def test_the_error_for_an_unknown_role_lists_the_existing_roles(sd, flux):
    with pytest.raises(ValueError, match="unknown role 'cros_attention'.*Did you mean 'cross_attention'.*text_encoder"):
        Lora(roles=("cros_attention",)).inject(sd, "mug", "lora", seed=0)
    with pytest.raises(ValueError, match="flux: unknown role 'conv'.*self_attention"):
        Lora(roles=("conv",)).inject(flux, "mug", "lora", seed=0)
    assert not sd.adapters and not flux.adapters


def test_ported_roles_are_noted_and_exact_roles_are_not(sd, flux):
    assert Lora(roles=("cross_attention",)).inject(sd, "mug", "lora", seed=0).ports == ()
    group = Lora(roles=("cross_attention", "feed_forward")).inject(flux, "mug", "lora", seed=0)
    assert len(group.ports) == 1
    assert group.ports[0].startswith("cross_attention: ") and "text stream" in group.ports[0]


def test_adapting_a_text_encoder_is_marked_as_changing_the_text_context(sd):
    before = output(sd)
    group = Lora(roles=("text_encoder",), rank=2).inject(sd, "mug", "lora", seed=0)
    assert group.touches_text and not Lora(roles=("cross_attention",)).inject(sd, "mug", "net", seed=0).touches_text
    assert {k.split(".")[0] for k in sd.adapters["mug"][0].state_dict()} == {"text_encoder"}
    stir(group.parameters)
    assert not torch.allclose(output(sd), before, atol=1e-4)
    context = sd.encode([PROMPT]).context
    with sd.active({}):
        assert not torch.equal(sd.encode([PROMPT]).context, context)


def test_the_second_text_encoder_of_flux_can_be_adapted(flux):
    before = output(flux)
    group = Lora(roles=("text_encoder_2",), rank=2).inject(flux, "mug", "lora", seed=0)
    assert group.touches_text
    stir(group.parameters)
    assert not torch.allclose(output(flux), before, atol=1e-4)


# --- token rows ------------------------------------------------------------------------------


def test_the_tokens_part_unfreezes_only_the_rows_being_trained(sd):
    old = LearnableToken(vectors=2).attach(sd, "old", "dog")
    old.frozen = True
    new = LearnableToken(vectors=3).attach(sd, "new", "mug")
    group = Tokens(lr=0.5).inject(sd, "new", "tokens", seed=0)
    assert [p.shape[0] for p in group.parameters] == [3] and group.lr == 0.5 and group.touches_text
    assert all(p.requires_grad for p in new.parameters()) and not any(p.requires_grad for p in old.parameters())
    assert trained(sd) == set(), "no row of the model's own table is trained"


def test_training_tokens_without_a_learnable_token_is_an_error(sd):
    RareToken().attach(sd, "mug", "mug")
    with pytest.raises(ValueError, match=r"trainable\.x trains tokens, but the modifier learns none"):
        Tokens().inject(sd, "mug", "x", seed=0)
