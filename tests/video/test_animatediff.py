"""Compares the AnimateDiff backbone with diffusers: prediction for clips and pictures, encoding, and sampling."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_video.backbones.animatediff import AnimateDiffBackbone, with_motion
from shared.backbones.module_roles import leaf_names, parameter_holders
from shared.backbones.protocol import Backbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.sampling.sampler import sample
from shared.sampling.settings import SamplingSettings
from shared.train.memory import recomputed
from shared.trainable.lora import Lora
from tests.video.clip_models import build_animatediff

Make = Callable[..., Any]


@pytest.fixture
def clips(make_tiny_sd: Make) -> AnimateDiffBackbone:
    return AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ask(backbone: Any, x: Tensor, prompts: tuple[str, ...]) -> Tensor:
    return backbone.predict(x, torch.tensor(300), backbone.encode(list(prompts)))


def scramble(adapter: Any, seed: int = 1) -> None:
    """Gives the adapter random weights, so that it has an effect."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)


def test_the_backbone_implements_the_protocol_and_is_frozen(clips: AnimateDiffBackbone) -> None:
    assert isinstance(clips, Backbone)
    assert clips.frames == 8 and clips.reads == {"animatediff", "stable_diffusion"}
    assert not any(p.requires_grad for m in (*clips.components.values(), clips.vae) for p in m.parameters())


def test_no_layer_has_two_roles_and_every_layer_that_relates_frames_has_a_temporal_role(
    clips: AnimateDiffBackbone,
) -> None:
    exact: dict[str, str] = {}
    temporal = ("temporal_attention", "temporal_feed_forward")
    for role in (*temporal, "self_attention", "cross_attention", "feed_forward", "conv", "proj"):
        (group,) = clips.group(role)
        assert group.resolution == "exact" and not exact.keys() & set(group.modules), role
        exact |= dict.fromkeys(group.modules, role)
    (everything,), (whole,) = clips.group("denoiser"), clips.group("denoiser.all")
    left = set(leaf_names(clips.unet)) - set(everything.modules)
    assert everything.resolution == "port" and "proj_in and proj_out" in everything.note
    assert left and all(re.fullmatch(r".*motion_modules\.\d+\.proj_(in|out)", name) for name in left)
    moves = {name for name in everything.modules if "motion_modules" in name}
    assert moves == {name for name, role in exact.items() if role in temporal}
    assert exact.keys() < set(everything.modules) and whole.modules == parameter_holders(clips.unet)


def test_clips_go_through_the_whole_network(clips: AnimateDiffBackbone) -> None:
    x, prompts = noise(2, 4, 5, 8, 8), ("a mug", "a dog")
    context = clips.encode(list(prompts)).context
    assert isinstance(context, Tensor)
    with torch.no_grad():
        expected = clips.unet(x, torch.tensor(300), encoder_hidden_states=context.repeat_interleave(5, 0)).sample
    assert torch.equal(ask(clips, x, prompts), expected)
    other = x.clone()
    other[:, :, 4] += 1
    assert not torch.allclose(ask(clips, other, prompts)[:, :, 0], expected[:, :, 0])  # frames attend to each other


def test_pictures_go_through_the_image_network(clips: AnimateDiffBackbone, make_tiny_sd: Make) -> None:
    pictures = StableDiffusionBackbone(make_tiny_sd(), "tiny")
    x, prompts = noise(2, 4, 8, 8), ("a mug", "a dog")
    assert torch.equal(ask(clips, x, prompts), ask(pictures, x, prompts))
    one_frame = ask(clips, x[:, :, None], prompts)[:, :, 0]
    # motion modules change even a one-frame clip, so pictures go through the image network instead
    assert not torch.allclose(one_frame, ask(pictures, x, prompts), atol=1e-3)


@pytest.mark.parametrize("role", ["self_attention", "cross_attention", "denoiser", "conv"])
def test_injected_adapters_affect_both_clips_and_pictures(
    clips: AnimateDiffBackbone, make_tiny_sd: Make, role: str
) -> None:
    """On pictures, an adapter has exactly the same effect as on the image U-Net. It also changes predictions for clips.

    Removing the adapter restores both predictions.
    """
    x, prompts = noise(1, 4, 8, 8), ("a mug",)
    before_picture, before_clip = ask(clips, x, prompts), ask(clips, noise(1, 4, 3, 8, 8), prompts)
    Lora(roles=(role,), rank=2).inject(clips, "mug", "lora", 0)
    adapter = clips.adapters["mug"][0]
    pictures = StableDiffusionBackbone(make_tiny_sd(), "tiny")
    Lora(roles=(role,), rank=2).inject(pictures, "mug", "lora", 0)
    for each in (adapter, pictures.adapters["mug"][0]):
        for key, parameter in zip(each.state_dict(), each.parameters(), strict=True):
            seed = sum(key.replace("motion_modules", "").encode())
            parameter.data = 0.3 * noise(*parameter.shape, seed=seed)
    if role == "denoiser":  # this role includes the motion modules
        assert any("motion_modules" in key for key in adapter.state_dict())
    else:
        assert adapter.state_dict().keys() == pictures.adapters["mug"][0].state_dict().keys()
    assert torch.equal(ask(clips, x, prompts), ask(pictures, x, prompts))
    assert not torch.allclose(ask(clips, noise(1, 4, 3, 8, 8), prompts), before_clip, atol=1e-3)
    clips.remove("mug")
    assert torch.equal(ask(clips, x, prompts), before_picture)
    assert torch.equal(ask(clips, noise(1, 4, 3, 8, 8), prompts), before_clip)


def test_motion_adapters_do_not_change_pictures(clips: AnimateDiffBackbone) -> None:
    x = noise(1, 4, 8, 8)
    before = ask(clips, x, ("a mug",)), ask(clips, noise(1, 4, 3, 8, 8), ("a mug",))
    Lora(roles=("temporal_attention",), rank=2).inject(clips, "spin", "lora", 0)
    scramble(clips.adapters["spin"][0])
    assert torch.equal(ask(clips, x, ("a mug",)), before[0])
    assert not torch.allclose(ask(clips, noise(1, 4, 3, 8, 8), ("a mug",)), before[1], atol=1e-3)


def test_gradient_checkpointing_does_not_change_the_gradients_of_pictures(clips: AnimateDiffBackbone) -> None:
    """Enabling gradient checkpointing for the whole network also enables it for the image network."""
    group = Lora(rank=2).inject(clips, "mug", "lora", 0)
    scramble(clips.adapters["mug"][0])
    context = clips.encode(["a mug"])

    def gradients() -> list[Tensor]:
        loss = clips.predict(noise(1, 4, 8, 8), torch.tensor(300), context).square().mean()
        return list(torch.autograd.grad(loss, group.parameters))

    plain = gradients()
    clips.unet.enable_gradient_checkpointing()
    clips.unet.train()
    clips._pictures.train()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)
    assert all(block.gradient_checkpointing for block in clips._pictures.down_blocks)


def test_gradient_checkpointing_also_covers_motion_modules(clips: AnimateDiffBackbone) -> None:
    """diffusers' motion modules ignore the setting."""
    group = Lora(roles=("temporal_attention", "temporal_feed_forward"), rank=2).inject(clips, "spin", "lora", 0)
    scramble(clips.adapters["spin"][0])
    context, x = clips.encode(["a mug"]), noise(1, 4, 4, 8, 8)

    def learned(on: bool) -> tuple[list[Tensor], int]:
        """Returns the gradients, and how many numbers were stored for the backward pass."""
        stored: dict[int, Tensor] = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: stored.setdefault(id(t), t), lambda t: t)
        with recomputed(clips, on), hooks:
            loss = clips.predict(x, torch.tensor(300), context).square().mean()
        count = sum(t.numel() for t in stored.values())
        with recomputed(clips, on):
            return list(torch.autograd.grad(loss, group.parameters)), count

    (plain, all_stored), (again, stored) = learned(False), learned(True)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    assert stored < 0.25 * all_stored


def test_clips_are_encoded_frame_by_frame(clips: AnimateDiffBackbone) -> None:
    pixels = noise(2, 3, 3, 32, 32).clamp(-1, 1)
    latents = clips.encode_pixels(pixels)
    each = torch.stack([clips.encode_pixels(pixels[:, :, i]) for i in range(3)], dim=2)
    torch.testing.assert_close(latents, each)
    mean, std = clips.latent_moments(pixels)
    torch.testing.assert_close(mean, each)
    torch.testing.assert_close(std[:, :, 1], clips.latent_moments(pixels[:, :, 1])[1])
    torch.testing.assert_close(clips.decode(latents)[:, :, 2], clips.decode(latents[:, :, 2]))


def test_unsupported_frame_counts_are_refused(clips: AnimateDiffBackbone) -> None:
    assert clips.latent_shape(32, 64) == (4, 8, 16) and clips.latent_shape(32, 64, 8) == (4, 8, 8, 16)
    for wrong, nearest in ((1, 2), (9, 8)):
        with pytest.raises(ValueError, match=f"a clip of {wrong} frames? .* the nearest is {nearest}"):
            clips.latent_shape(32, 32, wrong)


def test_sampling_matches_the_diffusers_pipeline(clips: AnimateDiffBackbone) -> None:
    settings = SamplingSettings("blurry", 5.0, 4, frames=6)
    ours = sample(clips, ["a red mug", "a dog"], seeds=[3, 4], settings=settings)
    pipe = clips.pipeline()
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        ["a red mug", "a dog"], 6, 32, 32, 4, 5.0, negative_prompt=["blurry"] * 2, output_type="pt",
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
    ).frames  # fmt: skip
    theirs = torch.as_tensor(frames).transpose(1, 2) * 2 - 1
    assert ours.shape == (2, 3, 6, 32, 32)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=0)


def test_a_motion_module_for_another_network_is_refused(make_tiny_sd: Make) -> None:
    from diffusers import MotionAdapter

    wrong = MotionAdapter(block_out_channels=(16, 32), motion_norm_num_groups=4, motion_num_attention_heads=2)
    with pytest.raises(ValueError, match="the motion module does not fit the U-Net: .*number of blocks"):
        with_motion(make_tiny_sd(), wrong)


def test_an_image_model_cannot_make_clips(make_tiny_sd: Make) -> None:
    with pytest.raises(ValueError, match="frames = 4: stable_diffusion generates pictures, not clips"):
        sample(
            StableDiffusionBackbone(make_tiny_sd(), "tiny"), ["a mug"], seeds=[0], settings=SamplingSettings(frames=4)
        )
