"""`pcs image evaluate`, from a concept folder to the report, with a tiny DINO model and user-supplied references."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch

from pcs_image.runner import ImageRunner
from shared.backbones import load_backbone
from shared.concept import read
from shared.io.read_subject import read_subject
from shared.recipe.resolve import load
from shared.runner.base import Runner
from shared.runner.judging import EvaluationSettings


@pytest.fixture
def arguments(concepts, photos, dino, painted, tmp_path) -> list:
    for i in range(3):
        painted(tmp_path / "gallery" / f"other-{i}", seed=10 + i)
    (tmp_path / "prompts.txt").write_text("a {concept} on the beach\n# not this\na {concept} in the snow\n")
    options = ("--references", photos, "--dino", dino, "--gallery", tmp_path / "gallery")
    return [
        "image",
        "evaluate",
        "--concept",
        concepts["mug"],
        *options,
        "--prompts",
        tmp_path / "prompts.txt",
        "--num",
        2,
    ]


def test_a_concept_is_evaluated(pcs, arguments, tiny_folder, tmp_path):
    ran = pcs(*arguments, "--out", tmp_path / "report")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == str(tmp_path / "report" / "index.html")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {"index.html", "report.json"} <= {p.name for p in (tmp_path / "report").iterdir()}
    made = [p for p in report["pictures"] if p["kind"] == "concept"]
    assert len(made) == 4 and all((tmp_path / "report" / p["file"]).is_file() for p in made)
    identity = next(s for s in report["scores"] if s["key"] == "identity")
    assert identity["chance"] == 0.25 and report["costs"]["training_seconds"] > 0
    texts = [
        p.read_text(encoding="utf-8") for p in (tmp_path / "report").iterdir() if p.suffix != ".png" and p.is_file()
    ]
    assert len(texts) > 3 and not any(str(tiny_folder.parents[1]) in text for text in texts), (
        "reports must not contain local paths"
    )


def test_the_headline_scores_are_also_saved_as_csv(pcs, arguments, tmp_path):
    assert pcs(*arguments, "--out", tmp_path / "report").code == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    with (tmp_path / "report" / "scores.csv").open(newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    assert {s["key"] for s in report["scores"]} < set(rows)
    for score in report["scores"]:
        row = rows[score["key"]]
        assert row["title"] == score["title"] and row["better"] == score["better"]
        for column in ("value", "low", "high", "base", "chance"):
            expected = score[column]
            assert (float(row[column]) if row[column] else None) == (None if expected is None else expected)
    assert float(rows["training_seconds"]["value"]) == report["costs"]["training_seconds"]
    assert rows["training_seconds"]["unit"] == "seconds" and rows["concept_bytes"]["unit"] == "bytes"


def test_options_override_the_sampling_settings_of_the_recipe(pcs, arguments, concepts, tmp_path, monkeypatch):
    seen = []
    generate = Runner.generate

    def spy(self, prompts, seeds, settings, **how):
        seen.append({k: getattr(settings, k) for k in ("steps", "guidance", "scheduler")})
        return generate(self, prompts, seeds, settings, **how)

    monkeypatch.setattr(Runner, "generate", spy)
    assert pcs(*arguments, "--limit", 1, "--out", tmp_path / "a").code == 0
    assert all(s == {"steps": 2, "guidance": None, "scheduler": None} for s in seen) and seen
    seen.clear()
    asked = ("--steps", 1, "--guidance", 2.5, "--scheduler", "euler")
    assert pcs(*arguments, "--limit", 1, *asked, "--out", tmp_path / "b").code == 0
    assert all(s == {"steps": 1, "guidance": 2.5, "scheduler": "euler"} for s in seen) and seen
    wrong = pcs(*arguments, "--scheduler", "eular", "--out", tmp_path / "c")
    assert wrong.code == 2 and "unknown scheduler 'eular'" in wrong.err and not (tmp_path / "c").exists()


def test_the_help_states_where_references_are_looked_for(pcs):
    text = " ".join(pcs("image", "evaluate", "--help").out.replace("│", " ").split())
    assert "a folder next to the concept, with the same name as the training folder" in text


def test_the_runner_gives_the_same_scores_as_the_command(pcs, arguments, concepts, photos, dino, tiny_folder, tmp_path):
    """The runner can also evaluate one of several loaded concepts. A newly learned concept needs no `references`."""
    assert pcs(*arguments, "--out", tmp_path / "report").code == 0
    by_command = json.loads((tmp_path / "report" / "report.json").read_text())
    runner = ImageRunner(load_backbone(tiny_folder))
    runner.load(read(concepts["mug"]))
    prompts = str(tmp_path / "prompts.txt")
    settings = EvaluationSettings(prompts, dino=dino, gallery=tmp_path / "gallery")
    report = runner.evaluate("mug", replace(settings, references=photos))
    assert json.loads(report.to_json())["scores"] == by_command["scores"]
    with pytest.raises(ValueError, match=r"unknown concept 'mag'. Did you mean 'mug'"):
        runner.evaluate("mag", settings)
    tiny = ("train.steps=1", "train.batch_size=1", "train.resolution=32", "sampling.steps=1", "backbone=tiny")
    subject = {"pot": read_subject(photos, "teapot")}
    runner.personalize(subject, load("textual_inversion", tiny), tmp_path / "run", tensorboard=False)
    report = runner.evaluate("pot", replace(settings, out=tmp_path / "own", seeds=(0,), limit=1))
    assert report.name == "pot" and report.class_noun == "teapot" and (tmp_path / "own" / "index.html").is_file()
    assert len(report.references) == 3 and report.costs.training_seconds is not None


def test_references_are_looked_for_next_to_the_concept_and_checked_by_hash(pcs, concepts, dino, photos, tmp_path):
    shutil.copytree(concepts["mug"], tmp_path / "mug.concept")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {concept} on the beach")
    options = (
        "--concept",
        tmp_path / "mug.concept",
        "--dino",
        dino,
        "--prompts",
        prompts,
        "--out",
        tmp_path / "report",
    )
    missing = pcs("image", "evaluate", *options)
    assert missing.code == 2 and "give --references FOLDER" in missing.err
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "1.png").write_bytes((photos / "0.png").read_bytes() + b"x")
    changed = pcs("image", "evaluate", *options)
    assert changed.code == 2 and "has pictures that the concept was not learned from" in changed.err
    assert not (tmp_path / "report").exists()
    shutil.copyfile(photos / "1.png", tmp_path / "photos" / "1.png")
    assert pcs("image", "evaluate", *options).code == 0


def test_missing_instruments_references_and_galleries_are_reported(pcs, concepts, photos, dino, tmp_path):
    evaluate = ("image", "evaluate", "--concept", concepts["mug"], "--out", tmp_path / "o", "--references")
    for arguments, message in (
        ((photos, "--prompts", "dreambench"), "nothing to measure with: give a local CLIP folder"),
        ((tmp_path / "none", "--dino", dino), f"{tmp_path / 'none'} does not exist"),
        ((photos, "--dino", photos), "is not a model folder"),
        ((photos, "--dino", dino, "--gallery", photos), "contains no folders"),
    ):
        ran = pcs(*evaluate, *arguments)
        assert ran.code == 2 and message in ran.err and "Traceback" not in ran.err
        assert list(tmp_path.iterdir()) == []


def test_round_trip_encodes_and_decodes_with_the_backbones_vae(tiny_sd):
    from shared.backbones.stable_diffusion import StableDiffusionBackbone
    from shared.runner.judging import round_trip

    pixels = torch.rand(5, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = tiny_sd.vae.decode(tiny_sd.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(
        round_trip(StableDiffusionBackbone(tiny_sd, "tiny"), pixels), expected, atol=1e-4, rtol=1e-4
    )
