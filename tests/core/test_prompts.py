"""Tests how a user's prompt or a picture's caption becomes the text that the encoder reads."""

from __future__ import annotations

import re
import warnings
from collections import Counter

import pytest
import torch

from shared.modifiers.base import PlaceholderBase
from shared.prompts import Templates, check_named, expand, names_in, without
from shared.prompts.templates import SETS
from shared.types import Example

PLACEHOLDERS = {"my-mug": PlaceholderBase("my-mug", "<my-mug> <my-mug>_1 mug"), "spin": PlaceholderBase("spin", "")}


def example(caption: str = "", role="instance", owner: str = "my-mug") -> Example:
    return Example(torch.zeros(3, 2, 2), caption, (owner,), role, user_caption=bool(caption))


def captioned(part: Templates, before: Example, seed: int = 0, words: str = "sks mug", noun: str = "mug") -> str:
    names = {before.owner: words}, {before.owner: noun}
    return part(before, torch.Generator().manual_seed(seed), *names).caption


# --- prompts ---------------------------------------------------------------------------------


def test_each_name_in_a_prompt_is_returned_once_and_in_order():
    assert names_in("<b> and <my-mug> and <b>, 1 < 2 > 0, <lora:x:1>, < a >, <3>") == ("b", "my-mug", "3")


def test_a_name_is_replaced_by_its_words_or_removed_if_it_has_no_words():
    assert expand("a <my-mug> <spin> on  the beach", PLACEHOLDERS) == "a <my-mug> <my-mug>_1 mug on the beach"
    assert expand("two <my-mug>s", PLACEHOLDERS) == "two <my-mug> <my-mug>_1 mugs"
    assert expand("no name", {}) == "no name"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (
            "a <lora:my-mug:0.8> mug",
            "load it with --concept my-mug.concept:0.8 (or --lora FILE:0.8), and write <my-mug>",
        ),
        ("a <lyco:cat> mug", "load it with --concept cat.concept (or --lora FILE), and write <cat> in the prompt"),
        ("a (<my-mug>:1.4)", "words have no weights here, but a concept has a strength (--concept PATH:0.8)"),
        ("a [mug:dog:0.5]", "words cannot change between steps"),
        ("a [mug|dog]", "words cannot change between steps"),
        ("a {red|blue} mug", "write out each prompt"),
        ("embedding:My-Mug on a beach", "write <my-mug>"),
        (
            "a <My Mug>",
            "is not a concept's name and is read as plain words; write <my-mug> (loaded concepts: <my-mug>",
        ),
        ("a <My-Mug:0.5>", "set the strength with the option --concept my-mug.concept:0.5, and write <my-mug> in the"),
        ("a <cat:1,2>", "set the strength with the option --concept cat.concept:1.2, and write <cat> in the prompt"),
        ("a <loha:Émile:1>", "load it with --concept Emile.concept:1 (or --lora FILE:1), and write <Emile> in the"),
        ("a <lora:猫:1>", "load it with --concept NAME.concept:1 (or --lora FILE:1)"),
        ("a <émile>", "is read as plain words; leave the brackets out (loaded concepts: <my-mug>, <spin>)"),
        ("a <red hat>", "is read as plain words; leave the brackets out"),
        ("a ((cat))", "'((cat))' is read as plain words; words have no weights here"),
        ("a [cat]", "'[cat]' is read as plain words; words have no weights here"),
        ("a [my-mug]", "'[my-mug]' is read as plain words; write <my-mug>"),
        ("a (cat)++ here", "'(cat)++' is read as plain words; words have no weights here"),
        ("a (cat)1.3", "'(cat)1.3' is read as plain words; words have no weights here"),
        ("a cat+++, a dog", "'cat+++' is read as plain words; words have no weights here"),
        ("a cat::2 dog", "'cat::2' is read as plain words; words have no weights here"),
        ("a ((cat:1,4))", "'((cat:1,4))' is read as plain words; words have no weights here"),
        ("(Windows 95:1.3)", "'(Windows 95:1.3)' is read as plain words; words have no weights here"),
        (r"a cat \(animal\)", "write brackets without backslashes"),
        (
            "a cat AND a dog AND a cow",
            "'AND' is read as plain words; a prompt is a single text here, so write one sentence",
        ),
        ("a cat, BREAK a dog", "'BREAK' is read as plain words; a prompt is a single text here"),
        ('("a", "b").blend(1, 2)', "'.blend(' is read as plain words; a prompt is a single text here"),
        ("a cat --ar 16:9", "'--ar 16:9' is read as plain words; options such as --width, --seed and"),
        ("a cat<|endoftext|> on a beach", "'<|endoftext|>' is not text but a control token of the text encoder; leave"),
    ],
)
def test_the_warning_about_foreign_prompt_syntax_says_what_to_do_instead(prompt, said):
    with pytest.warns(UserWarning, match=re.escape(said)) as caught:
        expand(prompt, PLACEHOLDERS)
    assert len(caught) == 1


def test_plain_words_are_not_mistaken_for_foreign_prompt_syntax():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in (
            " (front), 1 < 2 > 0, 16:9, at 10:30, a snake_case_word, {concept}",
            " (ratio 4:3) (at 10:30), (a mug (red)), [1], a C++ book, 18+ -- and (semi)-transparent",
            " on a sign: ROCK AND ROLL, COFFEE BREAK; Hand, and a break",
        ):
            assert expand(f"a <my-mug>{text}", PLACEHOLDERS) == expand("a <my-mug>", PLACEHOLDERS) + text
        expand("A CAT AND A DOG", {})


def test_the_error_for_an_unknown_name_lists_the_loaded_concepts():
    with pytest.raises(ValueError, match="names <mug>, which is not loaded; loaded concepts: <my-mug>, <spin>"):
        expand("a <mug>", PLACEHOLDERS)
    with pytest.raises(ValueError, match="loaded concepts: none"):
        expand("a <mug>", {})


def test_the_prompt_for_the_base_model_names_the_class():
    assert without("a <my-mug> <spin> on the beach", {"my-mug": "mug", "spin": ""}) == "a mug on the beach"
    assert without("a <other>", {"my-mug": "mug"}) == "a <other>"


def test_a_loaded_subject_must_be_named_but_a_style_need_not():
    kinds = {"my-mug": "subject", "me": "identity", "ink": "style", "spin": "motion"}
    check_named("<me> with <my-mug>", kinds)
    with pytest.raises(
        ValueError, match="'my-mug' is loaded, but the prompt 'a <me>' does not name it; write <my-mug>"
    ):
        check_named("a <me>", kinds)
    with pytest.raises(ValueError, match="'me' is loaded"):
        check_named("a <my-mug>", kinds)


# --- captions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a <my-mug> by the sea", "a sks mug by the sea"),
        ("{concept} by the sea", "sks mug by the sea"),
        ("a red mug by the sea", "a red sks mug by the sea"),
        ("a mug beside a mug", "a sks mug beside a mug"),
        ("mugs by the sea", "sks mug, mugs by the sea"),
        ("by the sea", "sks mug, by the sea"),
        ("the {class_noun} <my-mug>", "the mug sks mug"),
    ],
)
def test_the_concept_is_inserted_into_a_user_caption(caption, expected):
    assert captioned(Templates(set="subject"), example(caption)) == expected


def test_a_concept_without_a_class_noun_is_put_in_front_of_the_caption():
    assert captioned(Templates(), example("by the sea"), words="sks", noun="") == "sks, by the sea"


def test_user_captions_can_be_ignored_but_captions_of_class_pictures_cannot():
    part = Templates(user_captions=False)
    assert captioned(part, example("a mug by the sea")) == "a photo of a sks mug"
    assert captioned(part, example("a photo of a mug", "prior")) == "a photo of a mug"


def test_all_templates_are_drawn_about_equally_often():
    part = Templates(set="subject")
    drawn = Counter(captioned(part, example(), seed) for seed in range(300))
    assert set(drawn) == {t.replace("{concept}", "sks mug") for t in SETS["subject"]}
    assert captioned(part, example(), 5) == captioned(part, example(), 5)
    assert max(drawn.values()) < 300 / len(SETS["subject"]) * 2


def test_user_templates_replace_the_set():
    part = Templates(set="subject", templates=("{concept}, {class_noun}",))
    assert captioned(part, example()) == "sks mug, mug"
    with pytest.raises(ValueError, match=r"'a photo' has no \{concept\}"):
        Templates(templates=("a photo",))


@pytest.mark.parametrize("name", sorted(SETS))
def test_every_shipped_template_contains_the_placeholder_exactly_once(name):
    assert all(t.count("{concept}") == 1 for t in SETS[name])
    assert len(set(SETS[name])) == len(SETS[name])


def test_captions_are_dropped_at_the_given_rate():
    part = Templates(drop=0.3)
    dropped = sum(captioned(part, example("a mug"), seed) == "" for seed in range(500)) / 500
    assert abs(dropped - 0.3) < 0.07
    assert captioned(Templates(drop=1.0), example("a mug")) == ""


def test_class_pictures_keep_their_captions_or_are_captioned_with_their_class():
    drop = Templates(drop=1.0, set="plain")
    assert captioned(drop, example("a photo of a {class_noun}", "prior")) == "a photo of a mug"
    assert captioned(drop, example("a mug on a table", "prior")) == "a mug on a table"
    assert captioned(drop, example("", "prior")) == "a photo of a mug"
    assert captioned(Templates(set="subject"), example("", "prior"), 4).count("mug") == 1


def test_the_original_example_and_its_pixels_are_not_changed():
    before = example("a mug")
    made = Templates()(before, torch.Generator().manual_seed(0), {before.owner: "sks mug"}, {before.owner: "mug"})
    assert made.pixels is before.pixels and made.owner == before.owner and before.caption == "a mug"
