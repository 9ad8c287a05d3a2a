"""Tests that the toybox's evaluators load, reach their minimum accuracies and resume training bit for bit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.metrics.scores import similarities
from shared.pretrain.evaluators import augment, data, measure, tasks, train
from shared.pretrain.evaluators import judge_backbone as judge
from shared.pretrain.evaluators.pose_task import PoseTask
from shared.pretrain.evaluators.tasks import contrastive_loss, retrieve
from shared.pretrain.run_task import RunSettings
from shared.pretrain.task import Compute
from shared.toybox import world
from shared.toybox.evaluators import clip as clips
from shared.toybox.evaluators import load_clip, load_identity, load_recognizer
from shared.toybox.evaluators.convnet import WEIGHTS, TrunkConfig, adopt_state, read_state
from shared.toybox.evaluators.identity import IdentityConfig
from shared.toybox.evaluators.pose import PoseConfig, load_pose
from shared.toybox.evaluators.recognizer import ATTRIBUTES, RecognizerConfig
from shared.toybox.weights import WEIGHTS as BACKBONES
from shared.toybox.weights import sampling_defaults

TINY = TrunkConfig(widths=(4, 8), blocks=(1, 1))
BF16 = Compute(bf16=True)  # in fp32, torch 2.13 crashes in the backward pass with so few channels on some CPUs


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fake_pictures(n: int = 24) -> data.Pictures:
    rng = np.random.default_rng(0)
    labels = {name: rng.integers(-1, len(v), n) for name, v in data.attribute_values().items()}
    captions = [["a red duck with blue wings", "a duck on the beach"]] * n
    pixels = rng.integers(0, 255, (n, 64, 64, 3), dtype=np.uint8)
    packed = rng.integers(0, 255, (n, 64, 8), dtype=np.uint8)
    return data.Pictures(pixels, packed, labels, captions, data.attribute_values(), reconstructions=pixels[: n // 2])


def fake_individuals() -> data.IdentityPictures:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (3, 2, 4, 64, 64, 3), dtype=np.uint8)
    numbers = np.where(np.arange(6)[:, None] < 4, rng.normal(size=(6, 8)), np.nan).astype(np.float32)
    return data.IdentityPictures(pixels, np.array([0, 1, 2, 0, -1, -1]), numbers)


def tiny_task(name: str, seed: int = 0) -> tasks.EvaluatorTask:
    settings = tasks.EvaluatorTraining(batch_size=16 if name == "identity" else 8, seed=seed)
    if name == "recognizer":
        config = RecognizerConfig(trunk=TINY, values=data.attribute_values())
        return tasks.RecognizerTask(fake_pictures(), settings, BF16, config)
    if name == "identity":
        return tasks.IdentityTask(fake_individuals(), settings, BF16, IdentityConfig(trunk=TINY, dimensions=8))
    if name == "pose":
        poses = np.random.default_rng(1).uniform(-1, 1, (24, 6)).astype(np.float32)
        poses[::5] = np.nan
        return PoseTask(fake_pictures(), poses, settings, BF16, PoseConfig(trunk=TINY, bins=12))
    from shared.toybox import tokenizer

    config = clips.ClipConfig(vision_width=16, vision_layers=1, text_width=16, text_layers=1, dimensions=8)
    return tasks.ClipTask(fake_pictures(), settings, BF16, tokenizer.build(["red", "duck", "beach"]), config)


def test_all_pictures_in_a_group_are_varied_in_the_same_way():
    pixels, faces = torch.rand(6 * 5, 3, 4, 4), torch.tensor([False] * 5 + [True])
    seen = set()
    for seed in range(40):
        varied, channels = data.vary(pixels, 6, faces, torch.Generator().manual_seed(seed))
        assert channels[5].tolist() == [0, 1, 2], "a face keeps its colours"
        for group, shown, order in zip(pixels.chunk(6), varied.chunk(6), channels, strict=True):
            mirrored = torch.equal(shown, group.flip(3)[:, order])
            assert mirrored or torch.equal(shown, group[:, order])
            seen.add((mirrored, *order.tolist()))
    assert len(seen) == 12, "every order of the channels occurs, both mirrored and unmirrored"


def test_accent_colours_are_permuted_like_the_channels_of_the_picture():
    numbers = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 7.0, 8.0]])
    shown = data.accents_as_shown(numbers, torch.tensor([[2, 0, 1]]))
    assert shown.tolist() == torch.tensor([[0.3, 0.1, 0.2, 0.6, 0.4, 0.5, 7.0, 8.0]]).tolist()


def fit(
    name: str, place: Path, steps: int = 4, pause_at: int | None = None, **changed
) -> tuple[tasks.EvaluatorTask, int]:
    """Trains a tiny evaluator in the folder `place` and writes its weights to the folder `out` next to it.

    Returns the task and the number of completed steps.
    """
    task = tiny_task(name, changed.pop("seed", 0))
    settings = RunSettings(steps, pause_at=pause_at, device="cpu", **changed)
    return task, train.fit(task, settings, train.Folders(place, place.parent / "out", place))


@pytest.mark.parametrize("name", ["recognizer", "identity", "clip", "pose"])
def test_training_resumes_bit_for_bit(name: str, tmp_path: Path):
    before = tiny_task(name).state_dict()
    whole, steps = fit(name, tmp_path / "a" / "whole")
    assert steps == 4 and fit(name, tmp_path / "b" / "halves", pause_at=2)[1] == 2
    assert train.written_steps(tmp_path / "b" / "out") == 2, "a paused run also writes its weights"
    resumed, steps = fit(name, tmp_path / "b" / "halves")
    assert steps == 4
    state, found = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(state[k], found[k]) for k in state)
    assert any(not torch.equal(state[k], before[k]) for k in state)
    with pytest.raises(ValueError, match="was made with seed=0, not 3"):
        fit(name, tmp_path / "b" / "halves", seed=3)


@pytest.mark.parametrize("name", ["recognizer", "identity", "clip", "pose"])
def test_training_continues_from_finished_weights_with_a_new_optimizer(name: str, tmp_path: Path):
    out = tmp_path / "out"
    assert fit(name, tmp_path / "first", 3, pause_at=2)[1] == 2
    adopted = tiny_task(name)
    assert train.adopt(adopted, out) == 2
    written = read_state(out / "model.safetensors")
    state = {"recognizer": "recognizer", "identity": "encoder", "clip": "model", "pose": "estimator"}[name]
    assert all(torch.equal(getattr(adopted, state).state_dict()[k], v) for k, v in written.items())
    assert fit(name, tmp_path / "second", 3)[1] == 3
    assert fit(name, tmp_path / "third", 3, pause_at=2, resume=False)[1] == 2
    assert not adopt_state(torch.nn.Linear(2, 2), out), "weights for another architecture are not used"


def test_a_resumed_run_writes_the_files_that_a_killed_run_did_not_write(tmp_path: Path):
    fit("recognizer", tmp_path / "work")
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    assert fit("recognizer", tmp_path / "work")[1] == 4 and train.written_steps(tmp_path / "out") == 4


def test_saved_weights_can_be_loaded(tmp_path: Path):
    loads = {"recognizer": load_recognizer, "identity": load_identity, "clip": load_clip, "pose": load_pose}
    for name, load in loads.items():
        task = tiny_task(name)
        task.export(tmp_path / name)
        loaded = load(tmp_path / name)
        module = loaded[0] if isinstance(loaded, tuple) else loaded
        source = {"recognizer": "module", "identity": "encoder", "clip": "model", "pose": "estimator"}[name]
        source = getattr(task, source)
        for key, value in source.state_dict().items():
            expected = value.half().float() if value.is_floating_point() else value
            assert torch.equal(module.state_dict()[key], expected), key
        with pytest.raises(FileNotFoundError, match=f"pcs toybox train {name}"):
            load(tmp_path / "nothing")


def test_the_shipped_clip_is_an_ordinary_transformers_folder():
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    folder = str(WEIGHTS / "clip")
    model = CLIPModel.from_pretrained(folder, local_files_only=True)
    assert model.dtype == torch.float32
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(["a red duck"], return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)(
        Image.new("RGB", (90, 70), "red"), return_tensors="pt"
    )
    output = model(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels["pixel_values"]
    )
    assert output.logits_per_image.shape == (1, 1)
    mine = clips.image_features(model, torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64))
    assert torch.allclose(mine, output.image_embeds, atol=1e-4)


def test_the_shipped_recognizer_reaches_its_minimum_accuracies():
    found = measure.measure_recognizer(240, seed=11)
    for name, bar in {
        "class": 0.93,
        "background": 0.97,
        "main": 0.9,
        "second": 0.9,
        "view": 0.88,
        "accessory": 0.92,
        "style": 0.97,
    }.items():
        assert found[name] >= bar, (name, found[name], found["confusions"][name])


def test_the_identity_encoder_finds_held_out_subjects_among_distractors():
    found = measure.measure_identity("development", queries=2, seed=5)
    assert found["gallery"] >= 9
    assert found["retrieval"] >= 0.86, found


def test_only_visible_faces_are_judged_and_hidden_faces_are_counted():
    found = measure.measure_identity("development", queries=1, seed=5, faces=True)
    assert found["no_face"] > 0 and found["queries"] + found["no_face"] == 4 * found["gallery"]
    things = measure.measure_identity("development", references=2, queries=1, seed=5)
    assert things["no_face"] == 0 and things["queries"] == 12 * things["gallery"]


def test_calibration_tells_free_pictures_from_fixed_ones_and_saves_its_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from shared.pretrain.evaluators import calibrate

    monkeypatch.setattr(calibrate, "CROPS", calibrate.CROPS[:1])
    out = tmp_path / "calibration.json"
    lines = list(calibrate.calibrate(2, 1, out))
    kept = json.loads(out.read_text())
    assert len(kept["tried"]) == 3 and lines[-1].startswith("chosen: " + kept["encoder"])
    best = min(kept["tried"], key=lambda t: t["error"])
    assert (kept["encoder"], kept["crops"]) == (best["encoder"], best["crops"])
    assert best["free"] > 2 * best["fixed"] and best["other"] > 0.6 > 0.4 > best["places"]
    assert kept["typical"]["same"] > kept["typical"]["other"]


def test_the_shipped_clip_retrieves_the_right_captions():
    found = measure.measure_clip(128, seed=7)
    assert found["swap_background"] >= 0.95 and found["swap_main"] >= 0.85 and found["caption_of_64"] >= 0.6, found


def test_predictions_and_probabilities_agree():
    recognizer = load_recognizer()
    pixels = torch.rand(3, 3, 64, 64)
    found, chances = recognizer.predict(pixels), recognizer.probabilities(pixels)
    assert set(found) == set(ATTRIBUTES)
    for name, p in chances.items():
        assert p.shape == (3, len(recognizer.config.values[name])) and torch.allclose(
            p.sum(1), torch.ones(3), atol=1e-5
        )
        assert found[name] == [recognizer.config.values[name][i] for i in p.argmax(1)]
    assert recognizer.config.values["class"] == world.CLASSES
    for wrong in (torch.rand(3, 64, 64), torch.rand(1, 3, 32, 32), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="pixels"):
            recognizer.predict(wrong)


def test_entries_are_compared_by_their_two_closest_pictures_and_cut_to_the_size_of_the_smallest_entry():
    front, side, other = torch.eye(3)
    query = torch.tensor([[0.0, 1.0, 0.2]])
    views = torch.stack([front, front, side, side])
    assert similarities(query, [views, other.expand(4, 3)]).argmax() == 0, "two pictures from the same side are enough"
    one = similarities(query, [views, other])
    assert one[0, 0] == 0, "if an entry has only one picture, only the first picture of each entry counts"
    cosine = (query / query.norm()) @ other
    assert torch.allclose(one[0, 1], cosine.double())


def test_retrieval_accepts_one_or_several_embeddings_per_entry():
    gallery = [torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0], [0.1, 0.9]])]
    assert retrieve(torch.tensor([[0.9, 0.1], [0.2, 0.7]]), gallery).tolist() == [0, 1]
    assert torch.allclose(load_identity().embed(torch.rand(2, 3, 64, 64)).norm(dim=1), torch.ones(2), atol=1e-5)
    with pytest.raises(ValueError, match="gallery"):
        retrieve(torch.ones(1, 2), [])


def test_the_contrastive_loss_matches_its_formula():
    torch.manual_seed(0)
    z, y = torch.nn.functional.normalize(torch.randn(6, 4), dim=1), torch.tensor([0, 0, 1, 1, 1, 2])
    expected = []
    for i in range(6):
        others = [a for a in range(6) if a != i]
        positives = [p for p in others if y[p] == y[i]]
        total = sum(torch.exp(z[i] @ z[a] / 0.1) for a in others)
        if positives:
            expected.append(-sum(torch.log(torch.exp(z[i] @ z[p] / 0.1) / total) for p in positives) / len(positives))
    assert torch.allclose(contrastive_loss(z, y, 0.1), torch.stack(expected).mean(), atol=1e-5)


def test_augmentation_is_reproducible_and_keeps_pixels_in_range():
    pixels = torch.rand(8, 3, 64, 64)
    a, b = (augment.augment(pixels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == pixels.shape and 0 <= float(a.min()) <= float(a.max()) <= 1
    flat = torch.full((1, 3, 16, 16), 0.3)
    assert torch.allclose(augment.blur(flat, 1.0), flat, atol=1e-6)
    assert np.array_equal(
        augment.to_bytes(augment.from_bytes(np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3))).ravel(), np.arange(48)
    )


def test_the_things_in_a_group_of_the_identity_set_differ_only_in_pattern_or_face():
    group = data.sample_group(np.random.default_rng(4), 3, 2)
    things = [[scene.things[0] for scene in scenes] for scenes in group]
    assert len({(t.class_name, t.main, t.second) for row in things for t in row}) == 1
    keys = [{(t.pattern_seed, t.identity) for t in row} for row in things]
    assert all(len(k) == 1 for k in keys) and len(set.union(*keys)) == 3
    assert all(t.pattern_seed is None or t.pattern_seed in world.SEEDS["train"] for row in things for t in row)


def test_kid_and_psnr_have_the_expected_values():
    torch.manual_seed(0)
    x, y, z = torch.randn(400, 8), torch.randn(400, 8), torch.randn(400, 8) + 0.5
    assert abs(judge.kid(x, y)) < 0.05 < judge.kid(x, z)
    assert judge.psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)) == pytest.approx(20.0, abs=1e-3)


def test_the_card_states_how_often_clips_show_the_requested_motion():
    from shared.pretrain.evaluators.judge_clips import BARS
    from shared.pretrain.evaluators.model_card_page import _motion_module

    assert "Not judged yet: `pcs toybox evaluate-clips`" in _motion_module(None, None)
    scores, true = dict.fromkeys([*BARS, "still"], 0.25), dict.fromkeys([*BARS, "still"], 0.5)
    bars = {name: {"value": 0.25, "bar": bar, "met": False} for name, bar in BARS.items()}
    judged = {"n": 8, "guidance": 4.0, "steps": 5, "seed": 0, "bars": bars, "scores": scores, "instrument": true}
    text = _motion_module({"clips": 211200}, {**judged, "confusions": ["spin as wobble 3"]})
    assert "trained on 211,200 captioned clips" in text and "spin as wobble 3" in text
    assert "| motion | 25.0% | 75.0% | **no** | 50.0% |" in text and "| still | 25.0% |  |  | 50.0% |" in text


def test_the_shipped_backbone_generates_what_the_captions_describe():
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(BACKBONES / "backbone"), local_files_only=True)
    found = judge.judge_backbone(pipeline, n=16, guidance=sampling_defaults()["guidance"], steps=10)
    assert set(found["bars"]) == set(judge.BARS) and found["met"] in (True, False)
    scores = found["scores"]  # loose bounds for few pictures and steps, far above chance and well below the card
    assert min(scores["class"], scores["background"], scores["both_colors"]) >= 0.7, scores
    assert scores["vae_psnr_db"] >= 26 and scores["view"] >= 0.4, scores
    assert found["scores"]["accessory_captions"] >= 2 and found["scores"]["style_captions"] >= 2
    with pytest.raises(ValueError, match="too few"):
        judge.judge_backbone(pipeline, n=1)


def test_the_curve_evaluates_only_missing_points_and_the_card_prints_the_curve(tmp_path: Path, monkeypatch):
    from shared.pretrain.evaluators import model_card_page as page
    from shared.pretrain.evaluators import training_curve as curve
    from shared.pretrain.toybox.initial_weights import adopt_backbone
    from shared.pretrain.toybox.run_folder import denoiser_average, save_snapshot, training_folder

    # Three steps are enough, because the values of the scores do not matter here.
    monkeypatch.setattr(curve, "judge_backbone", partial(judge.judge_backbone, steps=3))
    work, kept = tmp_path / "work", tmp_path / "weights"
    kept.mkdir()
    with pytest.raises(ValueError, match="pcs toybox train unet"):
        list(curve.extend(work, 8, 4.0, weights=kept))
    assert adopt_backbone(work / "run")
    average, facts = denoiser_average(work / "run") or ({}, {})
    save_snapshot(training_folder(work / "run", "unet"), average, {**facts, "step": 7, "pictures": 224})
    points = list(curve.extend(work, 8, 4.0, weights=kept))
    assert [p["pictures"] for p in points] == [224, facts["pictures"]]
    assert points[0]["class"] == points[1]["class"], "both points come from the same weights"
    assert list(curve.extend(work, 8, 4.0, weights=kept)) == []
    with pytest.raises(ValueError, match="other settings"):
        list(curve.extend(work, 8, 5.0, weights=kept))
    (head, table) = page._curve(curve.read(kept))[1:]
    assert "8 captions" in head and "| 224 |" in table
