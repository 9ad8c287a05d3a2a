"""Tests what is specific to Wan: UMT5's zeroed padding, experts for noise ranges, and a timestep for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_video.backbones.wan import WanBackbone
from shared.concept import Provenance, capture, export
from shared.sampling.sampler import sample
from shared.sampling.schedulers import make_scheduler
from shared.sampling.settings import SamplingSettings
from shared.trainable.lora import Lora
from tests.video.transformer_models import build_wan
from tests.video.transformer_runs import learn, noise, nothing, pipeline_clips


@pytest.fixture
def wan() -> WanBackbone:
    return WanBackbone(build_wan(), "tiny")


@pytest.fixture
def experts() -> WanBackbone:
    """Returns a backbone with two experts. The boundary between them is at t = 700."""
    return WanBackbone(build_wan(experts=2), "tiny")


@torch.no_grad()
def ask(backbone: WanBackbone, t: Any, rows: int = 2) -> Tensor:
    prompts = ["a mug", "a dog", "a cat on the beach", "snow"][:rows]
    return backbone.predict(noise(rows, 4, 2, 4, 4), torch.as_tensor(t), backbone.encode(prompts))


def test_the_encoding_and_the_prediction_match_the_pipeline(wan: WanBackbone) -> None:
    prompts, pipe = ["a photo of a mug", "a dog"], wan.pipeline()
    theirs = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=48)[0]
    ours = wan.encode(prompts)
    assert torch.equal(ours.context, theirs) and ours.pooled is None and ours.context_mask is None
    words = len(wan.tokens.base["text_encoder"](prompts[1]).input_ids)
    assert not ours.context[1, words:].any() and bool((ours.context[1, :words].abs().sum(-1) > 0).all())
    x, t = noise(2, 4, 3, 4, 6), torch.tensor([100, 900])
    expected = pipe.transformer(x, timestep=t, encoder_hidden_states=theirs).sample
    assert torch.equal(wan.predict(x, t, ours), expected)
    assert (wan.default_guidance, wan.default_steps, wan.frames) == (5.0, 50, 81)


def test_the_timestep_selects_the_expert(experts: WanBackbone) -> None:
    x, text = noise(2, 4, 2, 4, 4), experts.encode(["a mug", "a dog"])
    high, low = experts.experts["transformer"], experts.experts["transformer_2"]
    for t, network in ((999, high), (700, high), (699, low), (0, low)):
        expected = network(x, timestep=torch.tensor([t, t]), encoder_hidden_states=text.context).sample
        assert torch.equal(experts.predict(x, torch.tensor(t), text), expected)
    assert experts.noise_ranges == {"transformer": (700.0, 1000.0), "transformer_2": (0.0, 700.0)}


def test_a_batch_is_split_between_the_experts(experts: WanBackbone) -> None:
    t = torch.tensor([300.0, 900.0, 699.5, 700.0])
    mixed = ask(experts, t, rows=4)
    text = experts.encode(["a mug", "a dog", "a cat on the beach", "snow"])
    for row in range(4):
        alone = type(text)(text.context[row : row + 1])
        with torch.no_grad():
            expected = experts.predict(noise(4, 4, 2, 4, 4)[row : row + 1], t[row], alone)[0]
        torch.testing.assert_close(mixed[row], expected, atol=1e-5, rtol=1e-4)


def test_only_the_expert_that_predicts_learns(experts: WanBackbone) -> None:
    group = Lora(rank=2).inject(experts, "mug", "lora", 0)
    by_expert = {a.component: list(a.parameters()) for a in experts.adapters["mug"]}
    assert by_expert.keys() == {"transformer", "transformer_2"}
    assert sum(map(len, by_expert.values())) == len(group.parameters)
    text = experts.encode(["a mug"])
    for t, learns in ((900, "transformer"), (100, "transformer_2")):
        experts.denoiser.zero_grad()
        gradients = torch.autograd.grad(
            experts.predict(noise(1, 4, 2, 4, 4), torch.tensor(t), text).square().sum(),
            group.parameters,
            allow_unused=True,
        )
        reached = {id(p) for p, g in zip(group.parameters, gradients, strict=True) if g is not None}
        assert reached == {id(p) for p in by_expert[learns]}


def test_the_second_expert_can_have_its_own_guidance(experts: WanBackbone) -> None:
    settings = SamplingSettings("blurry", 4.0, 4, height=32, width=32, frames=5)
    prompts: Any = {"prompts": ["a red mug", "a dog"], "seeds": [3, 4], "settings": settings}
    same = sample(experts, **prompts)
    experts.low_noise_guidance = 2.0
    ours = sample(experts, **prompts)
    pipe = experts.pipeline()
    torch.testing.assert_close(ours, pipeline_clips(pipe, 5, guidance_scale_2=2.0), atol=2e-5, rtol=0)
    assert not torch.allclose(ours, same, atol=1e-3)


def test_attention_edits_are_refused_in_a_batch_that_uses_both_experts(experts: WanBackbone) -> None:
    mixed = [300, 900]
    with (
        experts.attending(nothing),
        pytest.raises(ValueError, match=r"both sides of 700, where the experts change.*train\.batch_size=1"),
    ):
        ask(experts, mixed)
    ask(experts, mixed)


def test_sampling_with_one_timestep_per_token_matches_the_pipeline(wan: WanBackbone) -> None:
    """Wan 2.2 5B has one timestep per token."""
    backbone = WanBackbone(build_wan(time_per_token=True), "tiny")
    seen: list[Tensor] = []
    backbone.denoiser.register_forward_pre_hook(lambda m, a, k: seen.append(k["timestep"]), with_kwargs=True)
    settings = SamplingSettings("blurry", 4.0, 4, height=32, width=32, frames=5)
    ours = sample(backbone, ["a red mug", "a dog"], seeds=[3, 4], settings=settings)
    assert {tuple(t.shape) for t in seen} == {(4, 2 * 2 * 2)}
    torch.testing.assert_close(ours, pipeline_clips(backbone.pipeline(), 5), atol=2e-5, rtol=0)


def test_each_expert_is_exported_to_its_own_file_with_loading_instructions(experts: WanBackbone, tmp_path: Any) -> None:
    learn(experts)
    concept = capture(experts, "my-mug", Provenance(class_noun="mug"))
    report = export(concept, tmp_path / "out", backbone=experts)
    files = report["lora"]["files"]
    assert files["pytorch_lora_weights.safetensors"] == {}
    assert files["pytorch_lora_weights.transformer_2.safetensors"] == {"load_into_transformer_2": True}
    assert "load_into_transformer_2=True" in (tmp_path / "out/README.txt").read_text()


def test_another_scheduler_uses_the_same_shift(wan: WanBackbone) -> None:
    """The shift is called `flow_shift` in the family's scheduler and `shift` in the Euler scheduler."""
    assert make_scheduler(wan).config.flow_shift == make_scheduler(wan, "flow_euler").config.shift == 3.0
    settings = SamplingSettings("blurry", 4.0, 3, "flow_euler", height=32, width=32, frames=5)
    ours = sample(wan, ["a red mug", "a dog"], seeds=[3, 4], settings=settings)
    pipe = wan.pipeline()
    pipe.scheduler = make_scheduler(wan, "flow_euler")
    torch.testing.assert_close(ours, pipeline_clips(pipe, 5, num_inference_steps=3), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 8}, "the transformer takes 8 channels instead of 4"),
        ({"image_dim": 8, "added_kv_proj_dim": 24}, "only text-to-video models are supported"),
        ({"patch_size": (2, 2, 2)}, r"has patches of \[2, 2, 2\]"),
    ],
)
def test_unsupported_variants_of_wan_are_refused(change: dict[str, Any], message: str) -> None:
    pipe = build_wan()
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    pipe.transformer = type(pipe.transformer)(**{**config, **change})
    with pytest.raises(ValueError, match=message):
        WanBackbone(pipe, "tiny")


def test_a_missing_expert_is_refused() -> None:
    pipe = build_wan()
    pipe.register_to_config(boundary_ratio=0.9)
    with pytest.raises(ValueError, match="has no transformer_2, which its boundary_ratio requires"):
        WanBackbone(pipe, "tiny")
