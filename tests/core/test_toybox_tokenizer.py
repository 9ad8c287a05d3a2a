"""Tests the toybox's tokenizer, alone and with a text model that reads its tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPTokenizer

from shared.pretrain.toybox import models
from shared.toybox import tokenizer as words


def test_each_word_of_the_world_is_one_token_and_other_words_are_split() -> None:
    tokenizer = words.build()
    broken = [word for word in words.world_words() if not words.is_one_token(tokenizer, word)]
    assert not broken
    assert len({tokenizer(word)["input_ids"][1] for word in words.world_words()}) == len(words.world_words())
    odd = tokenizer("qzjxk 7 ü")["input_ids"]
    assert len(odd) > 5 and tokenizer.decode(odd, skip_special_tokens=True) == "qzjxk 7 ü"


def test_captions_fit_the_token_limit_without_splitting_any_word() -> None:
    from shared.toybox import captions

    tokenizer, text = words.build(), captions.example()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.replace(",", " ,").split()) + 2 <= words.MAX_LENGTH
    assert captions.MAX_WORDS + 2 <= words.MAX_LENGTH


def test_a_saved_tokenizer_loads_unchanged_even_from_the_vocabulary_and_merges_alone(tmp_path: Path) -> None:
    first, text = words.build(), "A photo of a zzqx red cat, 3 dogs ü"
    words.save(first, tmp_path)
    assert words.build().get_vocab() == first.get_vocab()
    loaded = CLIPTokenizer.from_pretrained(str(tmp_path))
    assert loaded(text)["input_ids"] == first(text)["input_ids"]
    assert loaded.model_max_length == words.MAX_LENGTH
    (tmp_path / "tokenizer.json").unlink()
    assert CLIPTokenizer.from_pretrained(str(tmp_path))(text)["input_ids"] == first(text)["input_ids"]


def test_added_tokens_are_single_tokens_and_do_not_move_the_pooled_position() -> None:
    tokenizer = words.build(["a", "cat"])
    text = models.build_text(tokenizer, models.TextSize(hidden=16, layers=1, heads=2)).eval()
    assert text.config.eos_token_id == tokenizer.eos_token_id
    before = tokenizer("a cat", return_tensors="pt", padding="max_length")
    old = text(input_ids=before.input_ids).pooler_output
    assert tokenizer.add_tokens(["<mug>"]) == 1
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert torch.equal(old, text(input_ids=before.input_ids).pooler_output)
    ids = tokenizer("a <mug> cat", return_tensors="pt").input_ids
    assert ids.shape == (1, 5) and ids[0, 2] == len(tokenizer) - 1
    out = text(input_ids=ids)
    assert torch.equal(out.pooler_output[0], out.last_hidden_state[0, -1])
