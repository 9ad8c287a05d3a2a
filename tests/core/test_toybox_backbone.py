"""The toybox's trainings at tiny size, and the pipeline folder that they become."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.pretrain.toybox import assemble, common, models, unet, vae
from shared.pretrain.toybox import latent_cache as cache
from shared.toybox import tokenizer as words
from shared.toybox import weights
from tests.core.squares import TINY_VAE, Squares, same, tiny_run

TINY_UNET = unet.UnetTraining(
    models.UnetSize((8, 16, 16), heads=2, groups=4, sample_size=4),
    models.TextSize(hidden=16, layers=1, heads=2),
    batch=4,
    warmup=2,
    bf16=False,
    log_every=2,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer of few words, an autoencoder after three steps and a U-Net after two."""
    out = tmp_path_factory.mktemp("run")
    cached = tiny_run(out, Squares(40))
    _train(out, cached, 2, resume=False)
    return out


def _train(out: Path, cached: cache.Cache, steps: int, resume: bool, workers: int = 1) -> unet.UnetRun:
    run = unet.UnetRun(TINY_UNET, assemble.tokenizer_of(out), out, torch.device("cpu"), resume, workers)
    unet.fit(run, cached, common.Budget(steps=steps, warmup=2), common.Log(out / "unet_log.jsonl", say=False))
    return run


# --- autoencoder and cache ---


def test_normalising_keeps_the_pictures_and_gives_unit_latents(run_folder: Path) -> None:
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


def test_latents_cache_agrees_with_the_autoencoder_and_grows(tmp_path: Path, run_folder: Path) -> None:
    model, tokenizer = assemble.frozen_vae(run_folder), assemble.tokenizer_of(run_folder)
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


def test_vae_resumes_to_the_same_bits(tmp_path: Path) -> None:
    cpu, data = torch.device("cpu"), Squares(40)
    _steps(vae.VaeRun(TINY_VAE, tmp_path / "a", cpu, resume=False), data, 2)
    stopped = vae.VaeRun(TINY_VAE, tmp_path / "a", cpu, resume=True)
    _steps(stopped, data, 4)
    straight = vae.VaeRun(TINY_VAE, tmp_path / "b", cpu, resume=False)
    _steps(straight, data, 4)
    same(stopped.vae.state_dict(), straight.vae.state_dict())
    same(stopped.ema.shadow, straight.ema.shadow)


def _steps(run: vae.VaeRun, data: Squares, until: int) -> None:
    while run.step < until:
        run.update(data, len(data), 1.0)
    run.save()


# --- denoiser ---


@pytest.mark.parametrize("workers", [1, 2])
def test_unet_resumes_to_the_same_bits(tmp_path: Path, run_folder: Path, workers: int) -> None:
    cached = cache.load(run_folder / "latents")
    for name in ("a", "b"):
        words.save(assemble.tokenizer_of(run_folder), tmp_path / name / assemble.TOKENIZER_FOLDER)
    _train(tmp_path / "a", cached, 3, resume=False, workers=workers)
    stopped = _train(tmp_path / "a", cached, 5, resume=True, workers=workers)
    straight = _train(tmp_path / "b", cached, 5, resume=False, workers=workers)
    same(stopped.denoiser.state_dict(), straight.denoiser.state_dict())
    same(stopped.ema.shadow, straight.ema.shadow)
    a, b = (common.load_checkpoint(tmp_path / n / assemble.UNET_CHECKPOINT) for n in "ab")
    assert a[1] == b[1] and (a[1]["step"], a[1]["pictures"]) == (5, 20)
    assert torch.equal(a[0]["optimizer"][0]["exp_avg_sq"], b[0]["optimizer"][0]["exp_avg_sq"])


def test_adopted_weights_go_on_with_a_new_optimizer(tmp_path: Path, run_folder: Path) -> None:
    tree, facts = common.load_checkpoint(run_folder / assemble.UNET_CHECKPOINT)
    words.save(assemble.tokenizer_of(run_folder), tmp_path / assemble.TOKENIZER_FOLDER)
    common.save_checkpoint(tmp_path / assemble.UNET_CHECKPOINT, {k: tree[k] for k in ("model", "ema")}, facts)
    run = _train(tmp_path, cache.load(run_folder / "latents"), 3, resume=True)
    assert (run.step, run.pictures) == (3, 12)


def test_the_shipped_autoencoder_is_what_a_new_folder_goes_on_from(tmp_path: Path) -> None:
    from shared.pretrain.toybox.initial_weights import adopt_vae

    assert adopt_vae(tmp_path) and not adopt_vae(tmp_path), "a checkpoint of its own is left alone"
    run = vae.VaeRun(vae.VaeTraining(), tmp_path, torch.device("cpu"), resume=True)
    assert run.step == 0
    shipped = assemble.frozen_vae(weights.WEIGHTS / "backbone").float()
    same(run.vae.state_dict(), shipped.state_dict())
    same(run.ema.shadow, dict(shipped.named_parameters()))


def test_a_new_folder_keeps_what_the_shipped_weights_say_of_their_trainings(tmp_path: Path) -> None:
    from shared.pretrain.toybox.initial_weights import adopt

    shipped = json.loads((weights.WEIGHTS / "backbone" / "training.json").read_text())
    assert adopt(tmp_path) and not adopt(tmp_path)
    assert assemble.training_facts(tmp_path) == shipped and set(shipped["last"]) == {"vae", "decoder", "unet"}


def test_training_lowers_the_loss_and_changes_text_model_and_unet(run_folder: Path, tmp_path: Path) -> None:
    cached, settings = cache.load(run_folder / "latents"), replace(TINY_UNET, lr=3e-3, batch=16)
    words.save(assemble.tokenizer_of(run_folder), tmp_path / assemble.TOKENIZER_FOLDER)
    run = unet.UnetRun(settings, assemble.tokenizer_of(run_folder), tmp_path, torch.device("cpu"), resume=False)
    start = {name: p.detach().clone() for name, p in run.denoiser.named_parameters()}
    before = _held_loss(run, cached)
    for _ in range(80):
        run.update(cached, 1.0)
    assert _held_loss(run, cached) < 0.85 * before
    still = {n for n, p in run.denoiser.named_parameters() if torch.equal(p, start[n])}
    assert not still, sorted(still)


@torch.no_grad()
def _held_loss(run: unet.UnetRun, cached: cache.Cache) -> float:
    """The loss on the draws of steps that the run never reaches."""
    draws = [unet.draw(cached, run.empty, run.settings, 10_000 + i) for i in range(8)]
    return sum(float(unet.v_loss(run.denoiser, inputs, run.bars, run.settings)) for inputs in draws)


def test_shares_of_a_batch_add_up_to_its_gradient(run_folder: Path, tmp_path: Path) -> None:
    cached, tokenizer = cache.load(run_folder / "latents"), assemble.tokenizer_of(run_folder)
    runs = [unet.UnetRun(TINY_UNET, tokenizer, tmp_path, torch.device("cpu"), False, n) for n in (1, 2)]
    inputs = unet.draw(cached, runs[0].empty, TINY_UNET, 0)
    losses = [run.backward(inputs) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, two in zip(runs[0].denoiser.parameters(), runs[1].denoiser.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="3 workers"):
        unet.UnetRun(TINY_UNET, tokenizer, tmp_path, torch.device("cpu"), False, 3)


def test_times_fill_the_range_and_favour_the_middle() -> None:
    g = torch.Generator().manual_seed(0)
    t = torch.cat([unet.draw_times(32, 0.1, 0.0, g) for _ in range(300)])
    assert 0 <= int(t.min()) < 10 and 990 < int(t.max()) < 1000
    assert abs(float(t.float().mean()) - 500) < 10
    assert ((t > 250) & (t < 750)).float().mean() > 0.6
    late = torch.cat([unet.draw_times(32, 0.1, 0.5, g) for _ in range(300)])
    assert 560 < float(late.float().mean()) < 640
    assert not torch.equal(unet.draw_times(8, 0.1, 0.0, g), unet.draw_times(8, 0.1, 0.0, g))


def test_v_target_is_that_of_diffusers() -> None:
    scheduler, bars = models.build_scheduler(), unet.alphas_bar()
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(8, 4, 4, 4, generator=g), torch.randn(8, 4, 4, 4, generator=g)
    t = torch.randint(1000, (8,), generator=g)
    seen: dict[str, torch.Tensor] = {}

    def oracle(noisy: torch.Tensor, at: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen["noisy"] = noisy
        return scheduler.get_velocity(x, noise, at)

    settings = replace(TINY_UNET, batch=8)
    loss = unet.v_loss(oracle, unet.Draw(x, t, noise, t, torch.ones(8, 4, 4), t, noise, t), bars, settings)  # pyright: ignore[reportArgumentType]
    assert float(loss) < 1e-10
    torch.testing.assert_close(seen["noisy"], scheduler.add_noise(x, noise, t))
    assert float(bars[-1]) < 1e-3, "sampling starts from pure noise, so training must end there"


def test_the_loss_counts_more_where_things_are(run_folder: Path) -> None:
    cached, empty = cache.load(run_folder / "latents"), torch.zeros(32, dtype=torch.long)
    inputs = unet.draw(cached, empty, replace(TINY_UNET, thing_weight=3.0, batch=16), 0)
    assert float(inputs.weight.mean()) == pytest.approx(1, rel=1e-5)
    assert float(inputs.weight.max() / inputs.weight.min()) == pytest.approx(3, rel=0.01)
    index = torch.randint(len(cached), (16,), generator=common.step_generator(TINY_UNET.seed, 0)).numpy()
    inside = torch.from_numpy(np.asarray(cached.covered[index]) == 255)
    torch.testing.assert_close(inputs.weight[inside], inputs.weight.max().expand(int(inside.sum())))
    assert np.array_equal(cache.cover(np.eye(4, dtype=bool)[None], 2), [[[128, 0], [0, 128]]])


def test_plain_attention_equals_the_fused_one() -> None:
    net = models.build_unet(16, TINY_UNET.unet).eval()
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([3, 900]), torch.randn(2, 7, 16)
    with torch.no_grad():
        fused = net(x, t, encoder_hidden_states=c).sample
        net.set_attn_processor(unet.PlainAttention())
        torch.testing.assert_close(net(x, t, encoder_hidden_states=c).sample, fused, atol=1e-5, rtol=1e-5)


# --- shared pieces ---


def test_average_follows_its_closed_form() -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    ema, expected = common.Ema(module, cap=0.5), module.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            module.weight.add_(1.0)
        ema.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(ema.shadow["weight"], expected)
    ema.copy_to(module)
    assert torch.equal(module.weight.detach(), ema.shadow["weight"])


def test_budget_warms_up_stays_and_decays() -> None:
    budget = common.Budget(steps=100, warmup=10, decay=0.2)
    assert [round(budget.rate(s, 0), 3) for s in (0, 9, 50, 80, 90)] == [0.1, 1.0, 1.0, 1.0, 0.5]
    assert common.Budget(minutes=2).progress(0, 60) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="steps or minutes"):
        common.Budget()
    with pytest.raises(ValueError, match="decay"):
        common.Budget(steps=1, decay=2)


def test_checkpoint_round_trip_leaves_no_partial_file(tmp_path: Path) -> None:
    tree = {"model": {"w.a": torch.arange(3.0)}, "optimizer": {0: {"step": torch.tensor(4.0)}}}
    common.save_checkpoint(tmp_path / "x.safetensors", tree, {"step": 4})
    loaded, facts = common.load_checkpoint(tmp_path / "x.safetensors")
    assert facts == {"step": 4} and torch.equal(loaded["optimizer"][0]["step"], torch.tensor(4.0))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


# --- the folder ---

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


def test_assembled_folder_loads_without_this_project(run_folder: Path, tmp_path: Path) -> None:
    target = assemble.assemble(run_folder, tmp_path / "backbone")
    found = _load_elsewhere(target, tmp_path)
    assert found["class"] == "StableDiffusionPipeline" and found["size"] == [16, 16] and found["ours"] == []
    assert found["parts"] == dict.fromkeys(("vae", "text_encoder", "unet"), "torch.float32")
    facts = json.loads((target / "training.json").read_text())
    assert (facts["step"], facts["pictures"]) == (2, 8) and facts["last"]["vae"]["psnr"] > 0
    assert str(run_folder) not in "".join(p.read_text() for p in target.glob("**/*.json"))
    assert [p.name for p in tmp_path.iterdir()] == ["backbone"]
    again = assemble.assemble(run_folder, target)  # replaces
    assert again == target and [p.name for p in tmp_path.iterdir()] == ["backbone"]


def test_assembled_weights_are_the_average_in_fp16(run_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    target = assemble.assemble(run_folder, tmp_path / "backbone")
    shipped = load_file(str(target / "unet" / "diffusion_pytorch_model.safetensors"))
    tree, _ = common.load_checkpoint(run_folder / assemble.UNET_CHECKPOINT)
    for name, tensor in shipped.items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, tree["ema"][f"unet.{name}"].half()), name


def test_shipped_backbone_is_small_and_loads_at_64_pixels(tmp_path: Path) -> None:
    folder = weights.backbone_path()
    assert sum(p.stat().st_size for p in folder.glob("**/*") if p.is_file()) < 28e6
    assert _load_elsewhere(folder, tmp_path)["size"] == [64, 64]
