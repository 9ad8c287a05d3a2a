"""Compares added tokens with embedding tables resized by transformers itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.backbones.added_tokens import END, same_embeddings
from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from tests.core.placeholders import FixedPlaceholder, fixed


def resized(model: Any, tokenizer: Any, tokens: tuple[str, ...], rows: Tensor) -> tuple[Any, Any]:
    """Adds tokens the usual way, by extending the tokenizer and the model's embedding table."""
    model, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    tokenizer.add_tokens(list(tokens))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for token, row in zip(tokens, rows, strict=True):
        model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(token)] = row
    return model, tokenizer


TOKENS = ("<my-mug>", "<my-mug>_1", "<my-mug>_2")
PROMPTS = ["a photo of a <my-mug> <my-mug>_1 <my-mug>_2 mug on the beach", "a dog"]


def test_the_overlay_matches_a_clip_with_a_resized_table(tiny_sd: Any) -> None:
    rows = fixed(3)
    model, tokenizer = resized(tiny_sd.text_encoder, tiny_sd.tokenizer, TOKENS, rows["text_encoder"])
    text = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    expected = model(text.input_ids)[0]
    backbone = StableDiffusionBackbone(tiny_sd)
    backbone.add_placeholder(FixedPlaceholder("my-mug", TOKENS, lambda c, t, s: rows[c]))
    got = backbone.encode(PROMPTS)
    assert torch.allclose(got.context, expected, atol=1e-5)
    assert got.token_positions["my-mug"].sum(1).tolist() == [3, 0]
    assert got.token_positions["my-mug"][0].nonzero().flatten().tolist() == [5, 6, 7]


@pytest.mark.parametrize("legacy_eos", [False, True])
def test_the_overlay_matches_flux_encoders_with_resized_tables(tiny_flux: Any, legacy_eos: bool) -> None:
    rows = fixed(3)
    t5, tokenizer_2 = resized(tiny_flux.text_encoder_2, tiny_flux.tokenizer_2, TOKENS, rows["text_encoder_2"])
    text = tokenizer_2(PROMPTS, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
    context = t5(text.input_ids)[0]
    clip, tokenizer = resized(tiny_flux.text_encoder, tiny_flux.tokenizer, TOKENS, rows["text_encoder"])
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=32, return_tensors="pt").input_ids
    pooled = clip(ids).pooler_output
    if (
        legacy_eos
    ):  # with this value, found in OpenAI's configuration, CLIP pools at the largest id: that of an added token
        tiny_flux.text_encoder.eos_token_id = 2
    backbone = FluxBackbone(tiny_flux)
    backbone.add_placeholder(FixedPlaceholder("my-mug", TOKENS, lambda c, t, s: rows[c]))
    got = backbone.encode(PROMPTS)
    assert torch.allclose(got.context, context, atol=1e-5)
    assert torch.allclose(got.pooled, pooled, atol=1e-5)
    assert got.token_positions["my-mug"].shape == (2, 48)


def test_gradients_reach_the_rows_and_nothing_else(sd: StableDiffusionBackbone) -> None:
    row = nn.Parameter(torch.randn(1, 16))
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: row))
    before = copy.deepcopy(sd.components["text_encoder"].state_dict())
    prediction = sd.predict(torch.randn(1, 4, 8, 8), torch.tensor(10), sd.encode(["a photo of <x>"]))
    prediction.square().mean().backward()
    assert row.grad is not None and row.grad.abs().sum() > 0
    assert all(p.grad is None for m in sd.components.values() for p in m.parameters())
    assert all(torch.equal(v, before[k]) for k, v in sd.components["text_encoder"].state_dict().items())


def test_rows_can_differ_between_the_prompts_of_a_batch(sd: StableDiffusionBackbone) -> None:
    rows = torch.randn(2, 1, 16)
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows))
    both = sd.encode(["a <x>", "a <x>"]).context
    sd.remove("x")
    for i in range(2):
        sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s, i=i: rows[i]))
        assert torch.allclose(sd.encode(["a <x>"]).context[0], both[i], atol=1e-6)
        sd.remove("x")


def test_removal_restores_the_tokenizer_the_repr_and_the_outputs(sd: StableDiffusionBackbone) -> None:
    prompts = ["a photo of a <my-mug> mug"]
    tokenizer, text = sd.tokens.current["text_encoder"], repr(sd.components["text_encoder"])
    vocabulary, before = len(tokenizer), sd.encode(prompts).context
    rows = fixed(3)
    sd.add_placeholder(FixedPlaceholder("my-mug", TOKENS, lambda c, t, s: rows[c]))
    sd.add_placeholder(FixedPlaceholder("b", ("<b>",), lambda c, t, s: rows[c][:1]))
    changed = sd.encode(prompts).context
    assert not torch.equal(changed, before)
    sd.remove("b")
    assert torch.equal(sd.encode(prompts).context, changed)  # the other concept's token keeps its row
    sd.remove("my-mug")
    assert sd.tokens.current["text_encoder"] is tokenizer and len(tokenizer) == vocabulary
    assert repr(sd.components["text_encoder"]) == text
    assert torch.equal(sd.encode(prompts).context, before)


def test_tokens_are_matched_exactly(sd: StableDiffusionBackbone) -> None:
    rows = fixed(3)
    sd.add_placeholder(FixedPlaceholder("a", ("<My-Mug>", "<my-mug>", "<my-mug>_1"), lambda c, t, s: rows[c]))
    ids = sd.tokens.tokenize("text_encoder", ["<My-Mug> <my-mug>_1, <my-mug>"], torch.device("cpu")).ids[0].tolist()
    expected = sd.tokens.ids_of("text_encoder", ["<My-Mug>", "<my-mug>_1", "<my-mug>"])
    assert [i for i in ids if i in expected] == expected


REFUSED = [
    (("mug</w>",), "already in the vocabulary"),
    (("<a b>",), "whitespace"),
    (("<x>", "<x>"), "twice"),
    (("<taken>",), "already"),
]


@pytest.mark.parametrize(("tokens", "message"), REFUSED)
def test_tokens_that_cannot_be_added_are_refused(
    sd: StableDiffusionBackbone, tokens: tuple[str, ...], message: str
) -> None:
    sd.add_placeholder(FixedPlaceholder("taken", ("<taken>",), lambda c, t, s: torch.zeros(1, 16)))
    with pytest.raises(ValueError, match=message):
        sd.add_placeholder(FixedPlaceholder("new", tokens))
    assert "new" not in sd.placeholders
    with pytest.raises(ValueError, match="already attached"):
        sd.add_placeholder(FixedPlaceholder("taken", ()))


def test_positions_of_plain_words_are_found(sd: StableDiffusionBackbone) -> None:
    sd.add_placeholder(FixedPlaceholder("m", (), words="sks mug"))
    got = sd.encode(["a sks mug and a sks mug", "a sks dog and a mug", "sks mug"])
    assert got.token_positions["m"].sum(1).tolist() == [4, 0, 2]
    assert got.token_positions["m"][0].nonzero().flatten().tolist() == [2, 3, 6, 7]
    assert sd.encode(["a dog"]).token_positions == {}


def test_rows_of_the_wrong_shape_are_refused(sd: StableDiffusionBackbone) -> None:
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: torch.zeros(2, 16)))
    with pytest.raises(ValueError, match=r"text_encoder vectors must be \[1, 16\]"):
        sd.encode(["<x>"])


def test_the_error_for_an_overlong_prompt_names_the_text_that_would_be_cut(
    sd: StableDiffusionBackbone, flux: FluxBackbone
) -> None:
    long = "a photo of a mug " * 5 + "a mug on the snow and the beach with a dog"
    sd.check_prompt("a photo of a mug")
    with pytest.raises(ValueError, match="reads 32 tokens and would cut off 'and the beach with a dog'"):
        sd.check_prompt(long)
    flux.check_prompt(long)  # FLUX takes its context from T5, which reads 48 tokens
    with pytest.raises(ValueError, match="reads 48 tokens"):
        flux.check_prompt(long * 2)


def test_same_embeddings_compares_memory_if_rows_are_trained_and_values_otherwise() -> None:
    a, b = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(1, 2))
    assert same_embeddings([a], [a]) and not same_embeddings([a], [b])
    table = nn.Parameter(torch.ones(2, 1, 2))
    assert same_embeddings([table[0]], [table[0]]) and not same_embeddings([table[0]], [table[1]])
    assert same_embeddings([a.detach()], [b.detach()]) and not same_embeddings([a], [a.detach()])


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_every_occurrence_of_a_whole_word_is_found(family: str, request: pytest.FixtureRequest) -> None:
    backbone, two = request.getfixturevalue(family), lambda c, t, s: fixed(2)[c]
    backbone.add_placeholder(FixedPlaceholder("x", ("<x>", "<x>_1"), two, words="<x> <x>_1 mug"))
    backbone.add_placeholder(FixedPlaceholder("a-mug", ("<a-mug>",), lambda c, t, s: fixed(1)[c]))
    tokenizer = backbone.tokens.current[backbone.context_component]
    prompts = ("a photo of <x> <x>_1 mug, a Mug and a <a-mug> teapot", "xzq zqx  zq  mug", "a dog")
    ids = backbone.tokens.tokenize(backbone.context_component, prompts, torch.device("cpu")).ids

    def words_at(words: str) -> list[list[str]]:
        positions = backbone.word_positions(prompts, words)
        assert (
            positions.shape == ids.shape == backbone.encode(prompts).context.shape[:2] and positions.dtype == torch.bool
        )
        read = [tokenizer.convert_ids_to_tokens(row[at].tolist()) for row, at in zip(ids, positions, strict=True)]
        return [[t.replace("</w>", "").replace("▁", "") for t in tokens] for tokens in read]

    assert [[t.lower() for t in row if t] for row in words_at("mug")] == [
        ["mug", "mug"] if family == "sd" else ["mug", "m", "u", "g"],  # this T5's vocabulary has no capital letters
        ["mug"],
        [],
    ]
    assert words_at("<x>") == [["<x>"], [], []] and words_at("<x>_1  mug") == [["<x>_1", "mug"], [], []]
    assert words_at("<x> <x>_1 mug")[0] == ["<x>", "<x>_1", "mug"]
    assert torch.equal(backbone.word_positions(prompts, "<a-mug>"), backbone.encode(prompts).token_positions["a-mug"])
    assert [[t for t in row if t] for row in words_at("zq")] == [[], ["z", "q"], []] and words_at("cat") == [[], [], []]
    ends = words_at(END)
    assert ends == [[tokenizer.eos_token.replace("</w>", "")]] * 3
    at = backbone.word_positions(prompts, END).int().argmax(1)
    assert at.tolist() == [int((row != tokenizer.pad_token_id).sum()) - (family == "flux") for row in ids]
    for nothing in ("", "  "):
        with pytest.raises(ValueError, match="words must not be empty"):
            backbone.word_positions(prompts, nothing)


def test_truncated_words_are_not_found(sd: StableDiffusionBackbone) -> None:
    prompts = ["dog " * 29 + "mug", "dog " * 30 + "mug"]  # 30 tokens fit between the two special tokens
    positions = sd.word_positions(prompts, "mug").nonzero().tolist()
    assert positions == [[0, 30]]
