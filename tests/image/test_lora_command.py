"""`--lora FILE` uses a file from another program as if it were a concept.

The results are compared with those of the concept that the file was exported from.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from shared.concept import read
from shared.io.decode import read_picture


@pytest.fixture(scope="module")
def exported(concepts, tiny_folder, tmp_path_factory):
    """Exports `rex` as diffusers files, like those that other trainers write."""
    from shared.concept import export
    from shared.concept.open_backbone import load_backbone_of

    concept, out = read(concepts["rex"]), tmp_path_factory.mktemp("exported") / "rex-lora"
    export(concept, out, backbone=load_backbone_of(concept, str(tiny_folder)))
    return out


@pytest.fixture
def judged(pcs, photos, dino, tmp_path):
    (tmp_path / "prompts.txt").write_text("a {concept} on the beach\na {concept} in the snow\n")
    more = ("--references", photos, "--dino", dino, "--prompts", tmp_path / "prompts.txt", "--steps", 2)

    def report(name, *options, code=0):
        ran = pcs("image", "evaluate", *options, *more, "--out", tmp_path / name)
        assert ran.code == code, ran.err
        return json.loads((tmp_path / name / "report.json").read_text()) if not code else ran.err

    return report


def test_a_lora_scores_the_same_as_the_concept_it_was_exported_from(judged, concepts, exported, tiny_folder):
    ours = judged("a", "--concept", concepts["rex"], "--backbone", tiny_folder)
    theirs = judged("b", "--lora", exported, "--token", "sks dog", "--backbone", tiny_folder)
    assert theirs["class_noun"] == ours["class_noun"] == "dog"
    for a, b in zip(ours["scores"], theirs["scores"], strict=True):
        assert a["key"] == b["key"] and a["value"] == pytest.approx(b["value"], abs=1e-4)
        assert a["base"] == pytest.approx(b["base"], abs=1e-6)
    assert theirs["costs"]["concept_bytes"] == (exported / "pytorch_lora_weights.safetensors").stat().st_size
    half = judged("c", "--lora", f"{exported}:0.5", "--token", "sks dog", "--backbone", tiny_folder)
    assert [s["value"] for s in half["scores"]] != [s["value"] for s in theirs["scores"]]


def test_a_lora_can_be_prompted_with_or_without_its_name(pcs, concepts, exported, tiny_folder, tmp_path):
    def made(name, prompt, *options):
        more = ("--backbone", tiny_folder, "--steps", 2, "--out", tmp_path / name)
        ran = pcs("image", "generate", prompt, *options, *more)
        assert ran.code == 0, ran.err
        return read_picture(tmp_path / name / "000-seed0.png").pixels

    ours = made("ours", "a photo of a <rex>", "--concept", concepts["rex"])
    named = made("named", "a photo of a <rex-lora>", "--lora", exported, "--token", "sks dog")
    unnamed = made("unnamed", "a photo of a sks dog", "--lora", exported)
    off = made("off", "a photo of a sks dog", "--lora", f"{exported}:0")
    for theirs in (named, unnamed):
        torch.testing.assert_close(theirs, ours, atol=2 / 127.5, rtol=0)
    assert (off - ours).abs().max() > 0.1


def test_a_lora_can_be_imported_as_a_concept(pcs, concepts, exported, tiny_folder, tmp_path):
    out = tmp_path / "buddy.concept"
    command = ("concept", "import", exported, "--token", "sks dog", "--backbone", tiny_folder, "--out", out)
    ran = pcs(*command)
    assert ran.code == 0, ran.err
    assert read(out).name == "buddy" and read(out).meta.class_noun == "dog"
    again = pcs(*command)
    assert again.code == 2 and "already exists" in again.err
    shown = pcs("concept", "show", out)
    assert shown.code == 0 and "subject (dog)" in shown.out


def test_missing_options_are_reported_before_anything_is_loaded(judged, concepts, exported, tmp_path, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("shared.runner.open_runner.load_backbone", loaded)
    both = judged("a", "--lora", exported, "--token", "sks dog", "--concept", concepts["rex"], code=2)
    assert "exactly one --concept or --lora, got 1 --concept and 1 --lora" in both
    assert '--token "sks mug"' in judged("a", "--lora", exported, code=2)
    assert "does not end in a class noun" in judged("a", "--lora", exported, "--token", "sks", code=2)
    assert "2 --token for 1 --lora" in judged("a", "--lora", exported, "--token", "a b", "--token", "c d", code=2)
    assert "nothing does not exist" in judged("a", "--lora", tmp_path / "nothing", "--token", "sks dog", code=2)
    assert "--class-noun applies only to" in judged("a", "--concept", concepts["rex"], "--class-noun", "dog", code=2)


def test_references_are_required_to_evaluate_a_lora(pcs, exported, tmp_path):
    ran = pcs("image", "evaluate", "--lora", exported, "--token", "sks dog", "--out", tmp_path / "r")
    assert ran.code == 2 and "give --references FOLDER with the pictures it was trained on" in ran.err


def test_a_lora_for_another_model_is_refused_with_one_message(judged, tiny_folder, tmp_path):
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    file = tmp_path / "flux.safetensors"
    save_file({f"{name}.lora_A.weight": torch.ones(1, 4), f"{name}.lora_B.weight": torch.ones(4, 1)}, file)
    said = judged("a", "--lora", file, "--token", "sks dog", "--backbone", tiny_folder, code=2)
    assert "was made for another architecture (apparently FLUX" in said and "Traceback" not in said


@pytest.mark.usefixtures("few_true_pictures")
def test_a_lora_exported_on_the_toybox_scores_the_same_as_its_concept(pcs, tmp_path):
    pictures, concept, files = tmp_path / "mug", tmp_path / "my-mug.concept", tmp_path / "files"
    assert pcs("toybox", "subjects", "development-mug", "--num", 2, "--out", pictures).code == 0
    subject = (f"subject.images={pictures}", "subject.class_noun=mug", f"output={concept}", "preview.num=0")
    short = ("train.steps=2", "train.validation.every=0")
    class_pictures = ("sources.class_pictures.num_images=2", "sources.class_pictures.steps=1")
    assert pcs("image", "personalize", "dreambooth_lora", *subject, *short, *class_pictures).code == 0
    assert pcs("concept", "export", concept, "--out", files).code == 0
    scores = {}
    for name, what in {"ours": ("--concept", concept), "theirs": ("--lora", files, "--token", "sks mug")}.items():
        few = ("--references", pictures, "--limit", 1, "--num", 1, "--steps", 1, "--guidance", 3)
        ran = pcs("image", "evaluate", *what, *few, "--out", tmp_path / name)
        assert ran.code == 0, ran.err
        report = json.loads((tmp_path / name / "report.json").read_text())
        scores[name] = {s["key"]: s["value"] for s in report["scores"]}
        assert report["gallery"], "the subject's look-alikes are found"
    assert scores["ours"] == pytest.approx(scores["theirs"], abs=1e-3)
