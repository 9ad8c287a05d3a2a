"""The model's own weights can be trained, switched off to restore the base model, saved and loaded."""

from __future__ import annotations

import gc
import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.concept import attach, capture
from shared.recipe.schema import Recipe
from shared.train.phase import Interrupted
from shared.trainable import Lora, Weights
from shared.trainable.delta import DeltaAdapter
from tests.core.runs import finish, same, session, small

PROMPT = "a photo of a mug on the beach"
T = torch.tensor([500])
ROLES = pytest.mark.parametrize("roles", [("cross_attention.kv",), ("denoiser.all", "text_encoder")], ids=["kv", "all"])


@pytest.fixture
def sd(make_tiny_sd):
    return StableDiffusionBackbone(make_tiny_sd(), "tiny")


def noise() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def predict(backbone: Any) -> Tensor:
    return backbone.predict(noise(), T, backbone.encode([PROMPT]))


@torch.no_grad()
def output(backbone: Any) -> Tensor:
    return predict(backbone)


def everything(backbone: Any) -> dict[str, nn.Parameter]:
    networks = {**backbone.components, "vae": backbone.vae}
    return {f"{c}.{n}": p for c, m in networks.items() for n, p in m.named_parameters()}


def learn(backbone: Any, group: Any, steps: int = 3, lr: float = 0.05) -> None:
    optimizer = torch.optim.AdamW(group.parameters, lr=lr)
    for _ in range(steps):
        predict(backbone).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def stir(parameters: Any, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in parameters:
            p.add_(size * torch.randn(p.shape, generator=generator))


# --- training --------------------------------------------------------------------------------


@ROLES
def test_training_starts_from_the_base_model_and_reversibly_changes_only_the_declared_weights(sd, roles):
    before, look = output(sd), {c: repr(m) for c, m in sd.components.items()}
    values = {n: p.detach().clone() for n, p in everything(sd).items()}
    group = Weights(roles=roles).inject(sd, "mug", "weights", seed=0)
    assert torch.equal(output(sd), before)
    assert group.touches_text == ("text_encoder" in roles)
    declared = {id(p) for p in group.parameters}
    assert {id(p) for p in everything(sd).values() if p.requires_grad} == declared
    learn(sd, group)
    moved = {n for n, p in everything(sd).items() if not torch.equal(p, values[n])}
    if "denoiser.all" in roles:
        assert all(id(p) in declared for n, p in everything(sd).items() if n.startswith("unet."))
        names = {n for n, p in everything(sd).items() if id(p) in declared and "k_proj.bias" not in n}
        assert moved >= names, "all weights change except the key biases, which do not affect attention"
    else:
        assert moved == {n for n in values if ".attn2.to_k." in n or ".attn2.to_v." in n}
    assert all(id(everything(sd)[n]) in declared for n in moved)
    assert not torch.allclose(output(sd), before, atol=1e-3)
    sd.remove("mug")
    after = everything(sd)
    assert torch.equal(output(sd), before) and {c: repr(m) for c, m in sd.components.items()} == look
    assert all(torch.equal(p, values[n]) and not p.requires_grad and p.grad is None for n, p in after.items())
    assert not any(hasattr(p, "_delta_stack") for p in after.values())
    assert not any(m._forward_pre_hooks for m in sd.components.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_plain_weights_even_if_the_base_is_used_before_backward(new_sd, checkpointing):
    plain = new_sd()
    for p in plain.unet.parameters():
        p.requires_grad_(True)
    predict(plain).square().mean().backward()
    backbone = new_sd()
    group = Weights(roles=("denoiser.all",)).inject(backbone, "mug", "weights", seed=0)
    if checkpointing:
        backbone.unet.train()  # diffusers applies checkpointing only in training mode; the model has no dropout
        backbone.unet.enable_gradient_checkpointing()
    prediction = predict(backbone)
    with torch.no_grad(), backbone.active({}):
        predict(backbone)
    prediction.square().mean().backward()
    originals = dict(plain.unet.named_parameters())
    assert len(group.parameters) == len(originals)
    for name, parameter in backbone.unet.named_parameters():
        assert torch.allclose(parameter.grad, originals[name].grad, atol=1e-6), name


def test_weights_that_are_switched_off_receive_no_gradient(sd):
    group = Weights().inject(sd, "mug", "weights", seed=0)
    x_t = noise().requires_grad_(True)
    with sd.active({}):
        sd.predict(x_t, T, sd.encode([PROMPT])).square().mean().backward()
    assert all(p.grad is None and p.requires_grad for p in group.parameters)


# --- strength and the base -------------------------------------------------------------------


@ROLES
def test_the_base_is_exact_during_training_and_the_trained_weights_are_restored(sd, roles):
    before = output(sd)
    group = Weights(roles=roles).inject(sd, "mug", "weights", seed=0)
    for _ in range(2):
        learn(sd, group, steps=1)
        trained = output(sd)
        with sd.active({}):
            assert torch.equal(output(sd), before)
        assert torch.equal(output(sd), trained) and all(p.requires_grad for p in group.parameters)
    assert not torch.equal(trained, before)


def test_the_base_is_exact_inside_an_autocast_context(sd):
    """Autocast caches its casts of weights that require gradients, and would reuse them after the weights change."""
    group = Weights().inject(sd, "mug", "weights", seed=0)
    stir(group.parameters)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with sd.active({}):
            base = predict(sd)
        trained = predict(sd)
    assert not torch.equal(base, trained)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predict(sd), trained)
        with torch.no_grad(), sd.active({}):
            assert torch.equal(predict(sd), base)
        adapter = sd.adapters["mug"][0]
        state = adapter.state_dict()
        adapter.load_state_dict({k: 2 * v for k, v in state.items()})
        assert not torch.equal(predict(sd), trained)
        adapter.load_state_dict(state)
        again = predict(sd)
        assert torch.equal(again, trained)
        again.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in group.parameters)


def test_strength_scales_the_change_in_the_weights(sd):
    group = Weights().inject(sd, "mug", "weights", seed=0)
    start = [p.detach().double() for p in group.parameters]
    stir(group.parameters)
    trained = [p.detach().double() for p in group.parameters]
    for strength in (0.5, -1.0, 2.0):
        with sd.active({"mug": strength}):
            for p, a, b in zip(group.parameters, start, trained, strict=True):
                assert torch.allclose(p.double(), a + strength * (b - a), atol=1e-6)
    assert all(torch.equal(p.double(), b) for p, b in zip(group.parameters, trained, strict=True))


def test_weights_can_be_trained_in_layers_that_other_concepts_also_change(sd):
    layer = "unet." + sd.group("cross_attention.kv")[0].modules[0]
    before = output(sd)
    delta = 0.3 * torch.randn(sd.unet.get_submodule(layer[5:]).weight.shape, generator=torch.Generator().manual_seed(2))
    DeltaAdapter.inject(sd, "old", "weights", {f"{layer}.weight": delta})
    stir(Lora(roles=("cross_attention",), rank=2, dora=True).inject(sd, "dora", "lora", 0).parameters)
    with_others = output(sd)
    group = Weights().inject(sd, "mug", "weights", seed=0)
    assert torch.equal(output(sd), with_others)
    learn(sd, group)
    trained, weight = output(sd), sd.unet.get_submodule(layer[5:]).get_base_layer().weight
    trained_delta = sd.adapters["mug"][0].state_dict()[f"{layer}.weight"]
    with sd.active({}):
        assert torch.equal(output(sd), before)
        bare = weight.detach().clone()
    with sd.active({"old": 1.0, "dora": 1.0}):
        assert torch.equal(output(sd), with_others)
    with sd.active({"mug": 1.0}):
        assert torch.allclose(weight, bare + trained_delta, atol=1e-6)
    with sd.active({"mug": 1.0, "old": 0.5}):
        assert torch.allclose(weight, bare + 0.5 * delta + trained_delta, atol=1e-6)
    assert torch.equal(output(sd), trained)
    sd.remove("old")
    assert torch.allclose(weight, bare + trained_delta, atol=1e-6)
    sd.remove("mug")
    sd.remove("dora")
    assert torch.equal(output(sd), before)


def test_two_slots_may_not_share_a_weight_but_a_second_concept_may_build_on_the_first(sd):
    group = Weights().inject(sd, "mug", "one", seed=0)
    with pytest.raises(ValueError, match=r"trainable\.two and trainable\.one train the same weights"):
        Weights(roles=("cross_attention",)).inject(sd, "mug", "two", seed=0)
    learn(sd, group)
    first = output(sd)
    second = Weights().inject(sd, "cup", "one", seed=0)
    assert torch.equal(output(sd), first)
    learn(sd, second)
    both = output(sd)
    with sd.active({"mug": 1.0}):
        assert torch.equal(output(sd), first)
    assert torch.equal(output(sd), both) and not torch.equal(both, first)


# --- saving and loading ----------------------------------------------------------------------


@ROLES
@pytest.mark.parametrize("lr", [1e-3, 0.1], ids=["near", "far"])  # with "far", many weights even change sign
def test_saved_weights_equal_the_trained_weights_bit_for_bit(new_sd, roles, lr):
    backbone = new_sd()
    learn(backbone, Weights(roles=roles).inject(backbone, "mug", "weights", seed=0), lr=lr)
    backbone.adapters["mug"][0].train(False)
    concept = capture(backbone, "mug")
    trained = output(backbone)
    elsewhere = new_sd()
    attach(concept, elsewhere)
    assert torch.equal(output(elsewhere), trained)
    again = new_sd()
    Weights(roles=roles).inject(again, "mug", "weights", seed=0)
    state = backbone.adapters["mug"][0].state_dict()
    again.adapters["mug"][0].load_state_dict(state)
    assert torch.equal(output(again), trained) and same(again.adapters["mug"][0].state_dict(), state)
    with pytest.raises(ValueError, match="1 missing, 0 unknown"):
        again.adapters["mug"][0].load_state_dict(dict(list(state.items())[1:]))


def test_half_precision_weights_are_trained_in_fp32_and_used_in_half_precision(new_sd):
    """A step of 1e-4 is too small to change most weights in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        backbone = new_sd().to(dtype=torch.bfloat16)
        before = output(backbone)
        originals = {n: p.detach().clone() for n, p in everything(backbone).items()}
        group = Weights(roles=("denoiser.all",)).inject(backbone, "mug", "weights", seed=0)
        assert torch.equal(output(backbone), before) and all(p.dtype == torch.float32 for p in group.parameters)
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = predict(backbone).float().square().mean()
        loss.backward()
        torch.optim.SGD(group.parameters, lr=1e-4).step()
    adapter: Any = backbone.adapters["mug"][0]
    state = adapter.state_dict()
    assert sum(bool(v.abs().sum() > 0) for v in state.values()) > 0.95 * len(state)
    adapter.train(False)
    assert all(p.dtype == torch.bfloat16 for p in group.parameters)
    used = output(backbone)  # without autocast
    elsewhere = new_sd().to(dtype=torch.bfloat16)
    attach(capture(backbone, "mug"), elsewhere)
    assert torch.equal(output(elsewhere), used)
    adapter.train(True)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in group.parameters)
    assert same(adapter.state_dict(), state)
    backbone.remove("mug")
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, originals[n]) for n, p in everything(backbone).items())


def recipe(*settings: str) -> Recipe:
    weights = ("trainable.lora=null", "trainable.w.kind=weights", "trainable.w.roles=[denoiser.all]", "train.steps=5")
    return small("dreambooth_lora", *weights, "trainable.w.lr=0.02", *settings)


@pytest.mark.parametrize("prior", ["prior_preservation", "prior_prediction"])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(tiny, photos, tmp_path, prior):
    planned = recipe(f"regularize.prior.kind={prior}", "train.mixed_precision=bf16")
    whole = finish(session(tiny(), planned, photos, tmp_path / "whole"))
    assert any(k.startswith("adapter/w/unet.") for k in whole)
    first = session(tiny(), planned, photos, tmp_path / "cut")
    with pytest.raises(Interrupted):
        for _, record in first.steps():
            if record.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
    assert same(finish(session(tiny(), planned, photos, tmp_path / "cut"), resume=True), whole)


# --- memory ---------------------------------------------------------------------------


def held(like: set[tuple[int, ...]]) -> int:
    """Returns the total size in bytes of all live tensors with these shapes, counting each storage once."""
    gc.collect()
    copies = [o for o in gc.get_objects() if isinstance(o, Tensor) and tuple(o.shape) in like]
    return sum({o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in copies}.values())


def test_only_one_additional_copy_of_the_weights_is_in_memory_even_while_the_base_is_used(sd):
    keys = [p for n, p in everything(sd).items() if ".attn2.to_k." in n or ".attn2.to_v." in n]
    shapes, size = {tuple(p.shape) for p in keys}, sum(p.numel() * 4 for p in keys)
    before = held(shapes)
    group = Weights().inject(sd, "mug", "weights", seed=0)
    assert held(shapes) - before == size
    stir(group.parameters)
    with sd.active({}):
        assert held(shapes) - before == size
    output(sd)
    assert held(shapes) - before == size
    sd.remove("mug")
    del group
    assert held(shapes) == before
