"""A larger autoencoder around a smaller one, at tiny size: what it does at first, and what training leaves as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.pretrain.task import Compute
from shared.pretrain.toybox import extend_vae, models, run_folder, vae
from shared.toybox import weights
from shared.train import checkpoint
from tests.core.squares import TINY_SIZE, TINY_VAE, Squares, same, train

LARGER = models.VaeSize((12, 12, 12), groups=6, sample_size=16, latent_channels=6)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished autoencoder after some steps, in fp32."""
    out = tmp_path_factory.mktemp("small")
    train(vae.VaeTask(replace(TINY_VAE, lr=1e-2), Squares(40), out, Compute()), out / "training", 12)
    return run_folder.frozen_vae(out)


def _held(small: Any) -> vae.VaeTraining:
    inner = extend_vae.Held(TINY_SIZE, small.config.scaling_factor)
    return vae.VaeTraining(LARGER, held=inner, batch=4, lr=1e-2)


def _extended(small: Any, out: Path) -> vae.VaeTask:
    """The training of the extended autoencoder, at its beginning."""
    task = vae.VaeTask(_held(small), Squares(40), out, Compute())
    task.vae.load_state_dict(extend_vae.extend(small, LARGER).state_dict())
    task.averages.load_state_dict({n: p.detach().clone() for n, p in task.vae.named_parameters()})
    return task


def _trained(small: Any, out: Path, steps: int, pause_at: int | None = None) -> vae.VaeTask:
    """As `_extended`, after training in `out`."""
    task, folder = _extended(small, out), run_folder.training_folder(out, "vae")
    if checkpoint.load(folder) is None:
        checkpoint.save(folder, checkpoint.State(0, 0, task.state_dict(), {}, info={"facts": {}, "pictures": 0}))
    train(task, folder, steps, pause_at=pause_at)
    return task


def _pictures() -> torch.Tensor:
    return vae.to_signed(Squares(40).pixels(slice(0, 8)))


@torch.no_grad()
def _latents(model: Any) -> torch.Tensor:
    return model.encode(_pictures().to(model.dtype)).latent_dist.mean


@pytest.mark.parametrize(
    "size", [LARGER, replace(LARGER, latent_channels=4), replace(TINY_SIZE, latent_channels=5)], ids=str
)
def test_an_extended_autoencoder_does_what_it_did(small: Any, size: models.VaeSize) -> None:
    """In float64, so that nothing but rounding is forgiven; every new weight counts once the old ones read it."""
    old = models.build_vae(TINY_SIZE).double().eval()
    old.load_state_dict(small.state_dict())
    new: Any = extend_vae.extend(small, size).double().eval()
    x = _pictures().double()
    with torch.no_grad():
        before, after = old.encode(x).latent_dist, new.encode(x).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        assert after.mean.shape[1] == size.latent_channels
        for a, b in ((before.mean, after.mean), (before.logvar, after.logvar)):
            torch.testing.assert_close(b[:, :4], a, atol=1e-6, rtol=0)
        torch.testing.assert_close(new.decode(after.mean).sample, old.decode(before.mean).sample, atol=1e-5, rtol=0)  # pyright: ignore[reportAttributeAccessIssue]
    assert new.config.scaling_factor == small.config.scaling_factor


def test_training_keeps_the_held_latents_to_the_bit_and_learns_the_rest(small: Any, tmp_path: Path) -> None:
    task = _extended(small, tmp_path)
    start, parameters = _latents(task.vae), {n: p.detach().clone() for n, p in task.vae.named_parameters()}
    trained = _trained(small, tmp_path, 12)
    latents = _latents(trained.vae)
    assert torch.equal(latents[:, :4], start[:, :4])
    assert (latents[:, 4:] - start[:, 4:]).abs().amin((0, 2, 3)).gt(0).all()
    still = {n for n, p in trained.vae.named_parameters() if torch.equal(p, parameters[n])}
    assert all(n.startswith("encoder.mid_block.attentions.0.to_") for n in still), sorted(still)  # its scores stay
    written = run_folder.frozen_vae(tmp_path)
    assert torch.equal(_latents(written)[:, :4], start[:, :4])
    assert written.config["scaling_factor"] == small.config.scaling_factor


def test_new_channels_reconstruct_what_the_old_ones_cannot(small: Any, tmp_path: Path) -> None:
    pixels = Squares(40).pixels(slice(None))
    trained = _trained(small, tmp_path, 60)
    assert vae.psnr(trained.vae, pixels) > vae.psnr(small, pixels) + 1
    blind = trained.vae
    assert blind.post_quant_conv is not None
    with torch.no_grad():
        blind.post_quant_conv.weight[:, 4:] = 0
    assert vae.psnr(blind, pixels) < vae.psnr(run_folder.frozen_vae(tmp_path), pixels) - 1


def test_normalising_keeps_held_channels_and_gives_the_new_ones_unit_spread(small: Any) -> None:
    data, raw = Squares(40), extend_vae.extend(small, LARGER).eval()
    x, before = vae.to_signed(data.pixels(slice(None))), _latents(raw)
    with torch.no_grad():
        old = raw.decode(raw.encode(x).latent_dist.mean).sample  # pyright: ignore[reportAttributeAccessIssue]
        vae.normalise(raw, data.pixels(slice(None)), held=_held(small).held)
        latents = raw.encode(x).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
        torch.testing.assert_close(raw.decode(latents).sample, old, atol=1e-4, rtol=1e-3)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(_latents(raw)[:, :4], before[:, :4])
    latents = latents * raw.config["scaling_factor"]
    torch.testing.assert_close(latents.mean((0, 2, 3))[4:], torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(6), atol=0.05, rtol=0)


def test_the_extension_resumes_to_the_same_bits(small: Any, tmp_path: Path) -> None:
    _trained(small, tmp_path / "a", 6, pause_at=3)
    resumed, straight = _trained(small, tmp_path / "a", 6), _trained(small, tmp_path / "b", 6)
    same(resumed.state_dict(), straight.state_dict())


@pytest.mark.parametrize(
    "size",
    [
        replace(LARGER, channels=(12, 12)),
        replace(LARGER, channels=(6, 12, 12)),
        replace(LARGER, groups=4),
        replace(LARGER, latent_channels=3),
        replace(LARGER, layers_per_block=2),
    ],
    ids=str,
)
def test_what_it_cannot_grow_into_is_refused(small: Any, size: models.VaeSize) -> None:
    with pytest.raises(ValueError, match="is no part of one of"):
        extend_vae.extend(small, size)


def test_a_new_folder_begins_with_the_shipped_autoencoder_extended(tmp_path: Path) -> None:
    from shared.pretrain.toybox.initial_weights import adopt_vae

    settings = vae.shipped_training()
    assert adopt_vae(tmp_path, settings)
    task = vae.VaeTask(settings, Squares(40), tmp_path, Compute())
    state = checkpoint.load(run_folder.training_folder(tmp_path, "vae"))
    assert state is not None and state.step == 0
    task.load_state_dict(state.learned)
    shipped = run_folder.frozen_vae(weights.WEIGHTS / "backbone").float()
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32))
    with torch.no_grad():
        old, new = (m.eval().encode(x).latent_dist.mean for m in (shipped, task.averaged()))  # pyright: ignore[reportAttributeAccessIssue]
    count = vae.FIRST.size.latent_channels
    torch.testing.assert_close(new[:, :count], old[:, :count], atol=1e-4, rtol=1e-4)
    assert vae.shipped_training(fresh=True).held is None
