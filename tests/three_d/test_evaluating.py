"""In asset evaluation, only the true object gets perfect scores, and assets are not rotated to fit it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from typer.testing import CliRunner

from pcs_3d.commands.three_d import app
from pcs_3d.evaluation.alignment import iou
from pcs_3d.evaluation.evaluate import Against, evaluate, plain
from pcs_3d.evaluation.headline import Arm, Arms, headline
from pcs_3d.evaluation.janus import agreeing, fronts, read_views, sectors
from pcs_3d.evaluation.looks import Judge, Looks
from pcs_3d.evaluation.save_asset_report import save_asset_report
from pcs_3d.evaluation.shape_scores import BEST_DB, compared, geometry
from pcs_3d.evaluation.truths import TrueToy, read_truth
from pcs_3d.evaluation.views import Views, as_model_pixels, cameras, draw, painted_mesh, silhouettes, sphere
from shared.io.contact_sheets import write_picture
from shared.metrics.instruments import load_instruments
from shared.toybox.reference_sets import held_out
from shared.toybox.shapes import cloud
from shared.toybox.subjects import HeldOut
from shared.toybox.world import Thing
from tests.three_d.pages import viewer_of

AROUND = cameras()
AZIMUTHS = AROUND.azimuth_deg.tolist()
PLAIN_CAR = TrueToy(HeldOut("plain", Thing("car", "red", "blue"), ()))  # the shape is the same for all cars


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """Writes the mesh of a box that is longest from front to back and has a different colour on each side."""
    mesh = trimesh.creation.box((1, 1, 1)).apply_scale((0.4, 0.5, 1.4))  # in glTF, z is forward
    mesh.unmerge_vertices()
    side = np.asarray(mesh.face_normals).round() @ np.array([1, 2, 3]) + 3
    colors = np.random.default_rng(0).integers(0, 255, (7, 4)).astype(np.uint8)
    mesh.visual.vertex_colors = np.repeat(colors[side.astype(int)], 3, 0)
    path = tmp_path_factory.mktemp("box") / "asset.glb"
    mesh.export(path)
    return path


def turned(path, out, degrees):
    mesh = trimesh.load_mesh(path, process=False)
    mesh.apply_transform(trimesh.transformations.rotation_matrix(np.radians(degrees), [0, 1, 0]))
    mesh.export(out)
    return out


@pytest.mark.parametrize("scale, offset", [(1.0, (0, 0, 0)), (0.6, (0.2, -0.15, 0.1))])
def test_a_mesh_matches_itself_at_any_position_and_size(box, scale, offset):
    mesh = painted_mesh(box)
    found = compared(mesh.placed(scale, offset), draw(mesh, AROUND), AROUND)
    assert found.iou.min() > 0.95 and found.psnr_of_all > 20
    if scale == 1:
        assert found.iou.min() == 1 and found.psnr_of_all == BEST_DB


def test_a_rotated_mesh_is_not_rotated_back(box, tmp_path):
    truth, mesh = draw(painted_mesh(box), AROUND), painted_mesh(turned(box, tmp_path / "t.glb", 90))
    found = compared(mesh, truth, AROUND)
    assert found.iou.mean() < 0.65  # the best that scale and translation can achieve
    assert iou(draw(mesh, AROUND).masks, truth.masks.roll(4, 0)).min() > 0.97  # what a rotation would have achieved


def test_an_empty_view_does_not_match_a_white_object():
    white = draw(sphere(torch.ones(3)), AROUND[:2])
    assert compared(sphere(torch.ones(3)), white, AROUND[:2]).psnr_of_all == BEST_DB
    empty = Views(torch.ones_like(white.pixels), torch.zeros_like(white.masks))
    gone = compared(sphere(torch.ones(3)), empty, AROUND[:2])
    assert gone.iou.max() == 0 and gone.psnr_of_all < 4  # the errors on a black background, half of all errors, are 1


def test_silhouettes_drawn_together_equal_those_drawn_one_by_one(box):
    for mesh in (
        painted_mesh(box),
        painted_mesh(box).placed(1.3, (0.3, 0.2, -0.3)),
    ):  # the second mesh is partly outside the view
        assert torch.equal(silhouettes(mesh, AROUND[:4], 48), draw(mesh, AROUND[:4], 48).masks)


def test_true_views_of_the_toybox_match_the_cameras():
    views = PLAIN_CAR.views(AROUND[2:15:4])
    places, _ = AROUND[2:15:4].project(torch.from_numpy(cloud("car").points))
    column, row = ((places[..., 0] + 1) * 64).long(), ((1 - places[..., 1]) * 64).long()
    for mask, x, y in zip(views.masks, column, row, strict=True):
        seen = torch.zeros_like(mask)
        seen[y, x] = True
        assert mask[y, x].float().mean() > 0.99  # almost no point of the shape is outside its mask
        grown = torch.nn.functional.max_pool2d(seen[None].float(), 5, 1, 2)[0] > 0
        assert grown[mask].float().mean() > 0.99  # almost nothing is drawn where there are no points


def test_an_object_with_four_fronts_is_detected():
    toy = TrueToy(held_out("development-robot"))
    for views, expected, least, most in (
        (toy.views(AROUND), 1, 14, 16),
        (toy.views(replace(AROUND, azimuth_deg=(AROUND.azimuth_deg + 45) % 90 - 45)), 4, 0, 8),
    ):
        named = [sectors(a) for a in read_views(as_model_pixels(views)).azimuths.tolist()]
        assert fronts(named, AZIMUTHS) == expected
        assert least <= sum(agreeing(named, AZIMUTHS)) <= most


def test_sectors_and_fronts_are_counted_around_the_circle():
    assert (
        sectors(-20) == {"front"}
        and sectors(340) == {"front"}
        and sectors(190) == {"back"}
        and sectors(270) == {"side"}
    )
    assert sectors(45) == {"front", "side"} and sectors(225) == {"side", "back"}
    assert sum(agreeing([{"front"}] * 16, AZIMUTHS)) == 5 and sum(agreeing([{"side"}] * 16, AZIMUTHS)) == 10
    assert fronts([{"front"}] * 16, AZIMUTHS) == 4 and fronts([{"back"}] * 16, AZIMUTHS) == 0
    two = [{"front"} if abs((a + 180) % 360 - 180) < 30 or abs(a - 180) < 30 else {"side"} for a in AZIMUTHS]
    assert fronts(two, AZIMUTHS) == 2


def test_the_geometry_of_closed_open_and_scattered_meshes_is_measured(tmp_path):
    cube = trimesh.creation.box((1, 1, 1))
    cube.unmerge_vertices()  # as they are in files with texture seams
    cube.export(tmp_path / "a.glb")
    found = geometry(painted_mesh(tmp_path / "a.glb"))
    assert (found.faces, found.vertices, found.components, found.watertight) == (12, 8, 1, True)
    assert found.volume == pytest.approx((2 / 3**0.5) ** 3, rel=1e-3) and found.share_of_box == pytest.approx(
        1, rel=1e-3
    )
    trimesh.Trimesh(cube.vertices, cube.faces[1:], process=False).export(tmp_path / "b.glb")
    open_one = geometry(painted_mesh(tmp_path / "b.glb"))
    assert not open_one.watertight and open_one.volume is None and open_one.share_of_box is None
    far = trimesh.creation.icosphere(1).apply_translation((5, 0, 0))
    trimesh.util.concatenate([cube, far]).export(tmp_path / "c.glb")
    assert geometry(painted_mesh(tmp_path / "c.glb")).components == 2


def test_true_renders_are_verified_a_sphere_is_not_and_identity_is_relative_to_the_true_renders():
    toy = TrueToy(held_out("development-car"))
    judge = Judge(load_instruments(evaluators="toybox"), AROUND, "a photo of a car", None, toy)
    true = toy.views(AROUND)
    looks = judge.look(true, true)
    assert np.mean(looks.scores["verified"]) > 0.85 and min(looks.scores["likeness_true"]) > 0.999
    ball = draw(sphere(torch.tensor([0.8, 0.1, 0.1])), AROUND[8:])
    half = Views(*(torch.cat([t[:8], b]) for t, b in ((true.pixels, ball.pixels), (true.masks, ball.masks))))
    mixed = judge.look(half, true)
    assert mixed.scores["verified"][:8] == looks.scores["verified"][:8] and sum(mixed.scores["verified"][8:]) == 0
    assert np.mean(mixed.scores["clip_t"][8:]) < np.mean(looks.scores["clip_t"][8:]) - 0.05
    few = Looks({key: values[4:] for key, values in mixed.scores.items()})  # verified in 4 of 12 views
    for asset, truth, relative in ((few, looks, 1 / 3), (few, mixed, 2 / 3), (looks, mixed, 1.0)):
        found = {s.key: s.value for s in headline(Arms(Arm(asset), Arm(truth)))}
        assert found["identity_relative"] == pytest.approx(relative)


def test_the_command_writes_a_complete_report(box, tmp_path):
    folder = tmp_path / "asset"
    folder.mkdir()
    (folder / "asset.glb").write_bytes(box.read_bytes())
    about = {"prompt": "a photo of a <my-box>", "backbone": "toybox", "costs": {"seconds": 3.5}}
    (folder / "asset.json").write_text(json.dumps(about))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "seen.png")
    out = tmp_path / "report"
    asked = [
        "evaluate",
        str(folder),
        "--truth",
        str(box),
        "--out",
        str(out),
        "--references",
        str(tmp_path / "seen.png"),
    ]
    done = CliRunner().invoke(app, [*asked, "--class-noun", "house"], catch_exceptions=False)
    assert done.exit_code == 0 and "Silhouette IoU" in done.stdout
    lower = [line for line in done.stdout.splitlines() if line.endswith("lower is better")]
    assert [line.split("  ")[0] for line in lower] == ["Azimuth error (degrees)", "Fronts"]
    report = json.loads((out / "report.json").read_text())
    scores = {s["key"]: s for s in report["scores"]}
    assert scores["iou"]["value"] == 1 and scores["iou"]["base"] < 0.6 and scores["psnr"]["value"] == BEST_DB
    assert report["prompt"] == "a photo of a house" and report["costs"] == {"seconds": 3.5}
    curves = {c["key"]: c for c in report["curves"]}
    assert {"iou", "psnr", "clip_t", "clip_i", "view", "azimuth_error", "likeness_true"} <= curves.keys()
    assert curves["clip_t"]["azimuth_deg"] == AZIMUTHS and len(curves["clip_t"]["sphere"]) == 16
    assert scores["clip_t"]["value"] == pytest.approx(np.mean(curves["clip_t"]["asset"]))
    rows = list(csv.DictReader((out / "report.csv").open()))
    assert [float(r["azimuth_deg"]) for r in rows] == AZIMUTHS and float(rows[0]["score.iou"]) == 1
    page = (out / "report.html").read_text()
    assert page.count("<svg") == len(curves) and page.count("data:image/png") == 33
    outside, shown = viewer_of(page)
    assert "://" not in outside and len(shown.faces) == 12
    assert len(list((out / "renders").iterdir())) == 16 and (out / "scores.csv").is_file()
    again = CliRunner().invoke(app, asked)
    assert isinstance(again.exception, ValueError) and "already exists" in str(again.exception)


def test_similarity_to_a_picture_is_measured_with_dino_for_each_azimuth(box, dino, tmp_path):
    (tmp_path / "seen").mkdir()
    side = AZIMUTHS.index(90.0)
    views = draw(painted_mesh(box), AROUND)
    write_picture(as_model_pixels(views)[side], tmp_path / "seen" / "side.png")
    report = evaluate(box, Against(references=tmp_path / "seen", dino=dino))
    (curve,) = (c for c in report.curves if c.key == "dino_i")
    assert curve.azimuth_deg == AZIMUTHS and curve.asset[side] == pytest.approx(1, abs=1e-3)
    assert curve.asset.index(max(curve.asset)) == side
    encoder = load_instruments(dino=dino).identity
    assert encoder is not None
    front, picture = (encoder.images(as_model_pixels(views)[i : i + 1])[0] for i in (0, side))
    assert curve.asset[0] == pytest.approx(float(front @ picture / (front.norm() * picture.norm())), abs=1e-3)


def test_the_report_on_a_bare_mesh_states_which_options_are_needed_for_more_scores(box, tmp_path):
    report = evaluate(box, Against())
    assert {s.key for s in report.scores} == {"faces", "watertight", "components", "volume", "share_of_box"}
    assert any("--truth" in n for n in report.notes) and any("--clip" in n for n in report.notes)
    assert save_asset_report(report, tmp_path / "r").is_file()


def test_learned_names_are_replaced_by_the_class_noun():
    assert plain("a photo of a <my-mug>", "mug") == "a photo of a mug"
    assert plain("a <my-x> in the snow", "owl") == "an owl in the snow"


def test_the_class_noun_of_a_concept_is_read_from_the_asset_folder(box, tmp_path):
    folder = tmp_path / "asset"
    folder.mkdir()
    (folder / "asset.glb").write_bytes(box.read_bytes())
    about = {"prompt": "a photo of a <my-mug>", "plain_prompt": "a photo of a mug", "backbone": "toybox"}
    (folder / "asset.json").write_text(json.dumps(about))
    told = "pass --class-noun to use a class noun"
    found, owl = evaluate(folder, Against()), evaluate(folder, Against(class_noun="my owl"))
    assert (found.prompt, owl.prompt) == ("a photo of a mug", "a photo of an owl")
    assert not any(told in note for note in (*found.notes, *owl.notes))
    (folder / "asset.json").write_text(json.dumps({**about, "plain_prompt": None}))
    assert any(told in note for note in evaluate(folder, Against()).notes)


def test_folders_and_files_that_cannot_be_evaluated_are_refused(box, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "meshless").mkdir()
    (tmp_path / "meshless" / "asset.json").write_text("{}")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "asset.glb").write_bytes(box.read_bytes())
    (tmp_path / "torn" / "asset.json").write_text("[" * 100_000)
    (tmp_path / "no.glb").write_bytes(b"glTF and nothing else")
    (tmp_path / "no.txt").write_text("no mesh")
    trimesh.PointCloud(np.random.default_rng(0).normal(size=(50, 3))).export(tmp_path / "points.ply")
    for path, said in (
        ("nowhere", "no such folder"),
        ("empty", "contains no asset"),
        ("meshless", "without a mesh"),
        ("torn", "cannot be read"),
        ("no.glb", "no.glb"),
        ("no.txt", "unknown mesh format"),
        ("points.ply", "no faces"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(tmp_path / path, Against())
    for truth, said in (
        ("development-cat-9", "Did you mean"),
        ("gone/x.glb", "no such file"),
        ("x.glb", "no such file"),
    ):
        with pytest.raises(ValueError, match=said):
            read_truth(truth)
    with pytest.raises(ValueError, match="no faces"):
        read_truth(str(tmp_path / "points.ply"))
