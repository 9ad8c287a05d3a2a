"""Tests, at a tiny size, what changes and what stays the same when the decoder is trained against a discriminator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from shared.pretrain.task import Compute
from shared.pretrain.toybox import decoder, run_folder, vae
from shared.pretrain.toybox import latent_cache as cache
from shared.pretrain.toybox.discriminator import Discriminator, hinge_loss
from shared.train import checkpoint
from tests.core.squares import TINY_VAE, Squares, same, tiny_run, train

TINY = decoder.DecoderTraining(batch=4, alone=2, pixel=TINY_VAE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, cache.Cache]:
    out = tmp_path_factory.mktemp("run")
    tiny_run(out, Squares(40))
    return out, cache.load(out / "latents")


@pytest.fixture
def run(made: tuple[Path, cache.Cache], tmp_path: Path) -> tuple[Path, cache.Cache]:
    shutil.copytree(made[0], tmp_path / "run")
    return tmp_path / "run", made[1]


def _task(out: Path, cached: cache.Cache, settings: decoder.DecoderTraining = TINY) -> decoder.DecoderTask:
    return decoder.DecoderTask(settings, Squares(40), cached.latents, out, Compute())


def _folder(out: Path) -> Path:
    return run_folder.training_folder(out, "decoder")


def test_the_decoder_changes_but_the_latents_do_not(run: tuple[Path, cache.Cache]) -> None:
    out, cached = run
    before, trained = run_folder.frozen_vae(out), _task(out, cached)
    train(trained, _folder(out), 4)
    after = run_folder.frozen_vae(out)
    kept = {n: x for n, x in after.state_dict().items() if n.startswith(("encoder.", "quant_conv."))}
    same({n: before.state_dict()[n] for n in kept}, kept)
    moved = [n for n, x in after.named_parameters() if not torch.equal(x, before.state_dict()[n])]
    assert moved and all(n.startswith(("decoder.", "post_quant_conv.")) for n in moved)
    assert after.config["scaling_factor"] == before.config["scaling_factor"]
    tokenizer = run_folder.tokenizer_of(out)
    assert cache.fingerprint(after, tokenizer) == cache.fingerprint(before, tokenizer)  # the cached latents stay valid
    average = torch.nn.ModuleList([after.post_quant_conv, after.decoder])  # type: ignore[list-item]
    same(dict(average.named_parameters()), trained.averages.state_dict())


def test_the_training_task_decodes_like_the_autoencoder(run: tuple[Path, cache.Cache]) -> None:
    out, cached = run
    trained, model = _task(out, cached), run_folder.frozen_vae(out)
    latents = torch.from_numpy(cached.latents[:3].astype("float32"))
    with torch.no_grad():
        expected = model.decode(latents / model.config["scaling_factor"]).sample
        torch.testing.assert_close(trained.decode(latents), expected, atol=1e-5, rtol=1e-5)


def test_decoder_training_resumes_bit_for_bit(run: tuple[Path, cache.Cache], tmp_path: Path) -> None:
    out, cached = run
    shutil.copytree(out, tmp_path / "other")
    train(_task(out, cached), tmp_path / "halves", 6, pause_at=3)
    resumed, straight = _task(tmp_path / "other", cached), _task(tmp_path / "other", cached)
    start = straight.state_dict()
    train(resumed, tmp_path / "halves", 6)
    train(straight, tmp_path / "whole", 6)
    same(resumed.state_dict(), straight.state_dict())
    moved = {name.split("/")[0] for name, x in straight.state_dict().items() if not torch.equal(x, start[name])}
    assert moved == {"model", "discriminator", "average"}


def test_each_loss_trains_its_own_network(run: tuple[Path, cache.Cache]) -> None:
    task = _task(*run)
    discriminator, decoder_ = task.updates(0, 0)
    assert (discriminator.groups, decoder_.groups) == (("discriminator",), ("decoder",))
    assert set(task.groups()) == {"discriminator", "decoder"}
    trained = {id(p) for part in task.groups()["decoder"] for p in part.parameters}
    assert trained == {id(p) for p in task.decoder.parameters()}


def test_further_training_of_the_autoencoder_discards_the_trained_decoder(run: tuple[Path, cache.Cache]) -> None:
    out, cached = run
    train(_task(out, cached), _folder(out), 1)
    written = run_folder.frozen_vae(out).state_dict()

    def retrain(steps: int) -> None:
        train(vae.VaeTask(TINY_VAE, Squares(40), out, Compute()), run_folder.training_folder(out, "vae"), steps)

    retrain(3)  # the autoencoder has already been trained this far, so nothing happens and the decoder is kept
    assert checkpoint.load(_folder(out)) is not None
    same(run_folder.frozen_vae(out).state_dict(), written)
    retrain(4)
    assert not list(_folder(out).iterdir()) and not torch.equal(
        run_folder.frozen_vae(out).state_dict()["encoder.conv_in.weight"], written["encoder.conv_in.weight"]
    )


def test_the_discriminator_learns_to_recognize_blurred_pictures() -> None:
    torch.manual_seed(0)
    real = vae.to_signed(Squares(64).pixels(slice(None)))
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(real, (1, 1, 1, 1), mode="replicate"), 3, 1)
    critic = Discriminator((8, 16, 16))
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.99))
    for _ in range(40):
        loss = hinge_loss(critic(real)[0], critic(blurred)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert float(critic(real)[0].mean()) > 0.3 > -0.3 > float(critic(blurred)[0].mean())


def test_the_adversarial_gradient_is_a_fixed_share_of_the_reconstruction_gradient(
    run: tuple[Path, cache.Cache],
) -> None:
    """At the last layer, the ratio of the two gradient norms is `adversarial` (arXiv 2012.09841, eq. 7)."""
    out, cached = run
    data = Squares(40)
    real, thing = vae.to_signed(data.pixels(slice(8))), torch.from_numpy(data.masks(slice(8)))[:, None]
    norms = []
    for share in (0.0, 0.5):
        task = _task(out, cached, decoder.DecoderTraining(adversarial=share, pixel=TINY_VAE))
        decoded = task.decode(torch.from_numpy(cached.latents[:8].astype("float32")))
        loss, _ = task.loss(decoded, real, thing, trust=1.0)
        norms.append(torch.autograd.grad(loss, task.decoder[1].conv_out.weight)[0])  # type: ignore[union-attr, arg-type]
    assert float((norms[1] - norms[0]).norm() / norms[0].norm()) == pytest.approx(0.5, rel=1e-2)
