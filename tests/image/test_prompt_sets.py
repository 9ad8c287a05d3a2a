"""Prompt sets, both shipped and user-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.config import validate
from shared.evaluation.prompt_sets import PromptSet, load_prompts, prompt_sets


def test_shipped_sets_load_and_have_the_expected_prompts() -> None:
    assert set(prompt_sets()) >= {"toybox", "dreambench", "dreambench_objects", "dreambench_live"}
    for name in prompt_sets():
        prompts = load_prompts(name, "mug")
        assert prompts.drift and all("{concept}" in p.text for p in prompts.prompts)
    toybox = load_prompts("toybox")
    assert sum("background" in p.expects for p in toybox.prompts[:10]) == 10
    assert {k for p in toybox.prompts for k in p.expects} == {"background", "view", "accessory", "style"}
    assert len(load_prompts("dreambench", "mug").prompts) == len(load_prompts("dreambench", "dog").prompts) == 25
    assert load_prompts("dreambench", "dog").name == "dreambench_live"
    assert load_prompts("dreambench", "backpack").prompts[0].text == "a {concept} in the jungle"
    assert load_prompts("dreambench_live").prompts[-1].text == "a cube shaped {concept}"


def test_toybox_prompts_use_only_phrases_from_toybox_captions() -> None:
    from shared.toybox import captions

    texts = {
        "background": captions.PLACES,
        "view": captions.SEEN,
        "accessory": {k: (f"wearing {v}",) for k, v in captions.WORN.items()},
        "style": captions.OPENINGS,
    }
    for p in load_prompts("toybox").prompts:
        for name, value in p.expects.items():
            assert texts[name][value][0] in p.text, f"{p.text}: {value}"
        if "style" not in p.expects:
            assert p.text.startswith(captions.opening("photo"))


def test_prompts_name_the_concept_or_its_class() -> None:
    prompts = validate(
        PromptSet, {"name": "x", "prompts": ["a {concept} beside a {class_noun}"], "drift": ["a {class_noun}"]}
    )
    assert prompts.prompts[0].named("my-owl", "owl") == "a <my-owl> beside an owl"
    assert prompts.prompts[0].plain("owl") == "an owl beside an owl"
    assert prompts.prompts[0].plain("") == "a thing beside a thing"
    assert prompts.first(None) is prompts


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no-such-set", None, r"unknown prompt set 'no-such-set'.*toybox"),
        ("toyboks", None, r"Did you mean 'toybox'"),
        ("gone.yaml", None, r"at that path either"),
        ("empty.txt", "# nothing\n", r"contains no prompts"),
        ("bare.txt", "a photo of a mug\n", r"does not say where the subject goes"),
        ("field.txt", "a {concpt}\n", r"Did you mean '\{concept\}'"),
        ("key.yaml", "prompts: ['a {concept}']\ndrfit: []\n", r"Did you mean 'drift'"),
        ("drift.yaml", "prompts: ['a {concept}']\ndrift: ['a {concept}']\n", r"must not name the concept"),
        ("list.yaml", "- a {concept}\n", r"must contain a mapping"),
        ("none.yaml", "prompts: []\n", r"the list is empty"),
        ("bytes.txt", b"\xff\xfe\x00", r"not UTF-8"),
    ],
)
def test_invalid_prompt_sets_are_refused(tmp_path: Path, name: str, text: str | bytes | None, message: str) -> None:
    path: Path | str = name
    if text is not None:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


def test_users_can_write_prompt_sets_as_text_or_yaml(tmp_path: Path) -> None:
    text = "# my prompts\na {concept} on the moon\n\na red {concept}\n"
    for whole in (text, "\ufeff" + text, "\ufeff" + text.removeprefix("# my prompts\n")):  # also with a byte order mark
        (tmp_path / "mine.txt").write_text(whole, encoding="utf-8")
        assert load_prompts(tmp_path / "mine.txt").prompts[0].text == "a {concept} on the moon"
    assert [p.text for p in load_prompts(tmp_path / "mine.txt").prompts] == [
        "a {concept} on the moon",
        "a red {concept}",
    ]
    (tmp_path / "mine.yaml").write_text(
        "prompts:\n- a {concept}\n- {text: a {concept} at night, expects: {background: night sky}}\n".replace(
            "text: a {concept} at night", "text: 'a {concept} at night'"
        )
    )
    assert load_prompts(tmp_path / "mine.yaml").prompts[1].expects == {"background": "night sky"}
