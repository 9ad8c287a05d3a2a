"""Tests the building blocks of training: random draws, batches, caches and losses."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.config import validate
from shared.modifiers import LearnableToken, RareToken
from shared.noise import LogitNormal, Uniform
from shared.objective import Denoising
from shared.recipe.schema import Recipe
from shared.train.batches import Data
from shared.train.loop import generator
from shared.train.phase_context import PhaseContext
from shared.train.tune import Tune
from shared.trainable import Lora
from shared.types import Example, Subject


@pytest.fixture
def sd(make_tiny_sd):
    backbone = StableDiffusionBackbone(make_tiny_sd(), "tiny")
    RareToken().attach(backbone, "mug", "mug")
    return backbone


def pictures(n: int = 3, role="instance", mask: bool = False, caption: str = "", owner: str = "mug") -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    area = torch.zeros(1, 32, 32)
    area[:, 8:24, 4:20] = 1
    return [
        Example(
            torch.rand(3, 32, 32, generator=generator) * 2 - 1,
            caption,
            (owner,),
            role,
            masks={owner: area} if mask else {},
            source=f"{i}.png",
            user_caption=bool(caption),
        )
        for i in range(n)
    ]


def recipe(**changes) -> Recipe:
    return validate(Recipe, {"train": {"batch_size": 2}, "prompts": {"set": "subject"}, **changes})


def data(backbone, examples, words="sks mug", **changes) -> Data:
    return Data(examples, recipe(**changes), backbone, {"mug": words}, {"mug": "mug"})


# --- draws -----------------------------------------------------------------------------------


def test_every_step_has_its_own_random_stream():
    keys = [(seed, step, micro) for seed in range(3) for step in range(20) for micro in range(3)]
    first = {float(torch.rand((), generator=generator(*k))) for k in keys}
    assert len(first) == len(keys)
    assert torch.equal(torch.rand(4, generator=generator(1, 2)), torch.rand(4, generator=generator(1, 2, 0)))


def test_timesteps_are_uniform_integers_within_their_range():
    draw = torch.Generator().manual_seed(0)
    t = Uniform(low=0.2, high=0.6).draw_times(20_000, draw, discrete=True)
    assert t.min() == 200 and t.max() == 599 and torch.equal(t, t.floor())
    assert abs(float(t.mean()) - 399.5) < 2
    whole = Uniform().draw_times(50_000, draw, discrete=True)
    assert whole.min() == 0 and whole.max() == 999
    assert Uniform().draw_times(1000, draw, discrete=False).max() < 1000


def test_logit_normal_timesteps_have_the_expected_quantiles():
    draw = torch.Generator().manual_seed(0)
    for mean, shift in ((0.0, 1.0), (0.5, 1.0), (0.0, 3.0)):
        t = LogitNormal(mean=mean, shift=shift).draw_times(50_000, draw, discrete=False).double() / 1000
        for z in (-1.0, 0.0, 1.0):  # a monotone map preserves the quantiles of the normal distribution
            u = 1 / (1 + math.exp(-(mean + z)))
            expected = shift * u / (1 + (shift - 1) * u)
            share = 0.5 * (1 + math.erf(z / math.sqrt(2)))
            assert abs(float((t < expected).double().mean()) - share) < 0.01


def test_the_noise_offset_is_one_shift_per_picture_and_channel():
    like = torch.zeros(64, 4, 16, 16)
    plain = Uniform().draw_noise(like, torch.Generator().manual_seed(0))
    shifted = Uniform(offset=0.5).draw_noise(like, torch.Generator().manual_seed(0))
    difference = shifted - plain
    assert torch.allclose(difference, difference[..., :1, :1].expand_as(difference), atol=1e-5)
    assert abs(float(difference[..., 0, 0].std()) - 0.5) < 0.07 and abs(float(plain.std()) - 1) < 0.01


# --- batches and caches ----------------------------------------------------------------------


def test_every_picture_appears_once_per_epoch_and_the_order_changes(sd):
    examples = pictures(4, caption="a")
    examples = [e.with_(caption=f"{i}") for i, e in enumerate(examples)]
    source = data(sd, examples)
    seen = [c for step in range(40) for c in source.batch(step, 0).captions]
    epochs = [tuple(seen[i : i + 4]) for i in range(0, 80, 4)]
    assert all(len(set(e)) == 4 for e in epochs) and len(set(epochs)) > 5


def test_latents_and_captions_are_the_same_with_and_without_the_cache(sd):
    cached = data(sd, pictures(mask=True))
    fresh = data(sd, pictures(mask=True), train={"batch_size": 2, "cache": False})
    assert cached.cached and not fresh.cached
    for step in range(4):
        one, two = cached.batch(step, 0), fresh.batch(step, 0)
        assert one.captions == two.captions and one.owners == two.owners == (("mug",), ("mug",))
        assert torch.allclose(one.latents, two.latents, atol=1e-5) and torch.equal(one.mask, two.mask)
    assert len({c for step in range(20) for c in cached.batch(step, 0).captions}) > 5, (
        "captions are drawn again at each step"
    )


def test_cached_latents_have_the_mean_and_spread_that_the_autoencoder_predicts(sd):
    source = data(sd, pictures(1), train={"batch_size": 1})
    mean, std = sd.latent_moments(pictures(1)[0].pixels[None])
    latents = torch.cat([source.batch(step, 0).latents for step in range(400)])
    assert torch.allclose(latents.mean(0), mean[0], atol=float(std.max()) * 0.3)
    assert abs(float(latents.std(0).mean() / std.mean()) - 1) < 0.1


def test_a_deterministic_augmentation_also_works_with_the_cache(sd):
    flip = {"flip": {"p": 1.0}}
    plain, cached, fresh = (
        data(sd, pictures(), **k)
        for k in ({}, {"augment": flip}, {"augment": flip, "train": {"batch_size": 2, "cache": False}})
    )
    assert cached.cached
    one, two = cached.batch(0, 0), fresh.batch(0, 0)
    assert torch.allclose(one.latents, two.latents, atol=1e-5) and one.captions == two.captions
    assert not torch.allclose(one.latents, plain.batch(0, 0).latents, atol=1e-2)
    assert len({c for step in range(20) for c in cached.batch(step, 0).captions}) > 5


def test_random_augmentations_are_drawn_each_time_or_cached_as_variants(sd):
    jitter = {"color_jitter": {"brightness": 0.9}}

    def means(**train) -> set[float]:
        source = data(sd, pictures(1), augment=jitter, train={"batch_size": 1, **train})
        return {
            round(float(source._cached_example("instance", 0, generator(0, s)).mean.double().sum()), 4)
            for s in range(12)
        }

    assert len(means()) == 12
    assert 1 < len(means(variants=3)) <= 3
    assert len(means(cache=False, variants=3)) == 12


def test_masks_and_valid_areas_are_downscaled_by_area(sd):
    example = pictures(1, mask=True)[0]
    valid = torch.ones(1, 32, 32)
    valid[:, :, 16:] = 0
    batch = data(sd, [example.with_(valid=valid), pictures(1)[0]]).batch(0, 0)
    expected = torch.zeros(1, 8, 8)
    expected[:, 2:6, 1:5] = 1
    rows = {int(m.sum()): (m, v) for m, v in zip(batch.mask, batch.valid, strict=True)}
    assert torch.equal(rows[16][0], expected) and rows[16][1][0, :, :4].all() and not rows[16][1][0, :, 4:].any()
    assert rows[64][1].all(), "a picture without a mask counts everywhere"


def test_a_masked_loss_without_masks_causes_a_warning(sd):
    with pytest.warns(UserWarning, match="no picture has a mask"):
        data(sd, pictures(), objective={"masked": True})


def test_class_pictures_are_added_if_a_penalty_needs_them(sd):
    sources = {"references": {}, "class_pictures": {"kind": "generated"}}
    prior = {"sources": sources, "regularize": {"prior_preservation": {}}}
    both = [*pictures(), *pictures(2, "prior", caption="a photo of a mug")]
    batch = data(sd, both, **prior).batch(0, 0)
    assert batch.role == ("instance", "instance", "prior", "prior") and batch.with_role("prior").tolist() == [
        0,
        0,
        1,
        1,
    ]
    assert set(batch.captions[2:]) == {"a photo of a mug"} and all("sks" in c for c in batch.captions[:2])
    assert data(sd, both).batch(0, 0).role == ("instance", "instance")
    with pytest.raises(ValueError, match="needs class pictures, but its sources provide none"):
        data(sd, pictures(), **prior)
    with pytest.raises(ValueError, match="no pictures of the subject"):
        data(sd, pictures(2, "prior", caption="x"))


def test_a_caption_may_name_another_concept(sd):
    LearnableToken(vectors=2, with_class_noun=True).attach(sd, "dog", "dog")
    batch = data(sd, pictures(1, caption="a <mug> and a <dog>"), train={"batch_size": 1}).batch(0, 0)
    assert batch.captions == ("a sks mug and a <dog> <dog>_1 dog",)
    with pytest.raises(ValueError, match=r"the caption of 0\.png: the prompt names <cat>, which is not loaded"):
        data(sd, pictures(1, caption="a <mug> and a <cat>"))


# --- losses ----------------------------------------------------------------------------------


def test_the_area_normalized_masked_loss_matches_its_closed_form():
    draw = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(3, 4, 8, 8, generator=draw) for _ in range(2))
    mask = torch.rand(3, 1, 8, 8, generator=draw)
    mask[1] = (mask[1] > 0.9).float()
    valid = (torch.rand(3, 1, 8, 8, generator=draw) > 0.2).float()
    for outside in (0.0, 0.25):
        part = Denoising(masked=True, outside=outside)
        rows = part.example_losses(prediction, target, part.weight(mask, valid))
        weight = ((outside + (1 - outside) * mask) * valid).double()
        error = ((prediction.double() - target.double()) ** 2).mean(1, keepdim=True)
        expected = (weight * error).sum((1, 2, 3)) / weight.sum((1, 2, 3))
        assert torch.allclose(rows.double(), expected, rtol=1e-5)
    assert torch.equal(Denoising().weight(mask, None), mask), "a given mask is used unless masking is switched off"
    assert Denoising().weight(None, None) is None
    plain = Denoising(masked=False)
    assert plain.weight(mask, None) is None and torch.equal(plain.weight(mask, valid), valid)
    expected = ((prediction.double() - target.double()) ** 2).mean((1, 2, 3))
    assert torch.allclose(plain.example_losses(prediction, target, None).double(), expected, rtol=1e-5)


def test_the_loss_can_give_the_subject_a_lower_weight_than_the_rest():
    """This lets a run learn a motion, not the thing that moves. An example whose mask is 1 everywhere counts fully."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 1, 5, 8, 8, generator=draw)
    mask[1] = 1.0
    valid = (torch.rand(3, 1, 5, 8, 8, generator=draw) > 0.2).float()
    part = Denoising(inside=0.25, outside=1.0)
    expected = 1 - 0.75 * mask
    expected[1] = 1.0
    assert part.inverts and torch.allclose(part.weight(mask, None), expected)
    assert torch.allclose(part.weight(mask, valid), expected * valid)
    assert not Denoising(inside=0.25, outside=1.0, masked=False).inverts and not Denoising(outside=1.0).inverts
    with pytest.raises(ValueError, match="nothing would be learned with inside = 0 and outside = 0"):
        Denoising(inside=0)


def test_a_lower_weight_for_the_subject_causes_a_warning_if_there_are_no_masks(sd):
    with pytest.warns(UserWarning, match="objective.inside is below objective.outside, but no picture has a mask"):
        data(sd, pictures(2), objective={"inside": 0.0, "outside": 1.0})


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("family", ["epsilon", "v", "flow"])
def test_min_snr_weights_the_loss_on_x0(request, family, gamma):
    """The loss must be min(SNR, gamma) |x_0 - x_0'|^2 (arXiv 2303.09556), converted to the model's parameterization."""
    if family == "flow":
        backbone = FluxBackbone(request.getfixturevalue("make_tiny_flux")(), "tiny")
        t = torch.tensor([1.0, 130.0, 500.0, 777.5, 999.0])
        sigma = t.double() / 1000
        alpha = 1 - sigma
        scale = sigma**2  # x_0 = x_t - sigma v
    else:
        make = request.getfixturevalue("make_tiny_sd" if family == "epsilon" else "make_tiny_sd_v")
        backbone = StableDiffusionBackbone(make(), "tiny")
        t = torch.tensor([0, 130, 500, 777, 999])
        bar = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)[t]
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        scale = sigma**2 / alpha**2 if family == "epsilon" else sigma**2
    snr = (alpha / sigma) ** 2
    weight = Denoising(min_snr_gamma=gamma).time_weight(backbone, t).double()
    assert torch.allclose(weight, snr.clamp_max(gamma) * scale, rtol=2e-4)
    if family == "epsilon":
        assert torch.allclose(weight, snr.clamp_max(gamma) / snr, rtol=2e-4)
    if family == "v":
        assert torch.allclose(weight, snr.clamp_max(gamma) / (snr + 1), rtol=2e-4)
    assert torch.equal(Denoising().time_weight(backbone, t), torch.ones(5))


def task(sd, trained, **changes) -> Tune:
    nothing = nullcontext
    return Tune(
        PhaseContext(
            sd, "tune", recipe(**changes), {"mug": Subject((), "mug")}, ["mug"], ["mug"], trained, {}, {"mug": []},
            examples=pictures, text_on_device=nothing, folder=Path("unused"),
        )
    )  # fmt: skip


def test_text_that_does_not_change_is_encoded_once_and_gives_the_same_loss(sd):
    lora = Lora(rank=2).inject(sd, "mug", "lora", seed=0)
    kept, anew = (task(sd, [lora], train={"batch_size": 2, "cache": c}) for c in (True, False))
    assert kept.text_frozen and not anew.text_frozen
    runs = []
    sd.components["text_encoder"].register_forward_hook(lambda *_: runs.append(1))

    def losses(task) -> list[float]:
        return [float(u.loss.detach()) for step in range(12) for u in task.updates(step, 0)]

    first = losses(kept)
    assert 0 < len(runs) <= 11, "each of the eleven templates is encoded at most once"
    before = len(runs)
    assert losses(kept) == first and len(runs) == before
    assert torch.allclose(torch.tensor(losses(anew)), torch.tensor(first), rtol=1e-4) and len(runs) == before + 12
    text = Lora(roles=("text_encoder",), rank=2).inject(sd, "mug", "text", seed=0)
    assert not task(sd, [lora, text]).text_frozen
