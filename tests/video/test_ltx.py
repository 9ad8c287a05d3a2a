"""Tests what is specific to LTX: masked padding, times in seconds, its noise schedule and a decoder that adds noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import LTXPipeline

from pcs_video.backbones.ltx import LTXBackbone
from pcs_video.backbones.wan import WanBackbone
from shared.sampling.sampler import sample
from shared.sampling.schedulers import make_scheduler
from shared.sampling.settings import SamplingSettings
from shared.types import Conditioning
from tests.video.transformer_models import build_ltx, build_wan
from tests.video.transformer_runs import noise, nothing, pipeline_clips

SETTINGS = SamplingSettings("blurry", 4.0, 4, height=32, width=32, frames=9)
ASKED: Any = {"prompts": ["a red mug", "a dog"], "seeds": [3, 4], "settings": SETTINGS}


@pytest.fixture
def ltx() -> LTXBackbone:
    return LTXBackbone(build_ltx(), "tiny")


def test_the_encoding_and_the_prediction_match_the_pipeline(ltx: LTXBackbone) -> None:
    prompts, pipe = ["a photo of a mug", "a dog"], ltx.pipeline()
    theirs, mask, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=48)
    ours = ltx.encode(prompts)
    assert torch.equal(ours.context, theirs) and ours.pooled is None
    assert ours.context_mask is not None and ours.context_mask.dtype == torch.bool
    assert torch.equal(ours.context_mask, mask)
    x, t = noise(2, 4, 3, 4, 6), torch.tensor([100.0, 900.0])
    expected = pipe.transformer(
        LTXPipeline._pack_latents(x),
        theirs,
        t,
        mask,
        num_frames=3,
        height=4,
        width=6,
        rope_interpolation_scale=(8 / 25, 8, 8),
    ).sample
    assert torch.equal(ltx.predict(x, t, ours), LTXPipeline._unpack_latents(expected, 3, 4, 6))
    assert (ltx.default_guidance, ltx.default_steps, ltx.frames) == (3.0, 50, 161)


@torch.no_grad()
def test_padding_is_ignored(ltx: LTXBackbone) -> None:
    x, t, text = noise(1, 4, 2, 4, 4), torch.tensor(500), ltx.encode(["a mug"])
    assert isinstance(text.context, torch.Tensor) and text.context_mask is not None
    plain = ltx.predict(x, t, text)
    for at_padding in (True, False):
        where = (text.context_mask != at_padding)[..., None]
        changed = replace(text, context=torch.where(where, text.context + 3, text.context))
        assert torch.equal(ltx.predict(x, t, changed), plain) == at_padding
        with ltx.attending(nothing):
            assert torch.equal(ltx.predict(x, t, changed), plain) == at_padding


def test_context_masks_are_concatenated_and_required_by_some_networks_and_refused_by_others(ltx: LTXBackbone) -> None:
    a, b, together = (ltx.encode(prompts) for prompts in (["a mug"], ["a dog"], ["a mug", "a dog"]))
    both = Conditioning.cat([a, b])
    assert both.context_mask is not None and together.context_mask is not None
    assert torch.equal(both.context_mask, together.context_mask)
    with pytest.raises(ValueError, match="an optional input is set for only some of them"):
        Conditioning.cat([a, replace(b, context_mask=None)])
    x, t = noise(1, 4, 2, 4, 4), torch.tensor(500)
    with pytest.raises(ValueError, match="ltx: context_mask is missing: this network needs to know"):
        ltx.predict(x, t, replace(a, context_mask=None))
    wan = WanBackbone(build_wan(), "tiny")
    with pytest.raises(ValueError, match="wan: context_mask is only for networks that need to know"):
        wan.predict(x, t, replace(wan.encode(["a mug"]), context_mask=a.context_mask))


def test_the_frame_rate_sets_the_time_of_each_frame(ltx: LTXBackbone) -> None:
    usual = sample(ltx, **ASKED)
    ltx.frame_rate = 8.0
    ours = sample(ltx, **ASKED)
    torch.testing.assert_close(ours, pipeline_clips(ltx.pipeline(), 9, frame_rate=8), atol=2e-5, rtol=0)
    assert not torch.allclose(ours, usual, atol=1e-4)


def test_the_shift_of_the_noise_schedule_depends_on_the_number_of_tokens(ltx: LTXBackbone) -> None:
    times = []
    for frames in (9, 25):
        solver = make_scheduler(ltx)
        ltx.set_timesteps(solver, 3, ltx.latent_shape(32, 32, frames))
        pipe = ltx.pipeline()
        pipeline_clips(pipe, frames, num_inference_steps=3)
        assert torch.equal(solver.timesteps, pipe.scheduler.timesteps)
        times.append(solver.timesteps)
    assert bool((times[0][1:] < times[1][1:]).all())  # longer clips stay at high noise for longer


def test_a_decoder_that_adds_noise_matches_the_pipeline_and_is_deterministic() -> None:
    ltx = LTXBackbone(build_ltx(timed_decoder=True), "tiny")
    for module in ltx.vae.decoder.modules():  # the noise scales are initialized to 0
        for key in ("per_channel_scale1", "per_channel_scale2"):
            if getattr(module, key, None) is not None:
                getattr(module, key).data.fill_(0.3)
    ours = sample(ltx, **ASKED)
    state = torch.get_rng_state()
    assert torch.equal(sample(ltx, **ASKED), ours) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)  # the decoder draws from the global generator
    torch.testing.assert_close(ours, pipeline_clips(ltx.pipeline(), 9), atol=2e-5, rtol=0)
    ltx.decode_time = 0.5
    assert not torch.allclose(sample(ltx, **ASKED), ours, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 8}, "the transformer needs 8 channels, but gets 4"),
        ({"patch_size": 2, "in_channels": 16}, "patches of 1x2x2 are not supported"),
    ],
)
def test_unsupported_variants_of_ltx_are_refused(change: dict[str, Any], message: str) -> None:
    pipe = build_ltx()
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    pipe.transformer = type(pipe.transformer)(**{**config, **change})
    with pytest.raises(ValueError, match=message):
        LTXBackbone(pipe, "tiny")
