"""FLUX's defaults depend on distillation, and its two text encoders have different token limits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from shared.backbones.flux import FluxBackbone
from shared.modifiers import LearnableToken, RareToken
from tests.core.runs import sample

#: 40 tokens, which fit into the 48 that T5 reads but not into the 32 that CLIP reads.
LONG = "a photo of a mug on the beach " * 5


@pytest.mark.parametrize(("distilled", "steps"), [(True, 28), (False, 4)], ids=["dev", "schnell"])
def test_the_defaults_match_those_of_the_diffusers_pipeline(make_tiny_flux: Any, distilled: bool, steps: int) -> None:
    pipe = make_tiny_flux(guidance_embeds=distilled)
    backbone = FluxBackbone(pipe, "tiny")
    assert (backbone.default_guidance, backbone.default_steps) == ((3.5, 28) if distilled else (1.0, 4))
    ours = sample(backbone, ["a red mug"], seeds=[3], height=32, width=32)
    options = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(3), "output_type": "pt"}
    theirs = pipe("a red mug", height=32, width=32, max_sequence_length=48, **options).images * 2 - 1
    assert (ours - theirs).abs().max() < 1e-5


def test_truncated_text_causes_one_warning_for_each_text_encoder(
    flux: FluxBackbone, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        flux.check_prompt(LONG)
        flux.encode([LONG])
    assert [r.getMessage() for r in caplog.records] == [
        "prompt truncated to 32 tokens for text_encoder: 'the beach a photo of a mug on the beach' is ignored"
    ], "the warning is given only once"
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        flux.encode([LONG * 2])
    assert [r.getMessage().split(": ")[0] for r in caplog.records] == [
        "prompt truncated to 48 tokens for text_encoder_2",
        "prompt truncated to 32 tokens for text_encoder",
    ]


@pytest.mark.parametrize("modifier", [LearnableToken(vectors=2), RareToken()], ids=["tokens", "words"])
def test_a_concept_name_that_clip_would_truncate_is_an_error(flux: FluxBackbone, modifier: Any) -> None:
    words = modifier.attach(flux, "my-mug", "mug").words
    flux.encode([f"a {words} " + LONG])
    for refuses in (flux.check_prompt, lambda prompt: flux.encode([prompt])):
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"text_encoder of tiny reads 32 tokens and would cut off .*which includes 'my-mug'"
            ):
                refuses(LONG + words)
