"""`pcs image evaluate` from a concept folder to the report, with a tiny DINO and pictures of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("models") / "tiny-dino"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessorPil(**size).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(concepts, photos, dino, painted, tmp_path) -> list:
    for i in range(3):
        painted(tmp_path / "gallery" / f"other-{i}", seed=10 + i)
    (tmp_path / "prompts.txt").write_text("a {concept} on the beach\n# not this\na {concept} in the snow\n")
    given = ("--references", photos, "--dino", dino, "--gallery", tmp_path / "gallery")
    return [
        "image",
        "evaluate",
        "--concept",
        concepts["mug"],
        *given,
        "--prompts",
        tmp_path / "prompts.txt",
        "--num",
        2,
    ]


def test_a_concept_is_measured(pcs, arguments, tmp_path):
    ran = pcs(*arguments, "--out", tmp_path / "report")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == str(tmp_path / "report" / "index.html")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {"index.html", "report.json"} <= {p.name for p in (tmp_path / "report").iterdir()}
    made = [p for p in report["pictures"] if p["kind"] == "concept"]
    assert len(made) == 4 and all((tmp_path / "report" / p["file"]).is_file() for p in made)
    identity = next(s for s in report["scores"] if s["key"] == "identity")
    assert identity["chance"] == 0.25 and report["costs"]["training_seconds"] > 0


def test_the_references_are_looked_for_beside_the_concept_and_known_by_their_hashes(
    pcs, concepts, dino, photos, tmp_path
):
    shutil.copytree(concepts["mug"], tmp_path / "mug.concept")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {concept} on the beach")
    given = ("--concept", tmp_path / "mug.concept", "--dino", dino, "--prompts", prompts, "--out", tmp_path / "report")
    missing = pcs("image", "evaluate", *given)
    assert missing.code == 2 and "give --references FOLDER" in missing.err
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "1.png").write_bytes((photos / "0.png").read_bytes() + b"x")
    changed = pcs("image", "evaluate", *given)
    assert changed.code == 2 and "holds other pictures than the concept was learned from" in changed.err
    assert not (tmp_path / "report").exists()
    shutil.copyfile(photos / "1.png", tmp_path / "photos" / "1.png")
    assert pcs("image", "evaluate", *given).code == 0


def test_nothing_to_measure_with_or_against(pcs, concepts, photos, dino, tmp_path):
    evaluate = ("image", "evaluate", "--concept", concepts["mug"], "--out", tmp_path / "o", "--references")
    for arguments, said in (
        ((photos, "--prompts", "dreambench"), "nothing to measure with: give a local CLIP folder"),
        ((tmp_path / "none", "--dino", dino), f"{tmp_path / 'none'} does not exist"),
        ((photos, "--dino", tmp_path), "is not a model folder"),
        ((photos, "--dino", dino, "--gallery", photos), "holds no folders"),
    ):
        ran = pcs(*evaluate, *arguments)
        assert ran.code == 2 and said in ran.err and "Traceback" not in ran.err
        assert list(tmp_path.iterdir()) == []


def test_what_a_concept_is_told_from_passes_the_same_autoencoder(tiny_sd):
    from pcs_image.scoring import _round_trip
    from shared.backbones.stable_diffusion import StableDiffusionBackbone

    pixels = torch.rand(5, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = tiny_sd.vae.decode(tiny_sd.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(
        _round_trip(StableDiffusionBackbone(tiny_sd, "tiny"), pixels), expected, atol=1e-4, rtol=1e-4
    )
