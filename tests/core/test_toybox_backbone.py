"""Tests the training of the toybox's networks at a tiny size, and the resulting pipeline folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.optimizers import AdamW
from shared.pretrain.batch_shares import BatchShares
from shared.pretrain.task import Compute, average_of
from shared.pretrain.toybox import assemble, models, run_folder, unet, vae
from shared.pretrain.toybox import denoising_loss as denoising
from shared.pretrain.toybox import latent_cache as cache
from shared.toybox import tokenizer as words
from shared.toybox import weights
from shared.train import checkpoint
from shared.train.averages import Averages
from shared.train.budget import Budget
from shared.train.loop import generator
from tests.core.squares import TINY_UNET_SIZE, TINY_VAE, Squares, same, tiny_run, train

TINY_UNET = denoising.UnetTraining(
    TINY_UNET_SIZE,
    models.TextSize(hidden=16, layers=1, heads=2),
    batch=4,
    optimizer=AdamW(betas=(0.9, 0.99), warmup=2),
    snapshot_steps=2,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run folder with a small tokenizer, a briefly trained autoencoder and a U-Net trained for two steps."""
    out = tmp_path_factory.mktemp("run")
    cached = tiny_run(out, Squares(40))
    _train(out, cached, 2, resume=False)
    return out


def _task(out: Path, cached: cache.Cache, steps: int = 100, workers: int = 1, **changed: Any) -> unet.UnetTask:
    settings = replace(TINY_UNET, **changed)
    return unet.UnetTask(settings, cached, out, Budget(steps=steps), Compute(), workers)


def _train(out: Path, cached: cache.Cache, steps: int, resume: bool, workers: int = 1) -> unet.UnetTask:
    task = _task(out, cached, steps, workers)
    train(task, _folder(out), steps, resume)
    return task


def _folder(out: Path) -> Path:
    return run_folder.training_folder(out, "unet")


def _state(out: Path) -> checkpoint.State:
    state = checkpoint.load(_folder(out))
    assert state is not None
    return state


# --- autoencoder and cache ---


def test_normalization_preserves_the_pictures_and_standardizes_the_latents(made: Path) -> None:
    torch.manual_seed(0)
    data, raw = Squares(40), models.build_vae(TINY_VAE.size).eval()
    x = vae.to_signed(data.pixels(slice(None)))
    with torch.no_grad():
        old = raw.decode(raw.encode(x).latent_dist.mean).sample
        vae.normalise(raw, data.pixels(slice(None)))
        latents = raw.encode(x).latent_dist.mean
        torch.testing.assert_close(raw.decode(latents).sample, old, atol=1e-4, rtol=1e-3)
    latents = latents * raw.config["scaling_factor"]
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_the_latent_cache_matches_the_autoencoder_and_can_be_extended(tmp_path: Path, made: Path) -> None:
    model, tokenizer = run_folder.frozen_vae(made), run_folder.tokenizer_of(made)
    few, all_ = Squares(10), Squares(25)
    all_._pixels[:10] = few._pixels
    cache.build(tmp_path, few, model, tokenizer)
    stamp = np.array(cache.load(tmp_path).latents)
    grown = cache.build(tmp_path, all_, model, tokenizer)
    assert len(grown) == 25 and np.array_equal(grown.latents[:10], stamp)
    x = vae.to_signed(all_.pixels(slice(20, 25)))
    expected = model.encode(x).latent_dist.mean * model.config["scaling_factor"]
    found = torch.from_numpy(grown.latents[20:25].astype(np.float32))
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)
    assert tokenizer.decode(grown.tokens[4, 1], skip_special_tokens=True).strip() == all_.captions[4][1]
    with torch.no_grad():
        model.quant_conv.bias.add_(1.0)  # pyright: ignore[reportOptionalMemberAccess]
    assert not np.array_equal(cache.build(tmp_path, all_, model, tokenizer).latents[:10], stamp)


def test_vae_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    def task(name: str) -> vae.VaeTask:
        return vae.VaeTask(TINY_VAE, Squares(40), tmp_path / name, Compute())

    train(task("a"), tmp_path / "a", 4, pause_at=2)
    resumed, straight = task("a"), task("b")
    train(resumed, tmp_path / "a", 4)
    train(straight, tmp_path / "b", 4)
    same(resumed.state_dict(), straight.state_dict())
    start = task("c").state_dict()
    assert not any(torch.equal(x, start[n]) for n, x in straight.state_dict().items() if n.startswith("average/"))


# --- denoiser ---


@pytest.mark.parametrize("workers", [1, 2])
def test_unet_training_resumes_bit_for_bit(tmp_path: Path, made: Path, workers: int) -> None:
    cached = cache.load(made / "latents")
    for name in ("a", "b"):
        words.save(run_folder.tokenizer_of(made), tmp_path / name / run_folder.TOKENIZER_FOLDER)
    _train(tmp_path / "a", cached, 3, resume=False, workers=workers)
    stopped = _train(tmp_path / "a", cached, 5, resume=True, workers=workers)
    straight = _train(tmp_path / "b", cached, 5, resume=False, workers=workers)
    same(stopped.state_dict(), straight.state_dict())
    a, b = (_state(tmp_path / n) for n in "ab")
    assert a.info == b.info and (a.step, a.info["pictures"]) == (5, 20)
    same(dict(a.optimizer), dict(b.optimizer))
    kept = run_folder.snapshots(tmp_path / "a")
    assert [run_folder.snapshot_facts(path)["pictures"] for path in kept] == [8, 16]


def test_training_continues_from_adopted_weights_with_a_new_optimizer(tmp_path: Path, made: Path) -> None:
    state = _state(made)
    words.save(run_folder.tokenizer_of(made), tmp_path / run_folder.TOKENIZER_FOLDER)
    checkpoint.save(_folder(tmp_path), replace(state, optimizer={}))
    _train(tmp_path, cache.load(made / "latents"), 3, resume=True)
    found = _state(tmp_path)
    assert (found.step, found.info["pictures"]) == (3, 12)
    assert float(found.optimizer["main.0.step"]) == 1, "the new optimizer has taken only the third step"


def test_training_lowers_the_loss_and_changes_the_text_model_and_the_unet(made: Path, tmp_path: Path) -> None:
    cached = cache.load(made / "latents")
    words.save(run_folder.tokenizer_of(made), tmp_path / run_folder.TOKENIZER_FOLDER)
    task = _task(tmp_path, cached, lr=3e-3, batch=16)
    start = {name: p.detach().clone() for name, p in task.denoiser.named_parameters()}
    before = _held_loss(task)
    train(task, tmp_path / "training", 80)
    assert _held_loss(task) < 0.85 * before
    still = {n for n, p in task.denoiser.named_parameters() if torch.equal(p, start[n])}
    assert not still, sorted(still)


@torch.no_grad()
def _held_loss(task: unet.UnetTask) -> float:
    """Returns the sum of the losses on eight batches from steps that the run never reaches."""
    batches = [denoising.draw_batch(task.data, task.empty, task.settings, 10_000 + i) for i in range(8)]
    return sum(float(task.loss(batch)) for batch in batches)


def test_gradients_of_the_parts_of_a_batch_add_up_to_those_of_the_whole(made: Path) -> None:
    cached = cache.load(made / "latents")
    one, two = (_task(made, cached, workers=n) for n in (1, 2))
    batch = denoising.draw_batch(cached, one.empty, TINY_UNET, 0)
    losses = [task.loss(batch) for task in (one, two)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        (3 * loss).backward()
    for a, b in zip(one.denoiser.parameters(), two.denoiser.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="3 workers"):
        _task(made, cached, workers=3)


def test_parameters_that_the_loss_does_not_use_have_no_gradient() -> None:
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    shares = BatchShares(2)
    loss = shares.mean_loss(lambda x: (used * x).sum(), [torch.ones(2), 3 * torch.ones(2)], [used, unused])
    loss.backward()
    assert loss.item() == 8 / 2 and used.grad is not None and used.grad.tolist() == [2, 2] and unused.grad is None


def test_timesteps_cover_the_range_and_favour_the_middle() -> None:
    g = torch.Generator().manual_seed(0)
    t = torch.cat([denoising.draw_times(32, 0.1, 0.0, g) for _ in range(300)])
    assert 0 <= int(t.min()) < 10 and 990 < int(t.max()) < 1000
    assert abs(float(t.float().mean()) - 500) < 10
    assert ((t > 250) & (t < 750)).float().mean() > 0.6
    late = torch.cat([denoising.draw_times(32, 0.1, 0.5, g) for _ in range(300)])
    assert 560 < float(late.float().mean()) < 640
    assert not torch.equal(denoising.draw_times(8, 0.1, 0.0, g), denoising.draw_times(8, 0.1, 0.0, g))


def test_the_v_target_matches_that_of_diffusers() -> None:
    scheduler, bars = models.build_scheduler(), models.alphas_bar()
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(8, 4, 4, 4, generator=g), torch.randn(8, 4, 4, 4, generator=g)
    t = torch.randint(1000, (8,), generator=g)
    seen: dict[str, torch.Tensor] = {}

    def oracle(noisy: torch.Tensor, at: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen["noisy"] = noisy
        return scheduler.get_velocity(x, noise, at)

    settings = replace(TINY_UNET, batch=8)
    loss = denoising.v_loss(
        oracle, denoising.DenoisingBatch(x, t, noise, t, torch.ones(8, 4, 4), t, noise, t), bars, settings
    )  # pyright: ignore[reportArgumentType]
    assert float(loss) < 1e-10
    torch.testing.assert_close(seen["noisy"], scheduler.add_noise(x, noise, t))
    assert float(bars[-1]) < 1e-3, "sampling starts from pure noise, so training must include it"


def test_the_loss_weights_things_more_heavily_than_the_background(made: Path) -> None:
    cached, empty = cache.load(made / "latents"), torch.zeros(32, dtype=torch.long)
    inputs = denoising.draw_batch(cached, empty, replace(TINY_UNET, thing_weight=3.0, batch=16), 0)
    assert float(inputs.weight.mean()) == pytest.approx(1, rel=1e-5)
    assert float(inputs.weight.max() / inputs.weight.min()) == pytest.approx(3, rel=0.01)
    index = torch.randint(len(cached), (16,), generator=generator(TINY_UNET.seed, 0)).numpy()
    inside = torch.from_numpy(np.asarray(cached.covered[index]) == 255)
    torch.testing.assert_close(inputs.weight[inside], inputs.weight.max().expand(int(inside.sum())))
    assert np.array_equal(cache.cover(np.eye(4, dtype=bool)[None], 2), [[[128, 0], [0, 128]]])


def test_plain_attention_matches_fused_attention() -> None:
    net = models.build_unet(16, TINY_UNET.unet).eval()
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([3, 900]), torch.randn(2, 7, 16)
    with torch.no_grad():
        fused = net(x, t, encoder_hidden_states=c).sample
        net.set_attn_processor(models.PlainAttention())
        torch.testing.assert_close(net(x, t, encoder_hidden_states=c).sample, fused, atol=1e-5, rtol=1e-5)


# --- averages ---


def test_the_average_matches_its_closed_form() -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    averages, expected = Averages(dict(module.named_parameters()), cap=0.5), module.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            module.weight.add_(1.0)
        averages.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(averages.state_dict()["weight"], expected)
    averages.copy_to(dict(module.named_parameters()))
    assert torch.equal(module.weight.detach(), averages.state_dict()["weight"])


# --- the pipeline folder ---

LOAD = """
import json, sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
pipe.set_progress_bar_config(disable=True)
image = pipe("a photo of a red cat", num_inference_steps=3, guidance_scale=3.0).images[0]
parts = {n: str(next(m.parameters()).dtype) for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
ours = sorted(m for m in sys.modules if m == "shared" or m.startswith("shared."))
print(json.dumps({"class": type(pipe).__name__, "size": image.size, "parts": parts, "ours": ours}))
"""


def _load_elsewhere(folder: Path, cwd: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_assembled_folder_loads_without_this_project(made: Path, tmp_path: Path) -> None:
    target = assemble.assemble(made, tmp_path / "backbone")
    found = _load_elsewhere(target, tmp_path)
    assert found["class"] == "StableDiffusionPipeline" and found["size"] == [16, 16] and found["ours"] == []
    assert found["parts"] == dict.fromkeys(("vae", "text_encoder", "unet"), "torch.float32")
    facts = json.loads((target / "training.json").read_text())
    assert (facts["step"], facts["pictures"]) == (2, 8) and facts["last"]["vae"]["psnr"] > 0
    assert str(made) not in "".join(p.read_text() for p in target.glob("**/*.json"))
    assert [p.name for p in tmp_path.iterdir()] == ["backbone"]
    again = assemble.assemble(made, target)  # replaces the folder
    assert again == target and [p.name for p in tmp_path.iterdir()] == ["backbone"]


def test_the_old_folder_stays_until_the_assembled_one_takes_its_place(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace = assemble.assemble(made, tmp_path / "backbone"), os.replace

    def watched(old: Any, new: Any) -> None:
        replace(old, new)
        assert target.exists(), "a process killed here would leave no weights"

    monkeypatch.setattr(os, "replace", watched)
    (target / "old.txt").touch()
    assemble.assemble(made, target)
    assert not (target / "old.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["backbone"]


def test_the_assembled_weights_are_the_average_in_fp16(made: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    target = assemble.assemble(made, tmp_path / "backbone")
    shipped = load_file(str(target / "unet" / "diffusion_pytorch_model.safetensors"))
    average = average_of(_state(made).learned)
    for name, tensor in shipped.items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, average[f"unet.{name}"].half()), name


def test_the_shipped_backbone_is_small_and_generates_64_pixel_pictures(tmp_path: Path) -> None:
    folder = weights.backbone_path()
    assert sum(p.stat().st_size for p in folder.glob("**/*") if p.is_file()) < 40e6
    assert _load_elsewhere(folder, tmp_path)["size"] == [64, 64]
