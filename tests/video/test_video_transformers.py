"""Tests the features that Wan (with one or two experts) and LTX share, on tiny instances of the real classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.backbones import load_backbone
from shared.backbones.attention_maps import Watch
from shared.backbones.module_roles import LEAVES, leaf_names, parameter_holders
from shared.backbones.protocol import Backbone
from shared.modifiers import LearnableToken, RareToken
from shared.sampling.sampler import sample
from shared.sampling.settings import SamplingSettings
from shared.train.memory import recomputed
from shared.trainable.lora import Lora
from tests.video.transformer_runs import (
    FAMILIES,
    TIMES,
    ask,
    frames_of,
    learn,
    networks,
    noise,
    nothing,
    pipeline_clips,
)


@pytest.fixture(params=FAMILIES)
def new(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Returns a function that builds the tiny backbone of a family."""
    return FAMILIES[request.param]


@pytest.fixture
def backbone(new: Callable[[], Any]) -> Any:
    return new()


# --- the protocol and the autoencoder ---------------------------------------------------------------------------


def test_the_backbone_implements_the_protocol_and_is_frozen(backbone: Any) -> None:
    assert isinstance(backbone, Backbone)
    assert backbone.prediction_type == "flow" and not backbone.discrete_time and backbone.frames is not None
    assert not any(p.requires_grad for m in (*backbone.components.values(), backbone.vae) for p in m.parameters())
    x0, e, t = noise(2, 4, 2, 4, 4), noise(2, 4, 2, 4, 4, seed=1), torch.tensor([250, 800])
    s = t.view(-1, 1, 1, 1, 1) / 1000
    torch.testing.assert_close(backbone.add_noise(x0, e, t), (1 - s) * x0 + s * e)
    assert torch.equal(backbone.target(x0, e, t), e - x0)


def test_pictures_are_clips_of_one_frame(backbone: Any) -> None:
    pixels, x = noise(2, 3, 32, 32).clamp(-1, 1), noise(2, 4, 4, 4)
    text = backbone.encode(["a mug", "a dog"])
    with torch.no_grad():
        assert torch.equal(backbone.encode_pixels(pixels), backbone.encode_pixels(pixels[:, :, None])[:, :, 0])
        assert torch.equal(backbone.predict(x, TIMES, text), backbone.predict(x[:, :, None], TIMES, text)[:, :, 0])
        assert torch.equal(backbone.decode(x), backbone.decode(x[:, :, None])[:, :, 0])
        assert all(m.shape == (2, 4, 4, 4) for m in backbone.latent_moments(pixels))
    assert backbone.decode(x).shape == (2, 3, 32, 32)


def test_the_backbone_encodes_and_decodes_clips_just_as_the_bare_autoencoder_does(backbone: Any) -> None:
    """In addition, the backbone normalizes the latents with the mean and standard deviation of each channel."""
    frames, vae = frames_of(backbone), backbone.vae
    pixels = noise(2, 3, frames, 32, 32).clamp(-1, 1)
    mean = torch.tensor([0.3, -0.2, 0.1, 0.0]).view(1, -1, 1, 1, 1)
    spread = torch.tensor([0.5, 1.5, 0.8, 1.2]).view(1, -1, 1, 1, 1) / (0.9 if backbone.family == "ltx" else 1)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        latents = backbone.encode_pixels(pixels)
        torch.testing.assert_close(latents, (posterior.mean - mean) / spread)
        means, stds = backbone.latent_moments(pixels)
        assert torch.equal(means, latents) and latents.shape == (2, 4, 2, 4, 4)
        drawn = backbone.encode_pixels(pixels, torch.Generator().manual_seed(5))
        torch.testing.assert_close(drawn, means + stds * noise(*means.shape, seed=5))
        torch.testing.assert_close(backbone.decode(latents), vae.decode(posterior.mean).sample, atol=1e-4, rtol=0)
    pixels.requires_grad_(True)
    backbone.encode_pixels(pixels).square().sum().backward()
    # every frame has a gradient
    assert pixels.grad is not None and bool((pixels.grad.abs().sum((0, 1, 3, 4)) > 0).all())


def test_unsupported_frame_counts_and_sizes_are_refused(backbone: Any) -> None:
    r = backbone.frame_factor
    assert backbone.latent_shape(32, 48) == (4, 4, 6)
    for n in range(3):
        assert backbone.latent_shape(32, 48, n * r + 1) == (4, n + 1, 4, 6)
    for wrong, nearest in ((r, f"1 and {r + 1}"), (2 * r, f"{r + 1} and {2 * r + 1}"), (0, "1"), (-r, "1")):
        with pytest.raises(
            ValueError, match=f"a clip of {wrong} frames .* {r}n \\+ 1 frames \\(nearest: {nearest}\\)$"
        ):
            backbone.latent_shape(32, 32, wrong)
    with pytest.raises(ValueError, match="nearest: "):
        backbone.encode_pixels(torch.zeros(1, 3, r, 32, 32))
    with pytest.raises(ValueError, match="both sides must be multiples of"):
        backbone.latent_shape(32, 36)


# --- sampling ---------------------------------------------------------------------------------------------------


def test_sampling_matches_the_diffusers_pipeline(backbone: Any) -> None:
    frames = frames_of(backbone)
    settings = SamplingSettings("blurry", 4.0, 4, height=32, width=32, frames=frames)
    ours = sample(backbone, ["a red mug", "a dog"], seeds=[3, 4], settings=settings)
    theirs = pipeline_clips(backbone.pipeline(), frames)
    assert ours.shape == (2, 3, frames, 32, 32) and ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_a_saved_model_folder_is_loaded_completely(backbone: Any, tmp_path: Path) -> None:
    backbone.pipeline().save_pretrained(tmp_path / "model")
    opened: Any = load_backbone(tmp_path / "model", dtype=torch.bfloat16)
    assert type(opened) is type(backbone) and opened.components.keys() == backbone.components.keys()
    assert opened.checkpoint == backbone.checkpoint and opened.noise_ranges == backbone.noise_ranges
    assert opened.dtype == torch.bfloat16 and opened.latent_dtype == torch.float32
    with torch.no_grad():
        near = ask(opened).float()
    assert (near - ask(backbone)).abs().max() < 0.1 * ask(backbone).abs().max()


# --- roles and adapters -----------------------------------------------------------------------------------------

EXCLUSIVE = ("self_attention", "cross_attention", "temporal_attention", "feed_forward", "conv", "proj")


def test_each_role_is_either_exact_and_disjoint_or_a_port_that_names_its_source(backbone: Any) -> None:
    exact: dict[tuple[str, str], str] = {}
    ports: dict[str, set[tuple[str, str]]] = {}
    for role in (r for r in EXCLUSIVE if r in backbone.roles()):
        groups = backbone.group(role)
        assert [g.component for g in groups] == networks(backbone)  # in every expert
        for group in groups:
            for layer in ((group.component, m) for m in group.modules):
                if group.resolution == "port":
                    ports.setdefault(role, set()).add(layer)
                else:
                    assert layer not in exact, f"{layer} is {exact[layer]} and {role}"
                    exact[layer] = role
    assert list(ports) == ["temporal_attention"]
    assert {exact[layer] for layer in ports["temporal_attention"]} == {"self_attention"}
    assert all("self_attention" in g.note for g in backbone.group("temporal_attention"))
    assert set(exact.values()) == {"self_attention", "cross_attention", "feed_forward"}
    size = {role: sum(len(g.modules) for g in backbone.group(role)) for role in backbone.roles()}
    blocks = 2 * len(networks(backbone))
    assert size["self_attention"] == size["cross_attention"] == 4 * blocks and size["attention"] == 8 * blocks
    assert size["self_attention.qk"] == size["cross_attention.kv"] == size["feed_forward"] == 2 * blocks
    assert size["text_encoder"] == 8 and size["text_encoder.mlp"] > 0
    for group, everything in zip(backbone.group("denoiser"), backbone.group("denoiser.all"), strict=True):
        network = backbone.components[group.component]
        assert group.modules == leaf_names(network) and everything.modules == parameter_holders(network)
        assert all(isinstance(network.get_submodule(n), LEAVES) for n in group.modules)


@pytest.mark.parametrize("role", ["temporal_attention", "cross_attention", "feed_forward", "denoiser", "text_encoder"])
def test_injected_adapters_take_effect_and_leave_no_trace_when_removed(backbone: Any, role: str) -> None:
    text, before = {c: repr(m) for c, m in backbone.components.items()}, ask(backbone)
    learn(backbone, roles=(role,))
    adapted = {a.component for a in backbone.adapters["my-mug"]}
    assert adapted == ({"text_encoder"} if role == "text_encoder" else set(networks(backbone)))
    after = ask(backbone)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(after, before, strict=True))
    with backbone.active({}):
        assert torch.equal(ask(backbone), before)
    backbone.remove("my-mug")
    assert torch.equal(ask(backbone), before) and {c: repr(m) for c, m in backbone.components.items()} == text


def test_gradient_checkpointing_does_not_change_gradients(backbone: Any) -> None:
    learn(backbone, roles=("attention",), min_rank=1)  # the rank depends on the timestep of each row
    adapters = backbone.adapters["my-mug"]
    parameters = [p for a in adapters for p in a.parameters()]
    text = backbone.encode(["a mug", "a dog"])

    def gradients() -> list[Tensor]:
        loss = backbone.predict(noise(2, 4, 2, 4, 4), TIMES, text).square().mean()
        return list(torch.autograd.grad(loss, parameters))

    plain = gradients()
    assert all(bool((g != 0).any()) for g in plain)  # in every expert
    with recomputed(backbone, True):
        assert all(backbone.components[n].gradient_checkpointing for n in networks(backbone))
        for a, b in zip(plain, gradients(), strict=True):
            torch.testing.assert_close(a, b)
    assert not any(backbone.components[n].gradient_checkpointing for n in networks(backbone))


def test_a_training_step_does_not_mix_devices() -> None:
    for family in ("wan", "ltx"):
        backbone = FAMILIES[family]()
        # UMT5 reads the values of its mask, but meta tensors have no values, so Wan's text is encoded beforehand
        text_roles = ("text_encoder",) if family == "ltx" else ()
        Lora(rank=2, roles=("attention", *text_roles)).inject(backbone, "thing", "lora", 0)
        told = backbone.encode(["a photo of a mug", "a dog"])
        backbone.to("meta")
        latents = backbone.latent_moments(torch.zeros(2, 3, frames_of(backbone), 32, 32, device="meta"))[0]
        t = TIMES.to("meta")
        text = replace(told, context=told.context.to("meta"))
        text = backbone.encode(["a photo of a mug", "a dog"], t) if text_roles else text
        prediction = backbone.predict(backbone.add_noise(latents, torch.randn_like(latents), t), t, text)
        (prediction - backbone.target(latents, latents, t)).square().mean().backward()
        trained = [p for m in backbone.components.values() for p in m.parameters() if p.requires_grad]
        assert trained and all(p.grad is not None and p.grad.device.type == "meta" for p in trained)
        guided = backbone.predict_guided(latents, torch.tensor(5.0), text, text, 3.0)
        assert backbone.decode(guided).device.type == "meta"


# --- attention --------------------------------------------------------------------------------------------------


def one_side(backbone: Any, t: float = 900) -> Tensor:
    with torch.no_grad():
        return backbone.predict(noise(2, 4, 2, 4, 4), torch.tensor(t), backbone.encode(["a mug", "a dog"]))


@pytest.mark.parametrize("t", [900, 300])
def test_attention_can_be_watched_and_edited(backbone: Any, t: int) -> None:
    plain = one_side(backbone, t)
    with backbone.attending(nothing):
        assert torch.equal(one_side(backbone, t), plain)
    with backbone.attending(Watch()) as record:
        torch.testing.assert_close(one_side(backbone, t), plain, atol=1e-5, rtol=1e-4)
    cells = 2 * (4 // backbone.sites()[0].scale) ** 2
    assert len(record) == 4
    for site in backbone.sites():
        keys = 48 if site.kind == "cross" else cells
        assert record[site.name].shape == (2, cells, keys)
        assert (record[site.name].sum(-1) - 1).abs().max() < 1e-5
    edited = lambda site, q, k, v, bias, rows: (q, k, 0 * v, bias)  # noqa: E731
    with backbone.attending(edited):
        assert not torch.allclose(one_side(backbone, t), plain, atol=1e-3)
    assert torch.equal(one_side(backbone, t), plain)


def test_a_custom_processor_is_not_replaced(backbone: Any) -> None:
    site = backbone.sites()[1]
    layer = backbone.components[networks(backbone)[-1]].get_submodule(site.name)

    class Own(type(layer.processor)):
        pass

    layer.processor = Own()
    with pytest.raises(ValueError, match=f"{site.name} has the processor Own"), backbone.attending(nothing):
        pass


# --- words ------------------------------------------------------------------------------------------------------


def test_learned_tokens_are_encoded_and_trained(backbone: Any) -> None:
    plain = backbone.encode(["a mug on the beach"])
    placeholder = LearnableToken(vectors=2).attach(backbone, "my-mug", "mug")
    (vectors,) = placeholder.parameters()
    vectors.requires_grad_(True)
    text = backbone.encode([f"a {placeholder.words} on the beach"])
    assert text.token_positions["my-mug"].sum() == 2 and backbone.varies_with(["a mug"]) == frozenset()
    backbone.predict(noise(1, 4, 2, 4, 4), TIMES[:1], text).square().mean().backward()
    assert vectors.grad is not None and bool((vectors.grad.abs().sum(-1) > 0).all())
    before = backbone.encode([f"a {placeholder.words}"]).context
    vectors.data += 1
    assert not torch.allclose(backbone.encode([f"a {placeholder.words}"]).context, before, atol=1e-3)
    backbone.remove("my-mug")
    again = backbone.encode(["a mug on the beach"])
    assert torch.equal(again.context, plain.context)
    assert RareToken().attach(backbone, "my-mug", "mug").words.endswith("mug")
    with pytest.raises(
        ValueError, match=r"modifier.per=layer: .* no cross-attention layers that can each take their own text"
    ):
        LearnableToken(per="layer").attach(backbone, "other", "mug")


def test_a_separate_context_for_each_site_is_refused(backbone: Any) -> None:
    text = backbone.encode(["a mug"]).per_site([s.name for s in backbone.sites()])
    with pytest.raises(ValueError, match=f"{backbone.family}: all of its layers share one projection of the text"):
        backbone.predict(noise(1, 4, 2, 4, 4), TIMES[:1], text)
