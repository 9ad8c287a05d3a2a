"""A concept can be named with plain words, a rare token, or learned tokens."""

from __future__ import annotations

import warnings

import pytest
import torch

from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.concept import Provenance, attach, capture
from shared.modifiers import LearnableToken, PlainText, RareToken
from shared.prompts import expand
from shared.trainable import Tokens


@pytest.fixture
def sd(make_tiny_sd):
    return StableDiffusionBackbone(make_tiny_sd(), "tiny")


def table(backbone, component="text_encoder"):
    return backbone.components[component].get_input_embeddings().weight


def expanded(backbone, prompt="a photo of a <mug>"):
    return expand(prompt, backbone.placeholders)


# --- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (PlainText(), "mug"),
        (PlainText(words="red"), "red mug"),
        (PlainText(words="red", with_class_noun=False), "red"),
        (PlainText(with_class_noun=False), ""),
        (RareToken(), "sks mug"),
        (RareToken(token="ohwx"), "ohwx mug"),
        (RareToken(with_class_noun=False), "sks"),
    ],
)
def test_words_from_the_vocabulary_add_nothing_to_learn(sd, part, words):
    placeholder = part.attach(sd, "mug", "mug")
    assert placeholder.words == words and expanded(sd) == f"a photo of a {words}".strip()
    assert placeholder.tokens == () and not list(placeholder.parameters()) and placeholder.state_dict() == {}
    placeholder.load_state_dict({})
    with pytest.raises(ValueError, match="'mug' has no learned words, but was given 1 tensor for them"):
        placeholder.load_state_dict({"text_encoder": torch.zeros(1, 16)})
    assert len(table(sd)) == len(sd.tokens.base["text_encoder"]), "no row was added"


def test_a_token_that_splits_into_several_pieces_is_accepted_with_one_warning_that_lists_them(sd, make_tiny_flux):
    with pytest.warns(UserWarning) as caught:
        placeholder = RareToken(token="qzw").attach(sd, "mug", "mug")
    assert [str(w.message).split(":")[0] for w in caught] == [
        "modifier.token='qzw' is not a single token here (text_encoder"
    ]
    assert "'q' + 'z' + 'w'" in str(caught[0].message)
    assert placeholder.words == "qzw mug" and int(sd.encode([expanded(sd)]).token_positions["mug"].sum()) == 4
    flux = FluxBackbone(make_tiny_flux(), "tiny")
    with pytest.warns(UserWarning) as caught:
        RareToken(token="qzw").attach(flux, "mug", "mug")
    assert len(caught) == 1 and "text_encoder_2: 'q' + 'z' + 'w'" in str(caught[0].message)


def test_single_tokens_and_loaded_concepts_cause_no_warning(sd, make_tiny_flux):
    with pytest.warns(UserWarning):
        RareToken(token="qzw").attach(sd, "cup", "mug")
    concept = capture(sd, "cup", Provenance(class_noun="mug", modifier=RareToken(token="qzw")))
    sd.remove("cup")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(concept, sd)
        RareToken().attach(sd, "mug", "mug")
        RareToken().attach(FluxBackbone(make_tiny_flux(), "tiny"), "mug", "mug")


def test_a_missing_class_noun_leaves_no_stray_space(sd):
    assert RareToken().attach(sd, "a", "").words == "sks"
    assert PlainText().attach(sd, "b", "").words == ""
    assert expand("a photo of <b> on the beach", sd.placeholders) == "a photo of on the beach"


# --- learned tokens --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "noun", "words"),
    [
        (1, False, "<mug>"),
        (1, True, "<mug> mug"),
        (3, True, "<mug> <mug>_1 <mug>_2 mug"),
    ],
)
def test_a_name_becomes_one_token_per_vector(sd, vectors, noun, words):
    placeholder = LearnableToken(vectors=vectors, with_class_noun=noun).attach(sd, "mug", "mug")
    assert expanded(sd) == f"a photo of a {words}"
    assert len(placeholder.tokens) == vectors
    ids = sd.tokens.current["text_encoder"](placeholder.words, add_special_tokens=False)["input_ids"]
    assert len(ids) == vectors + noun, "each word is one token"
    assert [p.shape for p in placeholder.parameters()] == [(vectors, 16)]
    conditioning = sd.encode([expanded(sd)])
    assert int(conditioning.token_positions["mug"].sum()) == vectors


def test_rows_start_from_the_words_in_init_or_from_the_class_noun(sd):
    rows = table(sd)
    word = {w: rows[sd.tokens.word_ids("text_encoder", w)[0]] for w in ("mug", "red", "dog")}
    one = LearnableToken().attach(sd, "a", "mug").state_dict()["text_encoder"]
    two = LearnableToken(vectors=2, init="red dog").attach(sd, "b", "mug").state_dict()["text_encoder"]
    cut = LearnableToken(init="dog red mug").attach(sd, "c", "").state_dict()["text_encoder"]
    assert torch.equal(one, word["mug"][None])
    assert torch.equal(two, torch.stack([word["red"], word["dog"]]))
    mean = torch.stack([word["dog"], word["red"], word["mug"]]).mean(0, keepdim=True)
    assert torch.equal(cut, mean), "a single vector for several words starts as their mean"
    few = LearnableToken(vectors=2, init="dog red mug").attach(sd, "d", "").state_dict()["text_encoder"]
    assert torch.equal(few, torch.stack([(word["dog"] + word["red"]) / 2, word["mug"]])), (
        "each vector starts as the mean of its share of the words"
    )


def test_a_token_for_a_class_noun_of_several_pieces_starts_as_their_mean(sd):
    pieces = sd.word_embeddings("text_encoder", "coffee mug")
    assert len(pieces) > 2
    rows = LearnableToken().attach(sd, "a", "coffee mug").state_dict()["text_encoder"]
    assert torch.equal(rows, pieces.mean(0, keepdim=True))


def test_a_token_that_starts_from_one_word_is_encoded_like_that_word(sd):
    LearnableToken().attach(sd, "a", "mug")
    same = sd.encode([expanded(sd, "a photo of a <a>")]).context
    assert torch.equal(same, sd.encode(["a photo of a mug"]).context)


def test_additional_vectors_start_near_the_words_and_differ_from_each_other(sd):
    rows = LearnableToken(vectors=4, init="red dog").attach(sd, "a", "").state_dict()["text_encoder"]
    words = sd.word_embeddings("text_encoder", "red dog")
    assert torch.equal(rows[:2], words)
    for far, near in ((rows[2], words[0]), (rows[3], words[1])):
        assert 0 < (far - near).norm() < 0.5 * words.std() * far.numel() ** 0.5


def test_a_random_start_has_the_same_spread_as_the_table_and_depends_on_the_seed(sd):
    part = LearnableToken(vectors=64, init="<rand>")
    first = part.attach(sd, "a", "", seed=3).state_dict()["text_encoder"]
    again = part.attach(sd, "b", "", seed=3).state_dict()["text_encoder"]
    other = part.attach(sd, "c", "", seed=4).state_dict()["text_encoder"]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert abs(float(first.std() / table(sd).std()) - 1) < 0.15


def test_the_spread_of_a_random_start_is_not_taken_from_one_word(sd):
    with torch.no_grad():
        table(sd)[sd.tokens.word_ids("text_encoder", "a")[0]] *= 20
    first = LearnableToken(vectors=64, init="<rand>").attach(sd, "a", "", seed=3).state_dict()["text_encoder"]
    assert abs(float(first.std() / table(sd).std()) - 1) < 0.15


def test_a_token_without_a_word_to_start_from_is_an_error(sd):
    with pytest.raises(ValueError, match=r"set subject\.class_noun or modifier\.init"):
        LearnableToken().attach(sd, "a", "")
    assert not sd.placeholders


def test_a_name_that_is_already_taken_is_an_error_and_nothing_changes(sd):
    LearnableToken().attach(sd, "a", "mug")
    with pytest.raises(ValueError, match="'a' is already attached"):
        LearnableToken().attach(sd, "a", "mug")
    with pytest.raises(ValueError, match="'a' is already attached"):
        RareToken().attach(sd, "a", "mug")
    assert list(sd.placeholders) == ["a"] and sd.tokens.tokens == ("<a>",)


def test_training_leaves_all_other_rows_unchanged_bit_for_bit(sd):
    before, size = table(sd).detach().clone(), len(table(sd))
    tokenizer = sd.tokens.base["text_encoder"]
    placeholder = LearnableToken(vectors=2).attach(sd, "mug", "mug")
    group = Tokens(lr=0.1).inject(sd, "mug", "tokens", seed=0)
    start = placeholder.state_dict()["text_encoder"]
    optimizer = torch.optim.AdamW(group.parameters, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        sd.encode([expanded(sd)]).context.square().mean().backward()
        optimizer.step()
    assert torch.equal(table(sd), before) and len(table(sd)) == size and table(sd).grad is None
    moved = placeholder.state_dict()["text_encoder"]
    assert all(not torch.equal(a, b) for a, b in zip(moved, start, strict=True))
    sd.remove("mug")
    assert torch.equal(table(sd), before) and sd.tokens.current["text_encoder"] is tokenizer
    assert "<mug>" not in tokenizer.get_vocab()


def test_the_state_survives_a_round_trip(sd):
    one = LearnableToken(vectors=2, init="<rand>").attach(sd, "a", "", seed=1)
    two = LearnableToken(vectors=2, init="<rand>").attach(sd, "b", "", seed=2)
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.state_dict()["text_encoder"], one.state_dict()["text_encoder"])
    with pytest.raises(ValueError, match=r"are \[1, 16\], but this model needs \[2, 16\]"):
        two.load_state_dict({"text_encoder": torch.zeros(1, 16)})
    with pytest.raises(ValueError, match="but this model needs text_encoder"):
        two.load_state_dict({"text_encoder_2": torch.zeros(2, 16)})


def test_each_of_two_text_encoders_has_its_own_rows(make_tiny_flux):
    flux = FluxBackbone(make_tiny_flux(), "tiny")
    placeholder = LearnableToken(vectors=2, with_class_noun=True).attach(flux, "mug", "mug")
    shapes = {c: tuple(v.shape) for c, v in placeholder.state_dict().items()}
    assert shapes == {"text_encoder": (2, 16), "text_encoder_2": (2, 24)}
    plain = flux.encode(["a photo of a mug"])
    with torch.no_grad():
        for p in placeholder.parameters():
            p.add_(1.0)
    named = flux.encode([expanded(flux)])
    assert not torch.equal(named.pooled, plain.pooled) and not torch.equal(named.context, plain.context)
