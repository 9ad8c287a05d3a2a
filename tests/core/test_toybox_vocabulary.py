"""Tests how the tokenizer shipped with the toybox reads the words of the public DreamBench prompts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from transformers import CLIPTokenizer

from shared.pretrain.toybox.motion_words import motion_words
from shared.toybox import captions, tokenizer
from shared.toybox.weights import backbone_path

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts"
# Words for things that the toybox can neither show nor describe: professions, a landmark, a crowd, a monocle.
NEVER_SHOWN = {"chef", "crowded", "eiffel", "firefighter", "monocle", "police", "tower", "wizard"}
# Phrases for the places and accessories that the toybox can show literally.
SHOWN = {
    "dreambench_objects": (
        *("in the jungle", "in the snow", "on the beach", "on top of a wooden floor", "floating on top of water"),
        *("with a city in the background", "with a mountain in the background"),
    ),
    "dreambench_live": (
        *("in the jungle", "in the snow", "on the beach", "on top of a wooden floor"),
        *("with a city in the background", "with a mountain in the background"),
        *("wearing a red hat", "wearing a rainbow scarf", "wearing pink glasses"),
    ),
}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.replace("{concept}", "").lower())


def texts(name: str) -> list[str]:
    return yaml.safe_load((PROMPTS / f"{name}.yaml").read_text(encoding="utf-8"))["prompts"]


@pytest.fixture(scope="module")
def shipped() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(str(backbone_path() / "tokenizer"))


def test_the_shipped_tokenizer_equals_a_newly_built_one_plus_motion_words(shipped: CLIPTokenizer) -> None:
    built, found = tokenizer.build().get_vocab(), shipped.get_vocab()
    added = sorted(found.keys() - built.keys(), key=found.__getitem__)
    assert added and set(added) <= set(motion_words())
    assert found == built | {word: len(built) + i for i, word in enumerate(added)}


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_each_dreambench_word_that_the_toybox_can_show_is_one_token(shipped: CLIPTokenizer, name: str) -> None:
    every = {word for text in texts(name) for word in words(text)}
    split = {word for word in every if not tokenizer.is_one_token(shipped, word)}
    assert split <= NEVER_SHOWN, "every other word is in the vocabulary"
    assert not NEVER_SHOWN & set(captions.vocabulary())
    assert all(
        len(shipped(t.replace("{concept}", "sks duck"))["input_ids"]) <= tokenizer.MAX_LENGTH for t in texts(name)
    )


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_toybox_captions_use_the_dreambench_phrases(name: str) -> None:
    phrases = {p for options in captions.PLACES.values() for p in options} | {
        f"wearing {worn}" for worn in captions.WORN.values()
    }
    for phrase in SHOWN[name]:
        assert f"a {{concept}} {phrase}" in texts(name), phrase
        assert phrase in phrases, phrase
    assert {f"a {color} {{concept}}" for color in ("red", "purple")} <= set(texts(name))
