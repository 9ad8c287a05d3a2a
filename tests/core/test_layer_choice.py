"""A part can be restricted to some of a role's layers by projection, by block and by network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shared.config import validate
from shared.trainable import Lora, Peft, Weights
from shared.trainable.layer_choice import block_names, of_blocks, of_projections, parse_ranges

WORDS = [
    *("a.to_q", "a.to_k", "a.to_v", "a.to_out.0", "b.add_q_proj", "b.to_add_out"),
    *("c.q_proj", "c.out_proj", "d.SelfAttention.q", "d.SelfAttention.o", "ff.net.2", "conv_in", "wi_o"),
]


def test_projections_are_recognized_in_every_family() -> None:
    assert of_projections(WORDS, ("q",)) == ["a.to_q", "b.add_q_proj", "c.q_proj", "d.SelfAttention.q"]
    assert of_projections(WORDS, ("out",)) == ["a.to_out.0", "b.to_add_out", "c.out_proj", "d.SelfAttention.o"]
    assert of_projections(WORDS, ("k", "v")) == ["a.to_k", "a.to_v"]


def test_blocks_are_counted_in_the_order_of_the_forward_pass() -> None:
    flux = ["x_embedder", "transformer_blocks.0.attn.to_q", "transformer_blocks.10.ff", "single_transformer_blocks.0.a"]
    assert block_names(flux) == ["transformer_blocks.0", "transformer_blocks.10", "single_transformer_blocks.0"]
    unet = ["conv_in", "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "down_blocks.1.resnets.0.conv1"]
    unet += ["up_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in"]  # the U-Net lists its middle block last
    assert block_names(unet) == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0"]
    assert of_blocks([*flux, "transformer_blocks.1.x"], (0,), ["transformer_blocks.1"]) == ["transformer_blocks.1.x"]
    assert block_names(["encoder.block.3.layer.0.SelfAttention.q", "text_model.encoder.layers.2.mlp.fc1"]) == [
        "encoder.block.3",
        "text_model.encoder.layers.2",
    ]


def test_ranges_are_parsed_and_invalid_ones_are_refused() -> None:
    assert parse_ranges("0-2,7") == (0, 1, 2, 7)
    for text, message in (
        ("9-4", "the range 9-4 runs backwards"),
        ("-4", "is not a list of blocks"),
        ("a", "is not a list of blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            validate(Lora, {"blocks": text})


@pytest.fixture
def backbone(make_tiny_sd: Callable[..., Any]) -> Any:
    from shared.backbones.stable_diffusion import StableDiffusionBackbone

    return StableDiffusionBackbone(make_tiny_sd(), "tiny")


@pytest.mark.parametrize("part", [Lora(projections=("k",)), Peft(type="LOHA", projections=("k",)), Weights(roles=("attention",), projections=("k",))])  # fmt: skip  # noqa: E501
def test_every_part_with_roles_uses_only_the_chosen_layers(backbone: Any, part: Any) -> None:
    part.inject(backbone, "mug", "part", 0)
    (adapter,) = backbone.adapters["mug"]
    keys = list(adapter.state_dict())
    assert keys and all(".to_k" in key for key in keys)


def test_blocks_and_projections_are_intersected(backbone: Any) -> None:
    targets, _ = Lora(blocks="0", projections=("q", "out")).modules(backbone, "lora")
    everywhere, _ = Lora().modules(backbone, "lora")
    expected = [n for n in everywhere["unet"] if n.startswith("down_blocks.0.") and n.endswith((".to_q", ".to_out.0"))]
    assert expected and targets == {"unet": expected}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"roles": ("feed_forward",), "projections": ("q",)},
            r"projections=\['q'\] selects no layers of the role 'feed_",
        ),
        ({"blocks": "0-99"}, r"trainable\.lora\.blocks = '0-99': there is no block 99; unet has \d+ blocks, counted"),
        ({"networks": ("unnet",)}, r"trainable\.lora\.networks: unknown network 'unnet'. Did you mean 'unet'"),
        (
            {"networks": ("text_encoder",)},
            r"networks=\['text_encoder'\] selects no layers of the role 'cross_attention'",
        ),
    ],
)
def test_an_empty_or_invalid_choice_is_refused(backbone: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**settings).inject(backbone, "mug", "lora", 0)
    assert not backbone.adapters
