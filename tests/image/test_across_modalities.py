"""`pcs concept evaluate` scores the same concept in pictures, clips and an asset with the same encoder."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from shared.benchmark import cross_modal
from shared.benchmark.cross_modal_report import CrossModalReport, ModalityRow, ShotRow, save_cross_modal
from shared.benchmark.cross_modal_scores import scores_of
from shared.benchmark.modality import Made, Shot
from shared.evaluation.report_facts import Case
from shared.io.read_subject import read_subject
from shared.metrics.instruments import load_instruments
from shared.toybox import reference_sets as album

ASSET = (
    "train.steps=1", "train.batch_size=1", "field.resolution=12", "export.resolution=16", "export.faces=100",
    "export.picture=32", "export.frames=8", "export.texture=64",
)  # fmt: skip
CHEAP = (
    "--asset-recipe",
    "hifa",
    "--limit",
    "1",
    "--num",
    "1",
    "--steps",
    "1",
    *(part for s in ASSET for part in ("--set-asset", s)),
)


@pytest.fixture(scope="module")
def duck(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learns a concept of a held-out toybox subject in a single step. Returns the concept's folder."""
    from shared.cli import build, run

    folder = tmp_path_factory.mktemp("duck")
    album.write_album("development-duck", folder / "photos")
    subject = (f"subject.images={folder / 'photos'}", "subject.class_noun=duck", f"output={folder / 'duck.concept'}")
    quick = ("train.steps=1", "train.validation.every=0", "preview.num=0")
    assert run(build(), ["image", "personalize", "textual_inversion", *subject, *quick]) == 0
    return folder / "duck.concept"


@pytest.mark.usefixtures("few_true_pictures")
def test_one_concept_is_scored_in_pictures_clips_and_an_asset(pcs, duck: Path, tmp_path: Path):
    out = tmp_path / "report"
    ran = pcs("concept", "evaluate", duck, "--in", "3d,image,video", *CHEAP, "--out", out)
    assert ran.code == 0, ran.err
    assert all(title in ran.out for title in ("Pictures", "Clips", "Asset", "Toy numbers"))
    rows = list(csv.DictReader((out / "report.csv").open()))
    assert [(r["modality"], r["made"], r["frames"]) for r in rows] == [
        ("image", "1", "1"), ("video", "1", "16"), ("3d", "1", "16"),
    ]  # fmt: skip
    for row in rows:  # every modality has the same metrics, each with a value for true pictures or renders
        assert all(0 <= float(row[k]) <= 1 for k in ("identity", "identity.truth", "recognised", "class", "copied"))
        assert float(row["identity.truth"]) > 0.5 and float(row["identity_i"]) < 0.9
    assert rows[0]["text"] and rows[1]["text"] and not rows[2]["text"], (
        "an asset's prompt contains no condition that could be checked"
    )
    shots = list(csv.DictReader((out / "shots.csv").open()))
    assert [s["text"] for s in shots] == ["a photo of a <duck> on the beach"] * 2 + ["a photo of a <duck>"]
    assert all((out / s["file"]).is_file() for s in shots)
    report = CrossModalReport.model_validate_json((out / "report.json").read_text())
    assert report.name == "duck" and len(report.instruments) == 3 and not report.failures
    page = (out / "index.html").read_text()
    assert page.count("data:image/webp") == 2 and page.count("data:image/png") == 6 and "://" not in page
    assert 'href="asset/asset.glb"' in page and (out / "asset" / "asset.glb").is_file()
    assert not list(out.rglob("*.training"))
    again = pcs("concept", "evaluate", duck, *CHEAP, "--out", out)
    assert again.code == 2 and "already exists" in again.err


@pytest.mark.usefixtures("few_true_pictures")
def test_an_asset_can_be_reconstructed_from_the_concepts_references(pcs, duck, tmp_path):
    small = ("phases.form.train.steps=1", "phases.fit.train.steps=2", "phases.paint.train.steps=1", "train.batch_size=1",
             "phases.paint.field={resolution: 8, start: {resolution: 16, faces: 100}}", *ASSET[2:])  # fmt: skip
    how = ("--asset-recipe", "reference_reconstruction", *(part for s in small for part in ("--set-asset", s)))
    ran = pcs("concept", "evaluate", duck, "--in", "3d", "--num", "1", *how, "--out", tmp_path / "report")
    assert ran.code == 0, ran.err
    (row,) = csv.DictReader((tmp_path / "report" / "report.csv").open())
    assert row["modality"] == "3d" and row["made"] == "1" and row["identity_i"]
    assert (tmp_path / "report" / "asset" / "asset.glb").is_file()


def test_a_subject_without_true_pictures_is_scored_for_likeness_only(pcs, concepts, photos, dino, tmp_path: Path):
    how = ("--references", photos, "--dino", dino, "--floor", "--steps", "1", "--num", "1", "--limit", "2")
    ran = pcs("concept", "evaluate", concepts["mug"], "--in", "image", *how, "--out", tmp_path / "r")
    assert ran.code == 0, ran.err
    assert "Pictures, without the concept" in ran.out and "no true pictures of this subject" in ran.out
    (row,) = csv.DictReader((tmp_path / "r" / "report.csv").open())
    assert row["made"] == "2" and row["dino_i"] and row["dino_i.base"] != row["dino_i"]
    assert "identity" not in row and "recognised" not in row


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--in", "image,audio"), "audio"),
        (("--in", "video"), "--in video: .* give motion_adapter=FOLDER"),
        (("--in", "image,3d", "--asset-recipe", "hfia"), "--in 3d: .*hifa"),
        (("--in", "3d", "--asset-recipe", "realfusion"), "--in 3d: .*realfusion itself learns the subject"),
        (("--in", "3d", "--asset-recipe", "reference_reconstruction"), "--in 3d: .*masks, but 0.png.* ha(s|ve) none"),
        (("--in", "3d", "--set-asset", "backbone=toybox"), "--in 3d: --set-asset backbone=toybox: all modalities use "),
        (("--in", "image", "--prompts", "nonesuch"), "nonesuch"),
        (("--in", "image", "--dino", "/nowhere"), "--dino /nowhere"),
        (("--in", "image", "--backbone", "toybox"), "--in image: .*does not fit toybox"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_generated(
    pcs, concepts, photos, dino, tmp_path: Path, more, why: str
):
    given = ("--references", photos, *(() if "--dino" in more else ("--dino", dino)))
    ran = pcs("concept", "evaluate", concepts["mug"], *given, *more, "--out", tmp_path / "r")
    assert ran.code == 2 and re.search(why, ran.err), ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["motion", "style"])
def test_only_subjects_and_identities_are_evaluated_across_modalities(pcs, concepts, photos, tmp_path: Path, kind: str):
    concept = shutil.copytree(concepts["mug"], tmp_path / "other.concept")
    meta = json.loads((concept / "concept.json").read_text())
    (concept / "concept.json").write_text(json.dumps({**meta, "kind": kind}))
    ran = pcs("concept", "evaluate", concept, "--references", photos, "--out", tmp_path / "r")
    assert ran.code == 2 and f"is a {kind}: only a subject or identity" in ran.err


def test_only_installed_modalities_are_listed():
    assert list(cross_modal.modalities()) == ["image", "video", "3d"]
    assert list(cross_modal.modalities(["3d", "image"])) == ["image", "3d"]
    with pytest.raises(ValueError, match=r"--in: .*vidoe.*Did you mean 'video'"):
        cross_modal.modalities(["vidoe"])


# --- the metrics ---------------------------------------------------------------------------


def known(shown: Sequence[torch.Tensor], true: tuple[torch.Tensor, torch.Tensor], texts: str) -> Made:
    """Returns the given frames of a car as if a modality had generated them."""
    held = album.held_out("development-car")
    case = Case("car", "car", album.pictures(held.thing), gallery=album.gallery(held), fresh=album.fresh(held))
    shots = [Shot(text, "a photo of a car", 0, frames) for text, frames in zip(texts, shown, strict=True)]
    return Made(case, shots, true=true)


@pytest.fixture(scope="module")
def tools():
    return load_instruments(evaluators="toybox")


def test_the_true_subject_is_verified_and_its_lookalike_is_not(tools):
    held = album.held_out("development-car")
    other, true = next(iter(album.gallery(held).values())), album.fresh(held)
    row, shots = scores_of("x", known([true, other], (true, true), "aa"), tools, Path())
    identity, recognized = row.score("identity"), row.score("recognised")
    assert identity and identity.truth and recognized and recognized.chance == pytest.approx(1 / 9)
    assert shots[0].scores["identity"] == pytest.approx(identity.truth) and identity.truth > 0.5
    assert shots[1].scores["identity"] == 0
    assert identity.value == pytest.approx(0.5) and shots[0].scores["ceiling"] == identity.truth
    assert row.frames == 12 and identity.low is None, "an interval needs more than one prompt"


def test_intervals_are_clipped_to_the_unit_range(tools):
    true = album.fresh(album.held_out("development-car"))
    half = true[:6], torch.cat([true[:3], -true[:3]])  # at most half of these can be verified
    row, _ = scores_of("x", known([true[:2], true[2:4]], half, "ab"), tools, Path())
    identity = row.score("identity")
    assert identity and identity.truth and identity.truth <= 0.5 and identity.value == 1
    assert identity.low is not None and identity.high == 1 and identity.low <= 1


def test_the_report_names_a_failed_modality_and_shows_the_others(tmp_path: Path, photos: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [ModalityRow(name="image", made=1, frames=1), ModalityRow(name="3d", failed="ValueError: <empty>")]
    shots = [ShotRow(modality="image", text="<b>", seed=0, file="a.png")]
    report = CrossModalReport(name="mug", modalities=rows, shots=shots)
    saved = save_cross_modal(report, read_subject(photos), tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "ValueError: &lt;empty&gt;" in page and "&lt;b&gt;" in page and len(saved.references) == 3
    assert "| Asset | failed |" in saved.markdown() and "ValueError: <empty>" in saved.csv()
    with pytest.raises(ValueError, match="3d failed"):
        cross_modal.failures_told(saved)
