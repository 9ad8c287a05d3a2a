"""What the renderer knows of a picture, and how it teaches the U-Net that draws it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shared.optimizers import AdamW
from shared.pretrain.task import Compute
from shared.pretrain.toybox import dataset, latent_cache, models, run_folder, truth_maps, unet
from shared.pretrain.toybox import denoising_loss as denoising
from shared.pretrain.toybox.truth_heads import TruthHeads
from shared.toybox import tokenizer as words
from shared.toybox import world
from shared.toybox.part_colors import SLOTS
from shared.toybox.render import render
from shared.toybox.splat import DISTANCE
from shared.toybox.surfaces import FAR, surfaces
from shared.train.budget import Budget
from tests.core.squares import same, train

TINY = denoising.UnetTraining(
    models.UnetSize((8, 16, 16), heads=2, groups=4, sample_size=8),
    models.TextSize(hidden=16, layers=1, heads=2),
    batch=8,
    lr=3e-3,
    optimizer=AdamW(betas=(0.9, 0.99)),
)


def scenes(n: int) -> list[world.Scene]:
    rng = np.random.default_rng(11)
    return [world.sample_scene(rng) for _ in range(n)]


# --- surfaces and maps ---


def test_surfaces_are_those_of_the_picture() -> None:
    some = scenes(40)
    drawn, seen = render(some), surfaces(some)
    for name in ("mask", "depth", "position"):
        assert torch.equal(getattr(drawn, name), getattr(seen, name)), name
    assert torch.equal(drawn.thing_mask > 0, seen.slot >= 0)
    assert ((seen.mask == 0) == (seen.depth == FAR)).all() and not seen.normal.movedim(1, -1)[
        seen.mask[:, 0] == 0
    ].any()
    with pytest.raises(ValueError, match="at least one scene"):
        surfaces([])


def test_slots_have_the_colours_that_are_seen() -> None:
    thing = world.Thing("duck", "blue", "red")
    scene = world.Scene((thing,), "gray studio", (world.Camera(20, 10, 0, 0, 0, 1.0),))
    pixels, slot = render([scene]).pixels[0], surfaces([scene]).slot[0]
    inner = -F.max_pool2d(-(slot == SLOTS["main"]).float()[None, None], 3, 1, 1)[0, 0] == 1
    assert inner.sum() > 100 and (pixels[:, inner].argmax(0) == 2).all()
    beak = slot == SLOTS["orange"]
    assert beak.any() and (pixels[0, beak].mean() > pixels[2, beak].mean() + 0.2)


def test_normals_are_those_of_the_positions() -> None:
    camera = world.Camera(35, 20, 0, 0, 0, 1.0)
    scene = world.Scene((world.Thing("bear", "blue", "red"),), "gray studio", (camera,))
    seen = surfaces([scene], 128)
    az, el = np.radians([camera.azimuth_deg, camera.elevation_deg])
    right = np.array([-np.sin(az), np.cos(az), 0])
    toward = np.array([np.cos(az) * np.cos(el), np.sin(az) * np.cos(el), np.sin(el)])
    axes = torch.tensor(np.stack([right, np.cross(toward, right), toward]), dtype=torch.float32)
    at = torch.einsum("ij,jyx->iyx", axes, seen.position[0])
    across, down = at[:, 1:-1, 2:] - at[:, 1:-1, :-2], at[:, 2:, 1:-1] - at[:, :-2, 1:-1]
    expected = F.normalize(torch.cross(down, across, dim=0), dim=0)
    inside = -F.max_pool2d(-(seen.mask == 1).float(), 5, 1, 2)[0, 0, 1:-1, 1:-1] == 1
    cosine = (F.normalize(seen.normal[0, :, 1:-1, 1:-1], dim=0) * expected).sum(0)[inside]
    assert inside.sum() > 1000 and cosine.median() > 0.97


def test_maps_are_means_of_what_is_covered_and_the_commonest_slot() -> None:
    seen = surfaces(scenes(6))
    measured, slot = truth_maps.decode(truth_maps.encode(seen))
    mask = seen.mask.numpy()[:, 0]
    for b, y, x in ((b, y, x) for b in range(6) for y in range(0, 32, 3) for x in range(0, 32, 3)):
        cell = (b, slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))
        cover = mask[cell]
        assert float(measured[b, 0, y, x]) == pytest.approx(cover.mean(), abs=0.006)
        if cover.sum():
            for channel, values in ((1, DISTANCE - seen.depth[:, 0]), (3, seen.normal[:, 1]), (7, seen.position[:, 2])):
                mean = float((values.numpy()[cell] * cover).sum() / cover.sum())
                assert float(measured[b, channel, y, x]) == pytest.approx(np.clip(mean, -1.27, 1.27), abs=0.006)
        values, counts = np.unique(seen.slot.numpy()[cell], return_counts=True)
        assert int(slot[b, y, x]) == values[counts == counts.max()].max()


def test_maps_go_with_the_pictures_and_a_stopped_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "CHUNK", 3)
    made = dataset.build(tmp_path, 7, 3)
    maps = truth_maps.build(tmp_path)
    assert len(maps) == len(made) == 7 and len(list(tmp_path.glob("*.truth.npy"))) == 3
    expected = truth_maps.encode(surfaces([dataset.scene_of(3, i)[0] for i in (6, 1, 4)])).numpy()
    assert np.array_equal(maps.take(np.array([6, 1, 4])), expected)
    inside = truth_maps.decode(torch.from_numpy(maps.take(np.arange(7))))[1] >= 0
    covered = F.avg_pool2d(torch.from_numpy(made.masks(slice(None))[:, None].astype(np.float32)), 2)[:, 0]
    assert inside[covered == 1].all() and not inside[covered == 0].any()
    kept = tmp_path / "chunk-00000.truth.npy"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "chunk-00001.truth.npy").unlink()
    again = truth_maps.build(tmp_path)
    assert np.array_equal(again.take(np.arange(7)), maps.take(np.arange(7))) and kept.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="no toybox data set"):
        truth_maps.build(tmp_path / "none")


# --- heads ---


@pytest.fixture
def cached() -> latent_cache.Cache:
    """Latents whose first channel says where a thing is, and on which side of the middle."""
    rng = np.random.default_rng(0)
    latents = rng.normal(0, 0.1, (32, 4, 8, 8)).astype(np.float16)
    truth = np.zeros((32, 9, 16, 16), np.int8)
    truth[:, 8] = -1
    for i in range(32):
        side = i % 2
        latents[i, 0, 2:6, 4 * side : 4 * side + 4] += 2
        values = [100, 20, 0, 0, 100, 50 - 100 * side, 0, 0, 2 + side]
        truth[i, :, 4:12, 8 * side : 8 * side + 8] = np.array(values)[:, None, None]
    maps = truth_maps.TruthMaps([truth[:20], truth[20:]], 20)
    ids = latent_cache.tokenize(words.build(), [["a red cat"]] * 32)
    attributes = np.full((32, 1, 3), -1, np.int8)
    return latent_cache.Cache(latents, ids, np.full((32, 8, 8), 255, np.uint8), attributes, maps)


def _task(cached: latent_cache.Cache, out: Path, steps: int, workers: int = 1, **changed: object) -> unet.UnetTask:
    if not (out / run_folder.TOKENIZER_FOLDER).exists():
        words.save(words.build(), out / run_folder.TOKENIZER_FOLDER)
    settings = replace(TINY, **changed)  # pyright: ignore[reportArgumentType]
    return unet.UnetTask(settings, cached, out, Budget(steps=steps), Compute(), workers)


def test_the_loss_is_what_the_heads_read_wrongly() -> None:
    torch.manual_seed(0)
    net = models.build_unet(16, TINY.unet)
    heads, weights, clarity = TruthHeads(net), (0.3, 0.5, 0.7, 1.1, 1.3), torch.tensor([1.0, 0.25, 0.5])
    net(torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 900]), torch.randn(3, 7, 16))
    truth = torch.randint(-120, 120, (3, 9, 16, 16))
    truth[:, 0], truth[:, 8] = truth[:, 0].abs() % 101, torch.randint(-1, len(SLOTS), (3, 16, 16))
    truth[2, 8] = -1  # nothing in it
    found = heads.loss(truth.to(torch.int8), clarity, weights)
    expected = []
    for read in heads().values():
        assert read.shape == (3, 8 + len(SLOTS), 16, 16)
        for b in range(3):
            r, m, slot = read[b].double(), truth[b, :8].double() / 100, truth[b, 8]
            value = 0.3 * F.binary_cross_entropy_with_logits(r[0], m[0])
            cells = [(y, x) for y in range(16) for x in range(16) if slot[y, x] >= 0]
            counted = [heads.slot_weights[slot[c]].double() for c in cells]
            for c, n in zip(cells, counted, strict=True):
                at, slots = r[:, c[0], c[1]], r[8:, c[0], c[1]].log_softmax(0)
                wrong = (at[:8] - m[:, c[0], c[1]]).abs()
                value = value + (0.5 * wrong[1] + 0.7 * wrong[2:5].sum() + 1.1 * wrong[5:8].sum()) / len(cells)
                value = value - 1.3 * slots[slot[c]] * n / sum(counted)
            expected.append(clarity[b] * value / 3)
    torch.testing.assert_close(found.double(), torch.stack(expected).sum() / 3, atol=1e-5, rtol=1e-5)
    assert 0 < float(heads.slot_weights[SLOTS["main"]]) < float(heads.slot_weights[SLOTS["dark"]])


def test_truth_reaches_the_unet_until_the_rate_has_fallen(cached: latent_cache.Cache, tmp_path: Path) -> None:
    def gradient(step: int, data: latent_cache.Cache) -> torch.Tensor:
        falling = AdamW(schedule="linear", decay=0.5)
        task = _task(data, tmp_path, 100, optimizer=falling)
        (update,) = task.updates(step, 0)
        update.loss.backward()
        return torch.cat([p.grad.flatten() for p in task.denoiser.parameters() if p.grad is not None])

    plain, until = replace(cached, truth=None), 100 - int(50 * TINY.read_until)
    for step in (0, until - 2):
        assert not torch.equal(gradient(step, cached), gradient(step, plain))
    assert torch.equal(gradient(until, cached), gradient(until, plain))


def test_under_noise_the_truth_counts_less(cached: latent_cache.Cache, tmp_path: Path) -> None:
    task = _task(cached, tmp_path, 10)
    batch = denoising.draw_batch(cached, task.empty, TINY, 0)

    def taught(t: int) -> float:
        at = replace(batch, t=torch.full_like(batch.t, t))
        return float((task.loss(at, 1.0) - task.loss(at, 0.0)).detach())

    bars = models.alphas_bar()
    assert taught(900) / taught(100) == pytest.approx(float(bars[900] / bars[100]), rel=0.5)


@pytest.mark.parametrize("workers", [1, 2])
def test_heads_learn_and_resume_to_the_same_bits(cached: latent_cache.Cache, tmp_path: Path, workers: int) -> None:
    def run(name: str, steps: int) -> unet.UnetTask:
        task = _task(cached, tmp_path, steps, workers)
        train(task, tmp_path / name, steps)
        return task

    run("a", 2)
    stopped, straight = run("a", 4), run("b", 4)
    same(stopped.state_dict(), straight.state_dict())
    assert stopped.heads is not None and not any("heads" in name for name in stopped.ema.state_dict())
    batch = denoising.draw_batch(cached, stopped.empty, replace(TINY, batch=32), 10**6)

    def wrong(task: unet.UnetTask) -> float:
        assert task.heads is not None and batch.truth is not None
        with torch.no_grad():
            task.denoiser(batch.latents, torch.full((32,), 1), batch.ids)
            return float(task.heads.loss(batch.truth, torch.ones(32), TINY.truth))

    assert wrong(run("b", 60)) < 0.5 * wrong(stopped)


def test_shares_of_a_batch_read_the_same(cached: latent_cache.Cache, tmp_path: Path) -> None:
    one, two = (_task(cached, tmp_path, 10, workers) for workers in (1, 2))
    batch = denoising.draw_batch(cached, one.empty, TINY, 0)
    losses = [float(task.loss(batch, 1.0).detach()) for task in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
