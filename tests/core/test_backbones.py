"""Each family's forward process, networks and autoencoder match diffusers. Adapters can be switched on and off."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from shared.backbones.flux import FluxBackbone, pack, picture_ids, unpack
from shared.backbones.forward_process import PREDICTIONS, ForwardProcess
from shared.backbones.protocol import Backbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.trainable.adapter import PeftAdapter
from shared.trainable.delta import DeltaAdapter
from shared.types import ImageTokens


def add_lora(backbone: Any, name: str, role: str, seed: int) -> None:
    """Injects a LoRA with random weights, so that it has an effect."""
    for group in backbone.group(role):
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(group.modules), init_lora_weights=False)
        PeftAdapter.inject(backbone, name, role.replace(".", "_"), group.component, config, seed)


def predict(backbone: Any, prompts: Sequence[str] = ("a mug",)) -> Tensor:
    x = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.predict(x, torch.tensor(300), backbone.encode(prompts))


def test_both_families_implement_the_protocol(backbone: Any) -> None:
    assert isinstance(backbone, Backbone)
    assert backbone.name == "tiny" and backbone.device.type == "cpu" and backbone.dtype == torch.float32
    frozen = [p.requires_grad for m in (*backbone.components.values(), backbone.vae) for p in m.parameters()]
    assert not any(frozen)


# --- the forward process --------------------------------------------------------------------------------------


class Exact(ForwardProcess):
    """A forward process whose coefficients are in float64 and defined at any time."""

    def __init__(self, kind: Any) -> None:
        self.prediction_type = kind

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t.double() / 1000
        return (1 - angle, angle) if self.prediction_type == "flow" else (angle.cos(), angle.sin())


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_parametrizations_can_be_inverted_exactly(kind: str) -> None:
    process, t = Exact(kind), torch.tensor([10.0, 500.0, 990.0])
    x0, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    x_t, prediction = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    assert torch.allclose(process.to_x0(prediction, x_t, t), x0, atol=1e-12)
    assert torch.allclose(process.to_eps(prediction, x_t, t), noise, atol=1e-12)


@pytest.mark.parametrize("version", ["tiny_sd", "tiny_sd_v"])
def test_the_forward_process_matches_diffusers_scheduler(version: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(version)
    backbone, scheduler = StableDiffusionBackbone(pipe), pipe.scheduler
    x0, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 423, 999])
    x_t = backbone.add_noise(x0, noise, t)
    assert torch.allclose(x_t, scheduler.add_noise(x0, noise, t), atol=1e-6)
    velocity = scheduler.get_velocity(x0, noise, t)
    assert torch.allclose(backbone.target(x0, noise, t), noise if version == "tiny_sd" else velocity, atol=1e-6)
    scheduler.set_timesteps(10)
    for i in (0, 5):  # the clean latents that DDIM predicts (arXiv 2010.02502, eq. 12)
        t = scheduler.timesteps[i]
        prediction, x = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
        clean = scheduler.step(prediction, t, x).pred_original_sample
        assert torch.allclose(backbone.to_x0(prediction, x, t), clean, rtol=1e-4, atol=1e-4)


_TAKE_TIMES = {
    "alpha_sigma": lambda b, x, c, t: b.alpha_sigma(t),
    "add_noise": lambda b, x, c, t: b.add_noise(x, x, t),
    "target": lambda b, x, c, t: b.target(x, x, t),
    "to_x0": lambda b, x, c, t: b.to_x0(x, x, t),
    "to_eps": lambda b, x, c, t: b.to_eps(x, x, t),
    "predict": lambda b, x, c, t: b.predict(x, t, c),
    "predict_guided": lambda b, x, c, t: b.predict_guided(x, t, c, None, 2.0),
    "encode": lambda b, x, c, t: b.encode(["a mug"] * 3, t),
}


@pytest.mark.parametrize("name", _TAKE_TIMES)
@torch.no_grad()
def test_times_of_the_wrong_shape_are_refused(backbone: Any, name: str) -> None:
    take, x, conditioning = _TAKE_TIMES[name], torch.randn(3, 4, 8, 8), backbone.encode(["a mug"] * 3)
    for fine in (torch.tensor(300), torch.tensor([1, 300, 999]), torch.tensor([1.5, 300.0, 999.0])):
        take(backbone, x, conditioning, fine)
    take(backbone, x, conditioning, 300)
    for shape in ([1, 3], [3, 1], [2], [1], [3, 4, 8, 8]):
        if name == "alpha_sigma" and len(shape) <= 2:
            continue  # it is given no batch or frames to compare with, so it accepts these shapes
        with pytest.raises(ValueError, match=re.escape(f"t has shape {shape}, but must be a scalar")):
            take(backbone, x, conditioning, torch.full(shape, 300))


def test_conditioning_for_another_batch_size_is_refused(backbone: Any) -> None:
    with pytest.raises(ValueError, match="the batch size is 3, but the conditioning is for 1"):
        backbone.predict(torch.randn(3, 4, 8, 8), torch.tensor(300), backbone.encode(["a mug"]))


def test_fractional_times_are_interpolated(sd: StableDiffusionBackbone) -> None:
    whole = sd.alpha_sigma(torch.arange(1000))
    same = sd.alpha_sigma(torch.arange(1000).float())
    assert torch.equal(whole[0], same[0]) and torch.equal(whole[1], same[1])
    alpha, sigma = sd.alpha_sigma(torch.tensor([10.5, 999.9]))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(2))
    assert whole[0][11] < alpha[0] < whole[0][10] and alpha[1] == whole[0][999]
    assert sd.alpha_sigma(torch.tensor(3))[0].shape == ()


def test_the_flow_process_matches_diffusers_scheduler(flux: FluxBackbone) -> None:
    x0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([250.0, 900.0])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.25])
    expected = scheduler.scale_noise(x0, scheduler.timesteps[[1, 0]], noise)
    assert torch.allclose(flux.add_noise(x0, noise, t), expected, atol=1e-6)
    alpha, sigma = flux.alpha_sigma(t)
    assert torch.allclose(alpha + sigma, torch.ones(2)) and torch.equal(flux.target(x0, noise, t), noise - x0)


# --- networks -------------------------------------------------------------------------------------------------


def test_encoding_matches_the_stable_diffusion_pipeline(tiny_sd: Any, sd: StableDiffusionBackbone) -> None:
    prompts = ["a photo of a mug", "a mug " * 40]
    theirs = tiny_sd.encode_prompt(prompts, "cpu", 1, False)[0]
    assert torch.equal(sd.encode(prompts).context, theirs)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    expected = tiny_sd.unet(x, t, encoder_hidden_states=theirs).sample
    assert torch.equal(sd.predict(x, t, sd.encode(prompts)), expected)


def test_encoding_and_prediction_match_the_flux_pipeline(tiny_flux: Any, flux: FluxBackbone) -> None:
    prompts = ["a photo of a mug", "a dog"]
    context, pooled, text_ids = tiny_flux.encode_prompt(prompts, max_sequence_length=48)
    ours = flux.encode(prompts)
    assert torch.equal(ours.context, context) and torch.equal(ours.pooled, pooled)
    x, t = torch.randn(2, 4, 8, 12), torch.tensor([100.0, 900.0])
    out = tiny_flux.transformer(
        hidden_states=FluxPipeline._pack_latents(x, 2, 4, 8, 12),
        timestep=t / 1000,
        guidance=torch.full([2], 2.5),
        pooled_projections=pooled,
        encoder_hidden_states=context,
        txt_ids=text_ids,
        img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32),
    ).sample
    assert torch.equal(flux.predict(x, t, ours, guidance=2.5), FluxPipeline._unpack_latents(out, 32, 48, 4))


def test_packing_matches_the_flux_pipeline() -> None:
    x = torch.randn(2, 4, 6, 10)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 10)) and torch.equal(unpack(pack(x), 6, 10), x)
    assert torch.equal(picture_ids(3, 5), FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32))


def test_pictures_are_encoded_and_decoded(backbone: Any) -> None:
    vae, pixels = backbone.vae, torch.rand(2, 3, 32, 32) * 2 - 1
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    posterior = vae.encode(pixels).latent_dist
    latents = backbone.encode_pixels(pixels)
    assert torch.allclose(latents, (posterior.mean - shift) * scale, atol=1e-6)
    mean, spread = backbone.latent_moments(pixels)
    drawn = backbone.encode_pixels(pixels, torch.Generator().manual_seed(5))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(drawn, mean + spread * noise, atol=1e-5) and torch.equal(mean, latents)
    assert torch.allclose(backbone.decode(latents), vae.decode(posterior.mean).sample, atol=1e-5)
    pixels.requires_grad_(True)
    backbone.encode_pixels(pixels).square().sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_each_family_accepts_only_supported_picture_sizes(sd: StableDiffusionBackbone, flux: FluxBackbone) -> None:
    assert sd.latent_shape(32, 64) == (4, 8, 16) and flux.latent_shape(32, 64) == (4, 8, 16)
    assert sd.latent_shape(36, 36) == (4, 9, 9) and sd.resolution == 32
    with pytest.raises(ValueError, match="36x36 does not fit flux: both sides must be multiples of 8"):
        flux.latent_shape(36, 36)
    with pytest.raises(ValueError, match="multiples of 4"):
        sd.encode_pixels(torch.zeros(1, 3, 30, 32))


def test_unsupported_conditioning_is_refused(sd: StableDiffusionBackbone, flux: FluxBackbone) -> None:
    for backbone in (sd, flux):
        conditioning = backbone.encode(["a mug"])
        extra = type(conditioning)(conditioning.context, conditioning.pooled, (ImageTokens(torch.zeros(1, 4, 16)),))
        with pytest.raises(ValueError, match="image tokens"):
            backbone.predict(torch.randn(1, 4, 8, 8), torch.tensor(3), extra)
        unread_ones: list[dict[str, Any]] = [
            {"regions": {"mug": torch.ones(1, 1, 8, 8)}},
            {"size_ids": torch.zeros(1, 6)},
        ]
        unread_ones += [{"context_mask": torch.ones(1, 32, dtype=torch.bool)}]
        for unread in unread_ones:
            with pytest.raises(ValueError, match=f"{backbone.family}: {next(iter(unread))}"):
                backbone.predict(torch.randn(1, 4, 8, 8), torch.tensor(3), dataclasses.replace(conditioning, **unread))
    with pytest.raises(ValueError, match="must be one tensor"):
        flux.predict(torch.randn(1, 4, 8, 8), torch.tensor(3), flux.encode(["a mug"]).per_site(["x"]))
    partial = sd.encode(["a mug"]).per_site(sd.text_sites()[:1])
    with pytest.raises(ValueError, match=r"no context for the sites .*mid_block"):
        sd.predict(torch.randn(1, 4, 8, 8), torch.tensor(3), partial)


def test_unsupported_unets_are_refused(tiny_sd: Any) -> None:
    config = {**tiny_sd.unet.config, "in_channels": 9, "_use_default_values": []}
    tiny_sd.unet = diffusers.UNet2DConditionModel.from_config(config)
    with pytest.raises(ValueError, match="inpainting"):
        StableDiffusionBackbone(tiny_sd)


def test_word_embeddings_are_rows_of_the_table(backbone: Any) -> None:
    for component in [c for c in backbone.components if c.startswith("text_encoder")]:
        tokenizer, model = backbone.tokens.base[component], backbone.components[component]
        ids = tokenizer("red mug", add_special_tokens=False).input_ids
        rows = backbone.word_embeddings(component, "red mug")
        assert torch.equal(rows, model.get_input_embeddings().weight[ids]) and not rows.requires_grad
        with pytest.raises(ValueError, match="contains no word"):
            backbone.word_embeddings(component, " ")


# --- adapters by name -----------------------------------------------------------------------------------------


def test_only_the_named_adapters_are_active(backbone: Any) -> None:
    base = predict(backbone)
    add_lora(backbone, "mug", "self_attention", 1)
    mug = predict(backbone)
    add_lora(backbone, "student", "cross_attention", 2)
    add_lora(backbone, "student", "feed_forward", 3)
    both = predict(backbone)

    def with_(strengths: dict[str, float]) -> Tensor:
        with backbone.active(strengths):
            return predict(backbone)

    assert torch.equal(with_({}), base) and torch.equal(with_({"mug": 1, "student": 1}), both)
    # The teacher of the "student" adapters is the base model with the concept, not the base model alone.
    assert torch.equal(with_({"mug": 1.0}), mug)
    assert not torch.allclose(mug, base, atol=1e-4)
    halves = [with_({"mug": s}) for s in (0.25, 0.5)]
    assert not torch.allclose(*halves, atol=1e-5) and not torch.allclose(with_({"student": 1}), both, atol=1e-5)
    assert torch.equal(predict(backbone), both)


def test_strengths_are_restored_when_the_context_ends(sd: StableDiffusionBackbone) -> None:
    for i, name in enumerate(["a", "b"]):
        add_lora(sd, name, "cross_attention", i)
    with sd.active({"a": 0.5}):
        outside = predict(sd)
        with pytest.raises(RuntimeError), sd.active({"b": 2.0}):
            assert sd.strengths == {"a": 0.0, "b": 2.0}
            raise RuntimeError
        assert sd.strengths == {"a": 0.5, "b": 0.0} and torch.equal(predict(sd), outside)
        add_lora(sd, "c", "conv", 5)
        assert sd.strengths["c"] == 1.0
        sd.remove("b")
    assert sd.strengths == {"a": 1.0, "c": 1.0}
    with pytest.raises(ValueError, match=r"nothing named 'z' is loaded. Loaded: a, c"), sd.active({"z": 1}):
        pass
    with pytest.raises(ValueError, match="nothing named 'z'"):
        sd.remove("z")


@pytest.mark.parametrize("on", [{"b": 1.0}, {"c": 1.0}, {}, {"a": 0.5, "c": 1.0}])
def test_reactivated_adapters_give_the_same_output_bit_for_bit(backbone: Any, on: dict[str, float]) -> None:
    """Each layer has several adapters. Adding their outputs in a different order would change the rounding."""
    for i, name in enumerate("abc"):
        add_lora(backbone, name, "attention", i)
    before = predict(backbone)
    with backbone.active(on):
        predict(backbone)
        with backbone.active({"b": 0.5}):
            predict(backbone)
    assert torch.equal(predict(backbone), before)


def test_changed_weights_are_restored_bit_for_bit(sd: StableDiffusionBackbone) -> None:
    weight = sd.denoiser.get_parameter("conv_in.weight")
    for name in "abc":
        DeltaAdapter.inject(sd, name, "weights", {"unet.conv_in.weight": torch.randn_like(weight)})
    before = weight.detach().clone()
    with sd.active({"b": 1.0}):
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


def test_removing_adapters_restores_outputs_and_repr(backbone: Any) -> None:
    text, base = {c: repr(m) for c, m in backbone.components.items()}, predict(backbone)
    add_lora(backbone, "mug", "attention", 1)
    add_lora(backbone, "mug", "text_encoder", 2)
    assert not torch.allclose(predict(backbone), base, atol=1e-4)
    backbone.remove("mug")
    assert {c: repr(m) for c, m in backbone.components.items()} == text
    assert torch.equal(predict(backbone), base) and backbone.adapters == {} == backbone.strengths
